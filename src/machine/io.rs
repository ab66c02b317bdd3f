//! What goes into the worker machine and what comes out of it: plain data.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use super::id::{DestinationKey, Incarnation, LeaseKey, RequestId, RowId, Token, WorkerId};
use super::row::{Answer, ClaimFailure, ClaimTerms, Settle};
use super::time::{DbTime, Moment};

/// A store call that brought no reply. Only after `Unknown` may it have been applied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StoreFault {
    /// Timed out or the connection broke: it may have been applied, and its commit may still come (rule P7).
    Unknown {
        /// What happened, without secrets: an error code or a short text.
        error: String,
    },
    /// Surely not applied and worth repeating: no connection, serialization, shutdown, read-only.
    NotApplied {
        /// What happened, without secrets.
        error: String,
    },
    /// Repeating the very same call can't help (rule P6): a constraint, a bad value, a missing table.
    Permanent {
        /// What happened, without secrets.
        error: String,
    },
}

impl StoreFault {
    /// The error text.
    pub fn error(&self) -> &str {
        match self {
            Self::Unknown { error } | Self::NotApplied { error } | Self::Permanent { error } => error,
        }
    }
}

impl fmt::Display for StoreFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Unknown { .. } => "outcome unknown",
            Self::NotApplied { .. } => "not applied",
            Self::Permanent { .. } => "refused for good",
        };
        write!(f, "{kind}: {}", self.error())
    }
}

/// A place in the queue: the order in which fresh events fall due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// When they do.
    pub due: DbTime,
    /// Among those that fall due at once.
    pub row: RowId,
}

impl Place {
    /// Ahead of everything that falls due at that time.
    pub const fn ahead_of(due: DbTime) -> Self {
        Self { due, row: RowId(i64::MIN) }
    }

    /// Behind everything that is due by then.
    pub const fn behind(due: DbTime) -> Self {
        Self { due, row: RowId(i64::MAX) }
    }
}

/// One claim (rules P1, P10, P11, P13).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClaimRequest {
    /// Who claims.
    pub owner: WorkerId,
    /// `L`, `G` and limits. `terms.expired` asks for a search for expired leases.
    pub terms: ClaimTerms,
    /// At most this many events, at least 1.
    pub limit: u32,
    /// Expired leases may be taken only if the server still is this incarnation and has been up for `L`.
    pub incarnation: Option<Incarnation>,
    /// How many events on probation may be among them: 0 or 1.
    pub probation: u32,
    /// Per destination key, at most this many, for keys that are not in `shares`.
    pub share: u32,
    /// Room left for destination keys of which leases are held, in the order of the keys; zero means full.
    pub shares: Vec<(DestinationKey, u32)>,
    /// Fresh events ahead of this place are passed over; `None` starts at the beginning of the queue. Where a
    /// transaction that is left open keeps Postgres from forgetting what was claimed, that spares reading all of it each
    /// time.
    pub from: Option<Place>,
    /// A search passes over leases with a lower token, for the same reason; `None` looks at all of them.
    pub leases_from: Option<Token>,
    /// Whether the reply must say if any event is pending at all.
    pub count_pending: bool,
    /// Nothing was found for a while, so that the worker polls slowly from now on, at this interval: the store may wake it
    /// when there is new work ([`Input::Hint`]). What was committed before it says so is found by this very claim.
    pub asleep: Option<Duration>,
}

/// One event that was claimed, as far as the machine needs to know it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The lease.
    pub key: LeaseKey,
    /// The event's destination key.
    pub destination: DestinationKey,
    /// Settled tries so far.
    pub attempts: u32,
    /// The row's limit.
    pub max_attempts: u32,
    /// Run-outs since the last settled try, this one included.
    pub reclaims: u32,
    /// Whether the previous lease ran out unsettled.
    pub reclaimed: bool,
    /// Set if the message can't be sent as it is, and why (an oversized payload, a column that doesn't decode).
    pub unsendable: Option<Unsendable>,
}

/// Why a claimed event has no sendable message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Unsendable {
    /// The payload is larger than `MAX_PAYLOAD`: a failed attempt, since the setting may change.
    Oversized {
        /// Its size in bytes.
        bytes: u64,
    },
    /// The row can't be decoded: fails at once.
    Malformed {
        /// What is wrong with which column; no payload.
        error: String,
    },
}

/// The reply to a claim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClaimReply {
    /// The database's late clock.
    pub db_now: DbTime,
    /// The server's incarnation.
    pub incarnation: Incarnation,
    /// Whether expired leases were searched for (asked for, and allowed by rule P10).
    pub searched_expired: bool,
    /// What was granted, in claim order.
    pub grants: Vec<Grant>,
    /// Events that the claim failed, with their ids.
    pub failed: Vec<(RowId, ClaimFailure)>,
    /// The front of the queue as this claim leaves it: the first fresh event from [`ClaimRequest::from`] on that was due
    /// when it began and that it did not take, whoever had it locked; else behind all that was due. `None` if the store
    /// has no use for a place to start from.
    pub front: Option<Place>,
    /// If expired leases were searched for, the lowest token of a lease from [`ClaimRequest::leases_from`] on, expired or
    /// not, when the claim began; else the highest token that there is. `None` if the store has no use for it.
    pub leases_front: Option<Token>,
    /// Time until the next unleased event is due, if the store knows one and nothing more is due now. Zero if more is, or
    /// may be, and was not come to.
    pub next_due_in: Option<Duration>,
    /// Whether any event is pending at all, leased ones included; `None` if not asked for.
    pub any_pending: Option<bool>,
}

