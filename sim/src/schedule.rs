//! A schedule: everything that happens to a run, as data. A run is a pure function of its schedule.
//!
//! All times are microseconds of true time since the run began.

use std::fmt;
use std::str::FromStr;

use leasehold::machine::{Limits, RawTiming, RetryPolicy, Timing, Unsendable, WorkerSettings};
use serde::{Deserialize, Serialize};
use sim_oracle::{Fact, Terms};
use std::collections::BTreeSet;
use std::time::Duration;

use crate::rng::Rng;

/// What kind of trouble a seed is looking for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// No fault.
    Calm,
    /// One fault.
    OneFault,
    /// A random subset of fault classes at random rates.
    Swarm,
    /// Everything at once.
    Storm,
    /// Clocks that are wrong.
    Clock,
    /// A database that goes away, comes back and forgets.
    Failover,
    /// Destinations that are slow or odd.
    SlowEndpoints,
    /// Drains and rolling restarts.
    Deploy,
    /// A core is healed, the rest stays broken.
    Liveness,
    /// An event that kills its worker, among innocent ones.
    Poison,
    /// Settings at the edge of what is allowed, and a store that is as slow as they allow.
    Edge,
    /// One pattern of faults that is aimed at one rule.
    Aimed,
    /// More leases held at a time than one statement renews.
    Crowd,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Calm,
        Self::OneFault,
        Self::Swarm,
        Self::Storm,
        Self::Clock,
        Self::Failover,
        Self::SlowEndpoints,
        Self::Deploy,
        Self::Liveness,
        Self::Poison,
        Self::Edge,
        Self::Aimed,
        Self::Crowd,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::OneFault => "one-fault",
            Self::Swarm => "swarm",
            Self::Storm => "storm",
            Self::Clock => "clock",
            Self::Failover => "failover",
            Self::SlowEndpoints => "slow-endpoints",
            Self::Deploy => "deploy",
            Self::Liveness => "liveness",
            Self::Poison => "poison",
            Self::Edge => "edge",
            Self::Aimed => "aimed",
            Self::Crowd => "crowd",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|profile| profile.name() == text);
        named.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|profile| profile.name()).collect();
            format!("no profile is called {text:?}; there are {}", names.join(", "))
        })
    }
}

/// A worker's settings as plain numbers of microseconds and counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after the settings in ARCHITECTURE.md")]
pub struct Settings {
    pub lease: u64,
    pub heartbeat: u64,
    pub store_timeout: u64,
    pub fence_margin: u64,
    pub reclaim_grace: u64,
    pub max_in_flight: u32,
    pub max_in_flight_per_destination: u32,
    pub max_leased: u32,
    pub claim_batch: u32,
    pub poll_interval: u64,
    pub eager_poll: u64,
    pub drain_timeout: u64,
    pub request_timeout: u64,
    pub reclaim_limit: u32,
    pub retry_initial: u64,
    pub retry_max: u64,
    pub retry_jitter_bps: u16,
    pub retry_budget: u32,
    pub retry_after_max: u64,
    pub fail_status: u16,
    #[serde(default)]
    pub until_empty: bool,
}

impl Settings {
    /// As the machine wants them.
    ///
    /// # Errors
    /// What the machine refuses.
    pub fn worker(&self, seed: u64) -> Result<WorkerSettings, String> {
        let us = Duration::from_micros;
        let timing = Timing::parse(RawTiming {
            lease: us(self.lease),
            heartbeat: Some(us(self.heartbeat)),
            store_timeout: Some(us(self.store_timeout)),
            fence_margin: Some(us(self.fence_margin)),
            reclaim_grace: Some(us(self.reclaim_grace)),
        })
        .map_err(|errors| format!("{errors:?}"))?;
        let limits = Limits {
            max_in_flight: self.max_in_flight,
            max_in_flight_per_destination: self.max_in_flight_per_destination,
            max_leased: self.max_leased,
            claim_batch: self.claim_batch,
            poll_interval: us(self.poll_interval),
            drain_timeout: us(self.drain_timeout),
            reclaim_limit: self.reclaim_limit,
        };
        let retry = RetryPolicy {
            initial: us(self.retry_initial),
            max: us(self.retry_max),
            jitter_bps: self.retry_jitter_bps,
            budget: self.retry_budget,
            retry_after_max: us(self.retry_after_max),
            fail_statuses: BTreeSet::from_iter((self.fail_status > 0).then_some(self.fail_status)),
        };
        let mut settings =
            WorkerSettings::parse(timing, limits, retry, seed).map_err(|errors| format!("{errors:?}"))?;
        settings.eager_poll = us(self.eager_poll);
        settings.until_empty = self.until_empty;
        Ok(settings)
    }

