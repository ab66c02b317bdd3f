//! Identifiers. Each is a type of its own, so that one can't be passed for another.

use alloc::sync::Arc;
use core::fmt;

use super::time::DbTime;

/// The outbox row of an event (`outbox_events.id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId(pub i64);

/// The fencing token: a number per event that rises at every claim (rule P1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub i64);

impl Token {
    /// The largest one that the table takes.
    pub const BOUND: Self = Self(1 << 62);

    /// What a claim issues at that time, unless the row has had as high a one: the clock's milliseconds. So tokens follow
    /// the order of claims, as far as the clock does.
    pub const fn of(late: DbTime) -> Self {
        Self(late.as_millis())
    }

    /// The one after it.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// One lease as its holder names it. With the holder's [`WorkerId`] it is the guard of rule P2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// The leased row.
    pub row: RowId,
    /// The token that the claim issued.
    pub token: Token,
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.row.0, self.token.0)
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Takes the text as it is.
            pub fn new(text: impl Into<Arc<str>>) -> Self {
                Self(text.into())
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id! {
    /// One start of a worker process (configured name and random suffix). A restart is another worker.
    WorkerId
}
text_id! {
    /// Scheme and authority of the destination as written, in lower case: for fairness only, never for address rules.
    DestinationKey
}
text_id! {
    /// The server's start time and timeline (rule P10), opaque: compared for equality only.
    Incarnation
}

/// One store call of a worker: ties a reply to its question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);
