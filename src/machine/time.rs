//! Two clocks as two types with no conversion between them: durations cross the boundary, instants never do.

use core::time::Duration;

/// Whole microseconds of a duration, saturating: the resolution of every instant of the protocol.
pub(crate) fn micros(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000).saturating_add(u64::from(duration.subsec_micros()))
}

/// An age in whole microseconds, worked out once where moments are compared with it at every input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Age(u64);

impl Age {
    pub(crate) fn of(duration: Duration) -> Self {
        Self(micros(duration))
    }
}

/// A point on a worker's own continuous clock, in microseconds since an arbitrary origin.
///
/// The clock counts on while the machine sleeps (`CLOCK_BOOTTIME` on Linux; never `std::time::Instant`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The moment that many microseconds after the clock's origin.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since the clock's origin.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Later by `duration`, saturating.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(micros(duration)))
    }

    /// When what began now has that age.
    #[must_use]
    pub(crate) fn aged(self, age: Age) -> Self {
        Self(self.0.saturating_add(age.0))
    }

    /// Earlier by `duration`, saturating at the origin.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(micros(duration)))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// A point on the database's clock, in microseconds since the Unix epoch. It alone grants and expires leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DbTime(i64);

impl DbTime {
    /// The time that many microseconds after the Unix epoch.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since the Unix epoch.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// Whole milliseconds since the Unix epoch, rounded down.
    pub const fn as_millis(self) -> i64 {
        self.0.div_euclid(1_000)
    }

    /// Whole seconds since the Unix epoch, rounded down.
    pub const fn as_secs(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// Later by `duration`, saturating.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add_unsigned(micros(duration)))
    }

    /// Earlier by `duration`, saturating.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub_unsigned(micros(duration)))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// Both readings of the database's clock that a statement uses (rule P1): compare with `early` (statement start,
/// stable), grant with `late` (read after the row lock), so that every error falls on the safe side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DbClock {
    /// The statement's start.
    pub early: DbTime,
    /// The clock after the row was locked.
    pub late: DbTime,
}