    /// As the oracle wants them.
    pub fn terms(&self) -> Terms {
        Terms {
            lease: self.lease,
            heartbeat: self.heartbeat,
            store_timeout: self.store_timeout,
            fence_margin: self.fence_margin,
            reclaim_grace: self.reclaim_grace,
            max_in_flight: self.max_in_flight,
            max_in_flight_per_destination: self.max_in_flight_per_destination,
            max_leased: self.max_leased,
            claim_batch: self.claim_batch,
            poll_interval: self.poll_interval,
            drain_timeout: self.drain_timeout,
            request_timeout: self.request_timeout,
            reclaim_limit: self.reclaim_limit,
            retry_initial: self.retry_initial,
            retry_max: self.retry_max,
            retry_jitter_bps: u32::from(self.retry_jitter_bps),
            retry_budget: self.retry_budget,
            retry_after_max: self.retry_after_max,
            fail_status: self.fail_status,
        }
    }
}

/// One place in which a worker process runs, and is restarted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Which of the schedule's settings.
    pub settings: usize,
    /// When its first process starts.
    pub starts: u64,
    /// What its clock shows then.
    pub clock: u64,
    /// What its clock gains.
    pub ppm: i32,
}

/// How a destination treats a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Manner {
    /// Answers 200 after a time within both bounds.
    Ok(u64, u64),
    /// Answers with a status, soon.
    Status(u16),
    /// Answers with a status and `Retry-After`.
    RetryAfter(u16, Asked),
    /// Takes the request and never answers.
    Hang,
    /// Resets the connection before processing.
    ResetBefore,
    /// Processes, then resets the connection.
    ResetAfter,
    /// Processes, and answers when the client has given up.
    TooLate,
    /// Can't be sent to at all.
    Undeliverable,
}

/// What a `Retry-After` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// A delay.
    Delay(u64),
    /// A date so far from now.
    Date(i64),
    /// Something that doesn't parse.
    Garbage,
}

/// A destination: its manners by weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// Manners and how often each is drawn.
    pub manners: Vec<(u32, Manner)>,
}

impl Destination {
    /// Draws how it treats a request.
    pub fn draw(&self, draws: &mut Rng) -> Manner {
        let total: u32 = self.manners.iter().map(|(weight, _)| weight).sum();
        let mut draw = draws.below(u64::from(total.max(1))) as u32;
        let drawn = self.manners.iter().find(|(weight, _)| {
            let hit = draw < *weight;
            draw = draw.saturating_sub(*weight);
            hit
        });
        drawn.map_or(Manner::Ok(1_000, 5_000), |(_, manner)| *manner)
    }
}

/// What is to be sent of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Payload {
    /// A few bytes.
    #[default]
    Small,
    /// So many bytes.
    Bytes(u64),
    /// A row that doesn't decode.
    Malformed,
}

impl Payload {
    /// The largest that is sent (`MAX_PAYLOAD`).
    pub const MAX: u64 = 1 << 20;

    /// How much of it a claim brings.
    pub const fn brought(self) -> u64 {
        match self {
            Self::Bytes(bytes) if bytes <= Self::MAX => bytes,
            Self::Small | Self::Bytes(_) | Self::Malformed => 0,
        }
    }

    /// Why it can't be sent.
    pub fn unsendable(self) -> Option<Unsendable> {
        match self {
            Self::Bytes(bytes) if bytes > Self::MAX => Some(Unsendable::Oversized { bytes }),
            Self::Small | Self::Bytes(_) => None,
            Self::Malformed => Some(Unsendable::Malformed { error: String::new() }),
        }
    }
}

/// One event that a producer commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventPlan {
    /// When.
    pub at: u64,
    /// To which destination.
    pub destination: u16,
    /// The row's limit.
    pub max_attempts: u32,
    /// How long after that it is due.
    pub delay: u64,
    /// How long before `at` its transaction had begun: it falls due that much earlier than it is seen.
    #[serde(default)]
    pub late: u64,
    /// The row's settled tries: more than none if it is moved in from an older table.
    pub attempts: u32,
    /// How many requests for it kill their worker.
    pub kills: u32,
    /// The store refuses every settle of it but releases.
    pub cursed: bool,
    /// What is to be sent.
    #[serde(default)]
    pub payload: Payload,
}

impl EventPlan {
    /// The fact that it is committed as this event, and due then.
    pub fn committed(&self, event: u32, due: i64) -> Fact {
        Fact::EventCommitted {
            event,
            destination: self.destination,
            attempts: self.attempts,
            max_attempts: self.max_attempts,
            due,
            poison: self.kills > 0 || self.cursed,
            sendable: self.payload.unsendable().is_none(),
        }
    }
}

/// Message delays and the store's pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Shortest and longest one-way delay to the store.
    pub network: (u64, u64),
    /// Shortest and longest time from a statement's lock to its commit.
    pub commit: (u64, u64),
    /// Longest time to connect to a destination.
    pub connect: u64,
    /// Longest time to close a socket.
    pub close: u64,
    /// Whether a commit of a producer wakes the workers. Some notifications are lost.
    #[serde(default)]
    pub hints: bool,
}

