//! The history: what truly happened, in true time. Plain numbers only.

/// True time in microseconds since the run began.
pub type Micros = u64;

/// A reading of the database's clock in microseconds since the Unix epoch.
pub type DbMicros = i64;

/// What a store call is. Calls of one lane follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Claims.
    Claim,
    /// Looks at what a worker owns. They take turns with claims: both are one lane.
    Owned,
    /// Batched renewals.
    Renew,
    /// Renewals that wait for one row.
    RenewAlone,
    /// Settles.
    Settle,
}

impl Lane {
    /// The number of its lane.
    pub(crate) fn number(self) -> usize {
        match self {
            Self::Claim | Self::Owned => 0,
            Self::Renew => 1,
            Self::RenewAlone => 2,
            Self::Settle => 3,
        }
    }
}

/// The store's answer to a guarded write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Written.
    Applied,
    /// An earlier try of the same settle had landed.
    Ended,
    /// Another owner or token.
    Refused,
    /// Locked by somebody.
    Skipped,
}

/// With what a lease was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Settle {
    /// A success.
    Delivered,
    /// To be tried again after that many microseconds.
    Retry(u64),
    /// Given up, after a try or without one.
    Failed {
        /// Whether an attempt is spent.
        tried: bool,
    },
    /// Given back, due at once or after that many microseconds.
    Release(Option<u64>),
}

/// Why a claim failed an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spent {
    /// Its attempts.
    Attempts,
    /// Its run-outs.
    Reclaims,
    /// The numbers that its columns take.
    Bound,
}

/// What a response asked for in `Retry-After`, as the gateway parsed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RetryAfter {
    /// That many microseconds.
    Delay(u64),
    /// Until a date.
    Date(DbMicros),
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// A status line came.
    Status(u16, Option<RetryAfter>),
    /// Timeout, connection, DNS, TLS.
    Error,
    /// Nothing that can be sent.
    Undeliverable,
    /// The worker closed its socket, or died.
    Closed,
}

/// How a worker went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Down {
    /// Killed.
    Crash,
    /// Killed by the event that it had in hand.
    Poison(u32),
    /// It ended by itself.
    Ended,
}

/// A row's delivery status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not terminal.
    Pending,
    /// Terminal: answered 2xx.
    Delivered,
    /// Terminal: given up.
    Failed,
}

/// One step of the history. `worker` counts starts of worker processes, `event` rows, `call` store calls; all begin at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the fields are named after the words of ARCHITECTURE.md")]
pub enum Fact {
    /// A producer's insert committed.
    EventCommitted {
        event: u32,
        destination: u16,
        attempts: u32,
        max_attempts: u32,
        due: DbMicros,
        poison: bool,
        sendable: bool,
    },
    /// A worker process started; its own clock shows `local` now and gains `ppm`.
    WorkerUp { worker: u32, slot: u16, terms: u16, local: i64, ppm: i32 },
    /// A worker process was stopped (its clock is another matter).
    WorkerStopped { worker: u32 },
    /// It goes on.
    WorkerContinued { worker: u32 },
    /// Its clock shows `local` now and gains `ppm` from here on.
    WorkerClock { worker: u32, local: i64, ppm: i32 },
    /// It is gone; its sockets are closed.
    WorkerDown { worker: u32, how: Down },
    /// It was told to drain.
    DrainBegan { worker: u32 },
    /// A store call was sent.
    CallSent { worker: u32, call: u32, lane: Lane, renews: u32 },
    /// A call's reply, which had arrived at `arrived`, was handled by the worker.
    CallAnswered { worker: u32, call: u32, arrived: Micros },
    /// A call failed or was given up.
    CallFailed { worker: u32, call: u32 },
    /// A claim of a row committed. The statement began at `began` and had the row's lock at `locked`.
    Claimed {
        worker: u32,
        call: u32,
        event: u32,
        token: i64,
        until: DbMicros,
        reclaimed: bool,
        began: Micros,
        locked: Micros,
    },
    /// A claim failed a row.
    ClaimFailed { worker: u32, call: u32, event: u32, why: Spent, began: Micros, locked: Micros },
    /// A renewal of a row was answered, and committed if it was applied.
    Renewed {
        worker: u32,
        call: u32,
        event: u32,
        token: i64,
        answer: Answer,
        until: DbMicros,
        locked: Micros,
    },
    /// A settle of a row was answered, and committed if it was applied. `attempts` and `due` are the row's after it.
    Settled {
        worker: u32,
        call: u32,
        event: u32,
        token: i64,
        settle: Settle,
        answer: Answer,
        attempts: u32,
        due: DbMicros,
        locked: Micros,
    },
    /// The store refused a settle for good.
    SettleImpossible { worker: u32, event: u32, token: i64 },
    /// A transaction that had this row locked since then is over and left it as it was: it was rolled back, or it
    /// was a claim that `left` it.
    LockDropped { event: u32, since: Micros, left: bool },
    /// A driver, told at `asked` to start a request, compared its clock with the lease's fence and lets it start.
    StartAllowed { worker: u32, event: u32, token: i64, asked: Micros },
    /// The first byte of a request.
    RequestOpened { worker: u32, event: u32, token: i64, number: u32 },
    /// The request is open no longer.
    RequestEnded { worker: u32, event: u32, token: i64, end: End },
    /// The worker learnt how the request ended.
    OutcomeKnown { worker: u32, event: u32, token: i64 },
    /// An outside session locked a row.
    RowLocked { event: u32 },
    /// And let go of it.
    RowUnlocked { event: u32 },
    /// The database's clock was stepped.
    DbStepped { by: i64 },
    /// The database went down.
    DbDown,
    /// It is up again; that many confirmed commits are lost. What became of the rows follows.
    DbUp { lost: u32, standby: bool },
    /// A lost commit: the row is as it had been before.
    RowRestored {
        event: u32,
        status: Status,
        attempts: u32,
        due: DbMicros,
        token: i64,
        reclaims: u32,
        owner: Option<u32>,
        until: DbMicros,
    },
    /// A lost commit: the row had not been inserted.
    EventVanished { event: u32 },
    /// A fault of the surroundings began or ended.
    Disturbed { what: u16 },
    /// From here on no new fault.
    Healed,
    /// The store's own count of its rows.
    Census { pending: u32, delivered: u32, failed: u32 },
}
