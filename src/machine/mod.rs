//! The pure machine: every decision about leases and retries, and no I/O, clock or ambient randomness.
//!
//! Two machines whose relation is the promise. [`Row`] is the outbox's side: what one event does under claim, renew and
//! settle; it is the specification of the SQL. [`Worker`] is one process's side: what it believes and does. They share
//! no state, only requests and replies ([`Action`], [`Input`]).
//!
//! What is deliberately absent: clocks (every input comes with its [`Moment`], every statement with its [`DbClock`]),
//! randomness but ChaCha from a given seed, floats, unordered maps, async, logging (what is worth logging is returned
//! as [`Observation`]). `cargo check --no-default-features` builds this module alone, without `std`.
#![deny(clippy::disallowed_methods, clippy::disallowed_types, clippy::float_arithmetic, clippy::unwrap_used)]
#![deny(clippy::expect_used, clippy::panic, clippy::wildcard_imports)]

mod id;
mod io;
#[cfg(feature = "planted-bugs")]
mod planted;
mod retry;
mod row;
mod settings;
mod time;
mod worker;

pub use id::{DestinationKey, Incarnation, LeaseKey, RequestId, RowId, Token, WorkerId};
pub use io::{
    Action, AttemptResult, ClaimReply, ClaimRequest, CycleSummary, EmbargoCause, Grant, HeartbeatEnd, Input,
    Observation, OwnedReply, OwnedRequest, Place, RenewReply, RenewRequest, RetryAfter, SettleKind,
    SettleReply, SettleRequest, StoreCall, StoreFault, Unsendable,
};
#[cfg(feature = "planted-bugs")]
pub use planted::Planted;
pub use retry::{Judged, Verdict};
pub use row::{
    Answer, ClaimAnswer, ClaimFailure, ClaimTerms, Lease, PROBATION_RECLAIMS, Row, Settle, Status,
};
pub use settings::{LimitError, Limits, RawTiming, RetryPolicy, Timing, TimingError, WorkerSettings};
pub use time::{DbClock, DbTime, Moment};
pub use worker::{Ended, Worker};
