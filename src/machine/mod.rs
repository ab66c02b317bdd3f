//! The pure machine: every decision about leases and retries, without I/O, clock or ambient randomness.

mod id;
mod io;
mod retry;
mod row;
mod settings;
mod time;
mod worker;

pub use id::{DestinationKey, Incarnation, LeaseKey, RequestId, RowId, Token, WorkerId};
pub use io::{
    Action, AttemptResult, ClaimReply, ClaimRequest, CycleSummary, EmbargoCause, Grant, HeartbeatEnd, Input,
    Observation, OwnedReply, OwnedRequest, RenewReply, RenewRequest, RetryAfter, SettleKind, SettleReply,
    SettleRequest, StoreCall, StoreFault, Unsendable,
};
pub use retry::{Judged, Verdict};
pub use row::{
    Answer, ClaimAnswer, ClaimFailure, ClaimTerms, Lease, PROBATION_RECLAIMS, Row, Settle, Status,
};
pub use settings::{LimitError, Limits, RawTiming, RetryPolicy, Timing, TimingError, WorkerSettings};
pub use time::{DbClock, DbTime, Moment};
pub use worker::{Ended, Worker};