/// One renewal (rule P5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RenewRequest {
    /// Who renews.
    pub owner: WorkerId,
    /// `L`.
    pub lease: Duration,
    /// At most 1,000 leases, in row order.
    pub keys: Vec<LeaseKey>,
    /// Wait for row locks instead of skipping locked rows; only ever with one key.
    pub wait: bool,
}

/// The reply to a renewal: one answer a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RenewReply {
    /// The database's late clock.
    pub db_now: DbTime,
    /// One answer for each key of the request, in any order.
    pub answers: Vec<(LeaseKey, Answer)>,
}

/// One batch of outcomes (rule P6).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SettleRequest {
    /// Who settles.
    pub owner: WorkerId,
    /// At most 1,000 outcomes, in row order.
    pub entries: Vec<(LeaseKey, Settle)>,
}

/// The reply to a batch of outcomes: one answer a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SettleReply {
    /// The database's late clock.
    pub db_now: DbTime,
    /// One answer for each key of the request, in any order.
    pub answers: Vec<(LeaseKey, Answer)>,
}

/// Asks for what the store shows under an owner (rule P7).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OwnedRequest {
    /// Whose leases.
    pub owner: WorkerId,
}

/// The leases that the store shows under the owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OwnedReply {
    /// The database's late clock.
    pub db_now: DbTime,
    /// In any order.
    pub keys: Vec<LeaseKey>,
}

/// How a request ended, mapped by the gateway. What it means is decided by the machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AttemptResult {
    /// A status line came.
    Responded {
        /// The status.
        status: u16,
        /// `Retry-After`, if the response had one that parses.
        retry_after: Option<RetryAfter>,
    },
    /// No status line: timeout, connection, DNS, TLS, forbidden address.
    Errored {
        /// For `last_error`: what failed, cleaned; no secret, no payload.
        error: String,
    },
    /// No setting and no later answer can change that this can't be sent (URL that doesn't parse, scheme other than
    /// http and https, user info): no attempt was made.
    Undeliverable {
        /// For `last_error`, cleaned.
        error: String,
    },
}

/// A parsed `Retry-After` (RFC 9110, section 10.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RetryAfter {
    /// Delay seconds, or a date taken relative to the response's own `Date`.
    Delay(Duration),
    /// A date in a response without `Date`: relative to the database's time as carried forward.
    Date(DbTime),
}

/// What the worker machine is told. A reply names the request that it answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// A timer, due or spurious.
    Wake,
    /// There may be new work.
    Hint,
    /// A claim's reply.
    Claimed {
        /// The question.
        request: RequestId,
        /// The answer.
        reply: Result<ClaimReply, StoreFault>,
    },
    /// A renewal's reply.
    Renewed {
        /// The question.
        request: RequestId,
        /// The answer.
        reply: Result<RenewReply, StoreFault>,
    },
    /// A settle's reply.
    Settled {
        /// The question.
        request: RequestId,
        /// The answer.
        reply: Result<SettleReply, StoreFault>,
    },
    /// The reply to [`Action::Owned`].
    Owned {
        /// The question.
        request: RequestId,
        /// The answer.
        reply: Result<OwnedReply, StoreFault>,
    },
    /// A request ended by itself.
    Attempted {
        /// Under which lease.
        key: LeaseKey,
        /// How.
        result: AttemptResult,
    },
    /// A request was not started, or was aborted and its socket is closed.
    Aborted {
        /// Under which lease.
        key: LeaseKey,
    },
    /// SIGTERM or its like: drain (rule P8).
    Shutdown,
}

/// What the worker machine wants done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Ask the outbox for events.
    Claim(RequestId, ClaimRequest),
    /// Extend leases.
    Renew(RequestId, RenewRequest),
    /// End leases.
    Settle(RequestId, SettleRequest),
    /// List what the store shows under this worker.
    Owned(RequestId, OwnedRequest),
    /// Start a request. To be answered by `Attempted` or `Aborted`.
    Send {
        /// Under which lease.
        key: LeaseKey,
        /// 1-based number of the attempt.
        number: u32,
        /// Unix seconds for `webhook-timestamp`.
        timestamp: i64,
        /// Must not be started at or after this moment (rule P4): the world may have stopped since. Renewals move it on, see
        /// [`Worker::start_before`](super::Worker::start_before).
        start_before: Moment,
    },
    /// Abort an open request. To be answered by `Aborted`, or by `Attempted` if it was done already.
    Abort {
        /// Under which lease.
        key: LeaseKey,
    },
    /// Forget what was kept for a lease (its message): the machine holds it no longer.
    Forget {
        /// Which lease.
        key: LeaseKey,
    },
}

