//! What can be broken, and what may excuse it.

use std::fmt;

use crate::fact::Micros;

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
pub(crate) use named;

named! {
    /// The invariants of ARCHITECTURE.md.
    Invariant {
        /// No lease is granted to a second owner while the first is live.
        S1 = "S1 live-lease",
        /// A healthy holder keeps its event.
        S2 = "S2 healthy-holder",
        /// No request starts or stays open past the fence.
        S3 = "S3 self-fence",
        /// No two requests for one event are open at once.
        S4 = "S4 no-overlap",
        /// Tokens rise; no write with an old token takes effect.
        S5 = "S5 token",
        /// Attempts are counted, limited and not early.
        S6 = "S6 attempts",
        /// `delivered` is true and terminal states are final.
        S7 = "S7 terminal",
        /// No event is lost.
        S8 = "S8 conservation",
        /// Everything is bounded.
        S9 = "S9 bounded",
        /// Every event becomes terminal.
        L1 = "L1 convergence",
        /// Orphans are taken in time.
        L2 = "L2 orphan",
        /// Nothing starves.
        L3 = "L3 starvation",
        /// A drain ends in time.
        L4 = "L4 drain",
        /// The machine panicked, or broke an invariant of its own.
        Panic = "PANIC",
    }
}

named! {
    /// Why a broken promise does not count: the cases that ARCHITECTURE.md names.
    Excuse {
        /// The holder crashed.
        Crashed = "holder crashed",
        /// The holder ended with the lease unsettled, after a drain.
        Ended = "holder ended",
        /// The holder was stopped or starved for longer than `M`.
        Stopped = "holder stopped beyond M",
        /// The holder's clock ran wrong by more than `M`.
        ClockWrong = "holder's clock wrong beyond M",
        /// Two store calls in a row were not answered within `R`.
        Unanswered = "two calls in a row unanswered",
        /// Somebody had the row locked for longer than `R`.
        RowLocked = "row locked beyond R",
        /// The database's clock was stepped by more than `G`.
        DbStepped = "database clock stepped beyond G",
        /// A confirmed commit was lost.
        CommitLost = "confirmed commit lost",
        /// The holder was in the last `2R` of its drain, or later.
        Draining = "holder at the end of its drain",
        /// The claim's commit came after its client had given it up, and when its lease had no more than `4R + M` to run: too late to be
        /// seen and given back, at two tries each.
        BornDead = "claim committed as its lease ran out",
        /// The store refused the outcome for good.
        Impossible = "outcome refused for good",
    }
}

/// A set of excuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Excuses(u16);

impl Excuses {
    /// Adds one if it holds.
    pub fn add(&mut self, excuse: Excuse, holds: bool) {
        self.0 |= u16::from(holds) << excuse as u16;
    }

    /// Whether it is among them.
    pub fn has(self, excuse: Excuse) -> bool {
        self.0 >> excuse as u16 & 1 == 1
    }

    /// Whether there is none.
    pub fn none(self) -> bool {
        self.0 == 0
    }

    /// Those in both.
    #[must_use]
    pub fn among(self, some: &[Excuse]) -> Self {
        let mask = some.iter().fold(0, |mask, excuse| mask | 1 << *excuse as u16);
        Self(self.0 & mask)
    }
}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// What happened.
    pub text: String,
    /// When, in true time.
    pub at: Micros,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at t={:.6}s: {}", self.invariant, self.at as f64 / 1e6, self.text)
    }
}

/// Which invariants are checked. Taking one away shows what only it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks(u16);

impl Checks {
    /// All.
    pub const ALL: Self = Self(u16::MAX);

    /// All of these but one.
    #[must_use]
    pub fn without(self, invariant: Invariant) -> Self {
        Self(self.0 & !(1 << invariant as u16))
    }

    /// Whether it is checked.
    pub fn has(self, invariant: Invariant) -> bool {
        self.0 >> invariant as u16 & 1 == 1
    }
}