/// Which way a cut link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cut {
    /// Calls don't arrive.
    ToStore,
    /// Replies don't arrive.
    FromStore,
    /// Neither.
    Both,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The process dies and is started again after the fault's duration.
    Crash(usize),
    /// The same, in the middle of what it does next: after so many effects.
    CrashAmid(usize, u32),
    /// The same, after an answer came and before its settle is sent.
    CrashOnAnswer(usize),
    /// The process is stopped; its clock goes on.
    Pause(usize),
    /// The same, at its next request: between the machine's decision and the driver's look at its clock (`true`), or
    /// between that look and the first byte.
    PauseAtSend(usize, bool),
    /// The machine is suspended and the worker's clock stands still.
    Suspend(usize),
    /// The process gets the processor for the first number of microseconds, then not for the second, and so on.
    Starve(usize, u64, u64),
    /// The worker's clock is stepped.
    ClockStep(usize, i64),
    /// The worker's clock gains so much.
    Drift(usize, i32),
    /// The worker's link to the store is cut.
    Partition(usize, Cut),
    /// So many of 65536 messages to or from the store are lost.
    Loss(u32),
    /// So many of 65536 renewals and settles arrive twice, and so many replies.
    Duplicate(u32),
    /// So many of 65536 replies are lost after the commit.
    LostReply(u32),
    /// So many of 65536 statements commit that much late.
    LateCommit(u32, u64),
    /// So many of 65536 statements are rolled back.
    Abort(u32),
    /// Every message takes that much longer, at most.
    Delay(u64),
    /// So many of 65536 calls to the store arrive that much later, whether or not somebody still waits for them.
    LateCall(u32, u64),
    /// Every statement waits that long, at most, between its start and its locks.
    Stall(u64),
    /// Every row of a claim or a settle takes that long.
    Weight(u64),
    /// An outside session locks the row of an event.
    LockRow(u32),
    /// The database's clock is stepped.
    DbStep(i64),
    /// The database is down.
    Restart,
    /// The database is down, has lost the commits of the last so many microseconds, and its clock is stepped.
    Failover(u64, i64),
    /// The database refuses writes.
    ReadOnly,
    /// A destination has these manners.
    Manner(u16, Manner),
    /// The worker is told to drain; it is started again after the fault's duration.
    Drain(usize),
}

/// A fault at its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timed {
    /// When it begins.
    pub at: u64,
    /// How long it lasts; `u64::MAX` is for ever.
    pub lasts: u64,
    /// What it is.
    pub fault: Fault,
}

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// Keys the fine draws of the run, such as delays.
    pub seed: u64,
    /// From which profile it was made.
    pub profile: Profile,
    /// Settings that slots refer to.
    pub settings: Vec<Settings>,
    /// Workers.
    pub slots: Vec<Slot>,
    /// Destinations.
    pub destinations: Vec<Destination>,
    /// Events, in order of time.
    pub events: Vec<EventPlan>,
    /// Delays.
    pub pace: Pace,
    /// Faults, in order of time.
    pub faults: Vec<Timed>,
    /// From when on nothing new goes wrong.
    pub heal_at: u64,
}

impl Schedule {
    /// When every event must be terminal: the bound counted from the last disturbance.
    pub fn converge_by(&self) -> u64 {
        let attempts = self.events.iter().map(|event| event.max_attempts).max().unwrap_or(0);
        let kills = self.events.iter().filter(|event| event.kills > 0 || event.cursed).count() as u32;
        let bounds = self.settings.iter().map(|settings| {
            settings.terms().convergence_bound(self.events.len() as u32, attempts, kills, RESTART_AFTER_KILL)
        });
        let quiet =
            self.events.iter().map(|event| event.at + event.delay).max().unwrap_or(0).max(self.heal_at);
        // Each event is claimed and settled once a try, one by one at the worst, and every other call is for nothing.
        let slow = self.row_takes() * self.events.len() as u64 * u64::from(attempts.max(1)) * 8;
        quiet + bounds.max().unwrap_or(0) + slow
    }

    /// How long the store takes for each row, at the most.
    pub fn row_takes(&self) -> u64 {
        let weight = |timed: &Timed| if let Fault::Weight(row) = timed.fault { row } else { 0 };
        self.faults.iter().map(weight).max().unwrap_or(0)
    }

    /// Whether every worker always has room for every event, and a claim for all their payloads.
    pub fn roomy(&self) -> bool {
        let events = self.events.len() as u32;
        let bytes: u64 = self.events.iter().map(|event| event.payload.brought()).sum();
        bytes <= crate::store::MOST_BYTES
            && self.settings.iter().all(|settings| {
                settings.max_in_flight >= events
                    && settings.max_in_flight_per_destination >= events
                    && settings.max_leased >= 2 * events
                    && settings.claim_batch >= 2 * events
            })
    }
}

/// How long a slot stays down after an event killed its process.
pub const RESTART_AFTER_KILL: u64 = 500_000;

/// A file of the corpus: a schedule that once broke a promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// What it broke.
    pub found: String,
    /// The planted bug that is the same mistake, with which it must still break it.
    pub bug: Option<String>,
    /// The schedule.
    pub schedule: Schedule,
}