/// Which store call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoreCall {
    /// [`Action::Claim`].
    Claim,
    /// [`Action::Renew`].
    Renew,
    /// [`Action::Settle`].
    Settle,
    /// [`Action::Owned`].
    Owned,
}

/// Why a lease's heartbeat ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HeartbeatEnd {
    /// Its outcome was settled.
    Settled,
    /// It was refused: somebody else has had the event since.
    Lost,
    /// It was fenced and given back.
    Fenced,
    /// It was released by the drain.
    Drained,
    /// The store refuses its outcome for good, or the drain's timeout came: the lease runs out by itself.
    Abandoned,
}

/// What a settle was about, without its texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SettleKind {
    /// `delivered`.
    Delivered,
    /// `retry`.
    Retry,
    /// `failed`.
    Failed,
    /// A release.
    Release,
}

impl From<&Settle> for SettleKind {
    fn from(settle: &Settle) -> Self {
        match settle {
            Settle::Delivered { .. } => Self::Delivered,
            Settle::Retry { .. } => Self::Retry,
            Settle::Failed { .. } => Self::Failed,
            Settle::Release { .. } => Self::Release,
        }
    }
}

/// What became of one claim's events: the one log line a cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CycleSummary {
    /// Events granted.
    pub claimed: u32,
    /// Of these, taken after a run-out.
    pub reclaimed: u32,
    /// Events that the claim itself failed.
    pub failed_by_claim: u32,
    /// Settled `delivered`.
    pub delivered: u32,
    /// Settled `retry`.
    pub retried: u32,
    /// Settled `failed`.
    pub failed: u32,
    /// Released untried.
    pub released: u32,
    /// Lost, or abandoned to run out.
    pub lost: u32,
    /// From sending the claim until the last event was settled or lost.
    pub took: Duration,
}

/// Why no expired lease is taken for one `L` (rule P10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EmbargoCause {
    /// Store calls had failed for `H` or longer.
    Outage,
    /// The server is another incarnation than the one known.
    NewIncarnation,
}

/// What is worth logging or counting. Dropping observations changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Observation {
    /// A cycle with at least one event ended.
    Cycle(CycleSummary),
    /// A store call brought no reply.
    StoreCallFailed {
        /// Which.
        call: StoreCall,
        /// Why.
        fault: StoreFault,
        /// The leases that it was about, if it names any.
        keys: Vec<LeaseKey>,
    },
    /// Store calls work again after failures.
    StoreRecovered {
        /// From the first failed call until now.
        after: Duration,
    },
    /// A lease is held no longer.
    HeartbeatEnded {
        /// Which.
        key: LeaseKey,
        /// Why.
        why: HeartbeatEnd,
    },
    /// A lease passed its local deadline less the margin unrenewed.
    Fenced {
        /// Which.
        key: LeaseKey,
        /// Whether a request was open.
        open: bool,
    },
    /// The database's clock ran ahead of the worker's own: every lease is fenced (rule P4).
    ClockRanAhead {
        /// By how much more than the round trip.
        by: Duration,
    },
    /// An outcome was settled.
    Settled {
        /// Which lease.
        key: LeaseKey,
        /// With what.
        kind: SettleKind,
        /// The status, if there was a response.
        status: Option<u16>,
        /// `ended` instead of `applied`: an earlier try had landed.
        repeated: bool,
    },
    /// A settle was refused; with `Delivered`, the event goes out again (rule P9).
    SettleRefused {
        /// Which lease.
        key: LeaseKey,
        /// With what.
        kind: SettleKind,
    },
    /// The store refuses this one outcome for good; its lease runs out by itself (rule P6).
    SettleAbandoned {
        /// Which lease.
        key: LeaseKey,
        /// Why.
        error: String,
    },
    /// The claim failed an event (rules P1, P11).
    FailedByClaim {
        /// Which.
        row: RowId,
        /// Why.
        why: ClaimFailure,
    },
    /// An event on probation was taken (rule P11).
    Probation {
        /// Its lease.
        key: LeaseKey,
        /// Its run-outs.
        reclaims: u32,
    },
    /// What an unknown claim left under this worker is released (rule P7).
    OrphanReleased {
        /// Its lease.
        key: LeaseKey,
    },
    /// No expired lease is taken for one `L`.
    Embargo(EmbargoCause),
    /// The drain began.
    DrainBegan {
        /// Leases held.
        leased: u32,
        /// Of these, with an open request.
        open: u32,
    },
    /// The drain's timeout came first: these outcomes are unsettled.
    DrainUnsettled {
        /// Their leases.
        keys: Vec<LeaseKey>,
    },
    /// An input that answers nothing that was asked: refused, nothing changed.
    Unexpected {
        /// What it was.
        what: &'static str,
    },
    /// The worker's own clock went backwards; the latest moment seen counts.
    ClockWentBack {
        /// By how much.
        by: Duration,
    },
}
