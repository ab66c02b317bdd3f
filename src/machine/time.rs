//! Two clocks as two types with no conversion between them: durations cross the boundary, instants never do.

use core::time::Duration;

/// Whole microseconds of a duration, saturating: the resolution of every instant of the protocol.
pub(crate) const fn micros(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000).saturating_add(duration.subsec_micros() as u64)
}

/// A duration in whole microseconds, as instants are: what is reckoned with at every input. All of it saturates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Age(u64);

impl Age {
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) const fn of(duration: Duration) -> Self {
        Self(micros(duration))
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    pub(crate) fn less(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    pub(crate) fn times(self, factor: u32) -> Self {
        Self(self.0.saturating_mul(u64::from(factor)))
    }
}

impl From<Age> for Duration {
    fn from(age: Age) -> Self {
        Self::from_micros(age.0)
    }
}

/// A point on a worker's own continuous clock, in microseconds since an arbitrary origin.
///
/// The clock counts on while the machine sleeps (`CLOCK_BOOTTIME` on Linux; never `std::time::Instant`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// Of what is not to come: no clock goes so far.
    pub(crate) const NEVER: Self = Self(u64::MAX);

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

    /// How old is now what began then; zero if that lies ahead.
    pub(crate) fn age_of(self, began: Self) -> Age {
        Age(self.0.saturating_sub(began.0))
    }

    /// Earlier by `duration`, saturating at the origin.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(micros(duration)))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        self.age_of(earlier).into()
    }
}

/// A point on the database's clock, in microseconds since the Unix epoch. It alone grants and expires leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DbTime(i64);

impl DbTime {
    /// Of what is not to come: no clock goes so far.
    pub(crate) const NEVER: Self = Self(i64::MAX);

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

    /// When what began now has that age.
    #[must_use]
    pub(crate) fn aged(self, age: Age) -> Self {
        Self(self.0.saturating_add_unsigned(age.0))
    }

    /// When what has that age began.
    #[must_use]
    pub(crate) fn ago(self, age: Age) -> Self {
        Self(self.0.saturating_sub_unsigned(age.0))
    }

    /// How old is now what began then; zero if that lies ahead.
    pub(crate) fn age_of(self, began: Self) -> Age {
        Age(u64::try_from(self.0.saturating_sub(began.0)).unwrap_or(0))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        self.age_of(earlier).into()
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
