//! The worker machine: one worker's decisions about claiming, sending, renewing, fencing, settling and draining.
//!
//! ```text
//!             Claimed            Send            Attempted                applied, ended
//!   (outbox) --------> Queued ---------> Open --------------> Outcome ------------------> (settled)
//!      |               ^  | fence, drain  | fence, drain, lost   ^  |      refused
//!      | an older      |  |               v                      |  +-------------------> (lost)
//!      | lease of it   |  |            Aborting --- Aborted -----+
//!      v is held       |  +-------------- release ---------------+
//!    Behind -----------+                                         |
//!      +------------------------ release ------------------------+
//! ```
//! One way in ([`Worker::handle`]), three ways out (actions, observations, the next wake-up). Every input first checks
//! fences (rule P4), so that a process that was stopped and continued can't act on a dead lease. Inputs that answer
//! nothing that was asked are refused with an observation and change nothing; none panics.

/// Whether a mistake is planted: never, unless the feature is on.
macro_rules! planted {
    ($worker:expr, $bug:ident) => {{
        #[cfg(feature = "planted-bugs")]
        let planted = $worker.settings.planted == Some(crate::machine::Planted::$bug);
        #[cfg(not(feature = "planted-bugs"))]
        let planted = false;
        planted
    }};
}

mod claims;
mod drain;
mod front;
mod invariants;
mod looks;
mod portion;
mod renewals;
mod sends;
mod settles;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use super::id::{DestinationKey, Incarnation, LeaseKey, RequestId, RowId, Token, WorkerId};
use super::io::{Action, CycleSummary, HeartbeatEnd, Input, Observation, SettleKind, StoreCall, StoreFault};
use super::row::Settle;
use super::settings::{Timing, WorkerSettings};
use super::time::{Age, DbTime, Moment};

/// Leases in one statement at most (rule P5).
const STATEMENT_MAX: usize = 1_000;

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ended {
    /// Requests that the drain had to abort.
    pub aborted: u32,
    /// Leases that were not settled when the drain's timeout came.
    pub unsettled: u32,
}

/// Why an open request is being aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Aborting {
    Fenced,
    Lost,
    Drained,
}

/// What is to be written for a lease. The delay of a retry or release is fixed as the moment at which it ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Outcome {
    Delivered { status: u16 },
    Retry { due: Moment, error: String, status: Option<u16> },
    Failed { error: String, status: Option<u16>, tried: bool },
    Release { due: Option<Moment>, why: HeartbeatEnd },
}

impl Outcome {
    /// The settle as it is to be sent now: a delay shrinks by what has passed of it.
    fn settle(&self, now: Moment) -> Settle {
        match self {
            Self::Delivered { status } => Settle::Delivered { status: *status },
            Self::Retry { due, error, status } => {
                Settle::Retry { delay: due.since(now), error: error.clone(), status: *status }
            }
            Self::Failed { error, status, tried } => {
                Settle::Failed { error: error.clone(), status: *status, tried: *tried }
            }
            Self::Release { due, .. } => Settle::Release { delay: due.map(|due| due.since(now)) },
        }
    }

    fn kind(&self) -> SettleKind {
        match self {
            Self::Delivered { .. } => SettleKind::Delivered,
            Self::Retry { .. } => SettleKind::Retry,
            Self::Failed { .. } => SettleKind::Failed,
            Self::Release { .. } => SettleKind::Release,
        }
    }

    fn status(&self) -> Option<u16> {
        match self {
            Self::Delivered { status } => Some(*status),
            Self::Retry { status, .. } | Self::Failed { status, .. } => *status,
            Self::Release { .. } => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Waits for its turn; `seq` is its place in the destination's queue.
    Queued { seq: u64 },
    /// Waits until an older lease of the same row is gone (rule P4: one event, one request).
    Behind,
    /// Its request is open.
    Open,
    /// Its abort is not yet confirmed.
    Aborting(Aborting),
    /// Its outcome is to be settled.
    Outcome(Outcome),
}

/// Whether and how a lease is renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Heartbeat {
    /// In the batched statements.
    Batched,
    /// Its row was locked when a batch came to it, the last time at that moment. It stays in the batches, and stands in
    /// line for a waiting statement of its own.
    Locked { skipped: Moment },
    /// Not any more (lost, abandoned) or never (an orphan).
    Off,
}

/// One lease as this worker believes in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Held {
    /// The claim that granted it; an orphan has none.
    cycle: Option<RequestId>,
    destination: Option<DestinationKey>,
    attempts: u32,
    max_attempts: u32,
    reclaims: u32,
    /// When the last confirmed claim or renewal was sent: the lease lasts until `L` after that (rule P3).
    confirmed: Moment,
    heartbeat: Heartbeat,
    phase: Phase,
}

/// A destination key of which leases are held (rule P13).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Destination {
    held: u32,
    /// How many the claim granted whose reply is being taken.
    granted: u32,
    open: u32,
    queue: BTreeSet<(u64, LeaseKey)>,
    /// Whether it stands in the ring of those that may send.
    in_ring: bool,
    /// Whether its share, not the outbox, limited the last claim.
    hungry: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Cycle {
    sent: Moment,
    outstanding: u32,
    summary: CycleSummary,
}

/// The database's clock as last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct DbReading {
    sent: Moment,
    received: Moment,
    db: DbTime,
}

/// One worker's decisions. See the module's documentation for the contract.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    id: WorkerId,
    settings: WorkerSettings,
    now: Moment,
    last_request: u64,
    last_seq: u64,
    actions: VecDeque<Action>,
    observations: VecDeque<Observation>,

    leases: BTreeMap<LeaseKey, Held>,
    cycles: BTreeMap<RequestId, Cycle>,
    destinations: BTreeMap<DestinationKey, Destination>,
    ring: VecDeque<DestinationKey>,
    open: u32,
    queued: u32,
    probation: u32,

    /// Batched heartbeats by last confirmed send.
    heartbeats: BTreeSet<(Moment, LeaseKey)>,
    /// Heartbeats of locked rows by the moment at which a batch last skipped them.
    locked: BTreeSet<(Moment, LeaseKey)>,
    /// Leases that a fence would stop (queued, behind or open), by last confirmed send.
    fences: BTreeSet<(Moment, LeaseKey)>,
    renewals: renewals::Renewals,
    settles: settles::Settles,
    claims: claims::Claims,
    looks: looks::Looks,
    drain: Option<drain::Drain>,

    db: Option<DbReading>,
    /// When the first of the calls was sent that have failed since the store answered.
    failing_since: Option<Moment>,
    incarnation: Option<Incarnation>,
    ended: Option<Ended>,
}

impl Worker {
    /// A worker that has just started, at `now` by its own clock.
    pub fn new(id: WorkerId, settings: WorkerSettings, now: Moment) -> Self {
        Self {
            id,
            settings,
            now,
            last_request: 0,
            last_seq: 0,
            actions: VecDeque::new(),
            observations: VecDeque::new(),
            leases: BTreeMap::new(),
            cycles: BTreeMap::new(),
            destinations: BTreeMap::new(),
            ring: VecDeque::new(),
            open: 0,
            queued: 0,
            probation: 0,
            heartbeats: BTreeSet::new(),
            locked: BTreeSet::new(),
            fences: BTreeSet::new(),
            renewals: renewals::Renewals::default(),
            settles: settles::Settles::default(),
            claims: claims::Claims::new(now),
            looks: looks::Looks::default(),
            drain: None,
            db: None,
            failing_since: None,
            incarnation: None,
            ended: None,
        }
    }

    /// Takes one input at the moment at which it is handled. Never fails: impossible inputs become observations. A
    /// spurious [`Input::Wake`] changes nothing.
    pub fn handle(&mut self, now: Moment, input: Input) {
        if now < self.now {
            self.observe(Observation::ClockWentBack { by: self.now.since(now) });
        }
        self.now = self.now.max(now);
        if self.ended.is_some() {
            return;
        }
        self.check_fences();
        match input {
            Input::Wake => {}
            Input::Hint => self.hint(),
            Input::Claimed { request, reply } => self.claimed(request, reply),
            Input::Renewed { request, reply } => self.renewed(request, reply),
            Input::Settled { request, reply } => self.settled(request, reply),
            Input::Owned { request, reply } => self.owned(request, reply),
            Input::Attempted { key, result } => self.attempted(key, result),
            Input::Aborted { key } => self.aborted(key),
            Input::Shutdown => self.shutdown(),
        }
        self.advance_drain();
        self.start_renewals();
        self.start_settle();
        self.start_sends();
        self.start_look();
        self.start_claim();
        self.finish_drain();
    }

    /// The next thing to do; call until `None` after each [`Self::handle`].
    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The next thing worth logging or counting. Dropping it changes nothing.
    #[must_use]
    pub fn poll_observation(&mut self) -> Option<Observation> {
        self.observations.pop_front()
    }

    /// When to call [`Self::handle`] with [`Input::Wake`] at the latest. May change with every `handle`; calls before
    /// it are harmless. Never further away than `M/2` while leases are held (rule P4).
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Moment> {
        if self.ended.is_some() {
            return None;
        }
        let watch = if self.leases.is_empty() { Moment::NEVER } else { self.now.aged(self.timing().watch()) };
        let fence = match self.fences.first() {
            Some((confirmed, _)) if !planted!(self, FenceNever) => self.fence_at(*confirmed),
            _ => Moment::NEVER,
        };
        let due = watch
            .min(fence)
            .min(self.renewal_due_at())
            .min(self.alone_due_at())
            .min(self.settle_due_at())
            .min(self.look_due_at())
            .min(self.claim_due_at())
            .min(self.drain_due_at());
        (due != Moment::NEVER).then_some(due)
    }

    /// Set once nothing is left to do: drained, or the outbox was found empty with `until_empty`.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// Leases held, in any phase.
    pub fn leased(&self) -> usize {
        self.leases.len()
    }

    /// Requests open, those being aborted included.
    pub fn open(&self) -> u32 {
        self.open
    }

    /// Whether calls of the store have failed since it answered one.
    pub fn store_fails(&self) -> bool {
        self.failing_since.is_some()
    }

    /// Whether the last claim was answered, and what it left is known.
    pub fn claims_work(&self) -> bool {
        self.claims.answered && !self.looks.failing()
    }

    /// Whether it was told to end.
    pub fn draining(&self) -> bool {
        self.drain.is_some()
    }

    /// The fence of a lease whose request may start or is open: renewals move it on while the driver connects (rule P4).
    pub fn start_before(&self, key: LeaseKey) -> Option<Moment> {
        let held = self.leases.get(&key).filter(|held| held.phase == Phase::Open)?;
        Some(self.fence_at(held.confirmed))
    }

    fn timing(&self) -> &Timing {
        self.settings.timing()
    }

    fn observe(&mut self, observation: Observation) {
        self.observations.push_back(observation);
    }

    fn next_request(&mut self) -> RequestId {
        self.last_request += 1;
        RequestId(self.last_request)
    }

    /// **P3**: the deadline counts from the send, never from the reply. **P4**: the fence lies `M` before it.
    fn fence_at(&self, confirmed: Moment) -> Moment {
        if planted!(self, FenceWithoutMargin) {
            return confirmed.after(self.timing().lease());
        }
        confirmed.aged(self.timing().fence())
    }

    /// The database's time carried forward by the worker's own clock.
    fn db_now(&self) -> DbTime {
        self.db.map_or_else(DbTime::default, |last| last.db.aged(self.now.age_of(last.received)))
    }

    /// **P4** self-fence, before anything else at any wake-up.
    fn check_fences(&mut self) {
        if planted!(self, FenceNever) {
            return;
        }
        while let Some(&(confirmed, key)) = self.fences.first()
            && self.fence_at(confirmed) <= self.now
        {
            self.fence(key);
        }
    }

    fn fence_all(&mut self) {
        while let Some(&(_, key)) = self.fences.first() {
            self.fence(key);
        }
    }

    /// Ends the request of a lease, never an outcome already in hand. What was not sent is given back at once, what is
    /// open once its abort is confirmed.
    fn fence(&mut self, key: LeaseKey) {
        let open = matches!(self.leases.get(&key), Some(Held { phase: Phase::Open, .. }));
        self.observe(Observation::Fenced { key, open });
        self.stop(key, Aborting::Fenced);
    }

    /// Leaves the phases before the outcome: aborts what is open, releases what is not.
    fn stop(&mut self, key: LeaseKey, why: Aborting) {
        let Some(held) = self.leases.get_mut(&key) else { return };
        match held.phase {
            Phase::Open if planted!(self, FenceReleasesAtOnce) => {
                self.actions.push_back(Action::Abort { key });
                self.conclude(key, Outcome::Release { due: None, why: HeartbeatEnd::Fenced });
            }
            Phase::Open => {
                held.phase = Phase::Aborting(why);
                self.fences.remove(&(held.confirmed, key));
                self.actions.push_back(Action::Abort { key });
            }
            Phase::Queued { .. } | Phase::Behind => {
                let why = if why == Aborting::Drained { HeartbeatEnd::Drained } else { HeartbeatEnd::Fenced };
                self.conclude(key, Outcome::Release { due: None, why });
            }
            Phase::Aborting(_) | Phase::Outcome(_) => {}
        }
    }

    /// A lease has its outcome: from here on only settling is left.
    fn conclude(&mut self, key: LeaseKey, outcome: Outcome) {
        self.leave_phase(key);
        if let Some(held) = self.leases.get_mut(&key) {
            held.phase = Phase::Outcome(outcome);
            self.settles.push(key);
            if planted!(self, OutcomeNotRenewed) {
                self.end_heartbeat(key, HeartbeatEnd::Settled);
            }
        }
    }

    /// Takes a lease out of the places in which its phase had put it.
    fn leave_phase(&mut self, key: LeaseKey) {
        let Some(held) = self.leases.get(&key) else { return };
        self.fences.remove(&(held.confirmed, key));
        let destination = held.destination.as_ref().and_then(|name| self.destinations.get_mut(name));
        match held.phase {
            Phase::Queued { seq } => {
                self.queued -= 1;
                if let Some(destination) = destination {
                    destination.queue.remove(&(seq, key));
                }
            }
            Phase::Open | Phase::Aborting(_) => {
                self.open -= 1;
                if let Some(destination) = destination {
                    destination.open -= 1;
                }
                let name = held.destination.clone();
                self.offer(name.as_ref());
            }
            Phase::Behind | Phase::Outcome(_) => {}
        }
    }

    /// **P2** refused: somebody else has had the event since. Aborts at once; an outcome in hand is still offered to
    /// the store, whose refusal is then counted.
    fn lost(&mut self, key: LeaseKey) {
        let Some(held) = self.leases.get_mut(&key) else { return };
        match held.phase {
            Phase::Queued { .. } | Phase::Behind => self.drop_lease(key, HeartbeatEnd::Lost, None),
            Phase::Open => {
                self.stop(key, Aborting::Lost);
                self.end_heartbeat(key, HeartbeatEnd::Lost);
            }
            Phase::Aborting(_) => {
                held.phase = Phase::Aborting(Aborting::Lost);
                self.end_heartbeat(key, HeartbeatEnd::Lost);
            }
            Phase::Outcome(_) => self.end_heartbeat(key, HeartbeatEnd::Lost),
        }
    }

    fn end_heartbeat(&mut self, key: LeaseKey, why: HeartbeatEnd) {
        let Some(held) = self.leases.get_mut(&key) else { return };
        match core::mem::replace(&mut held.heartbeat, Heartbeat::Off) {
            Heartbeat::Batched => self.heartbeats.remove(&(held.confirmed, key)),
            Heartbeat::Locked { skipped } => self.locked.remove(&(skipped, key)),
            Heartbeat::Off => return,
        };
        self.fences.remove(&(held.confirmed, key));
        self.observe(Observation::HeartbeatEnded { key, why });
    }

    /// The lease is held no longer. `settled` is what the store took for it, if it took anything.
    fn drop_lease(&mut self, key: LeaseKey, why: HeartbeatEnd, settled: Option<SettleKind>) {
        self.end_heartbeat(key, why);
        self.leave_phase(key);
        let Some(held) = self.leases.remove(&key) else { return };
        self.probation -= u32::from(held.reclaims >= super::row::PROBATION_RECLAIMS);
        if let Some(name) = &held.destination {
            self.actions.push_back(Action::Forget { key });
            self.leave_destination(name);
        }
        if let Some(cycle) = held.cycle {
            self.count_in_cycle(cycle, settled);
        }
        self.release_next_of(key.row);
    }

    fn leave_destination(&mut self, name: &DestinationKey) {
        let share = self.settings.limits().max_in_flight_per_destination;
        let Some(destination) = self.destinations.get_mut(name) else { return };
        destination.held -= 1;
        // **P13** one refill: asked for when no more than the cap is held.
        if destination.hungry && destination.held <= share {
            self.claims.refill = true;
        }
        if destination.held == 0 {
            if destination.in_ring {
                self.ring.retain(|other| other != name);
            }
            self.destinations.remove(name);
        }
    }

    fn count_in_cycle(&mut self, request: RequestId, settled: Option<SettleKind>) {
        let Some(cycle) = self.cycles.get_mut(&request) else { return };
        match settled {
            Some(SettleKind::Delivered) => cycle.summary.delivered += 1,
            Some(SettleKind::Retry) => cycle.summary.retried += 1,
            Some(SettleKind::Failed) => cycle.summary.failed += 1,
            Some(SettleKind::Release) => cycle.summary.released += 1,
            None => cycle.summary.lost += 1,
        }
        cycle.outstanding -= 1;
        if cycle.outstanding == 0 {
            self.end_cycle(request);
        }
    }

    fn end_cycle(&mut self, request: RequestId) {
        if let Some(mut cycle) = self.cycles.remove(&request) {
            cycle.summary.took = self.now.since(cycle.sent);
            self.observe(Observation::Cycle(cycle.summary));
        }
    }

    /// Every lease of a row, older tokens first.
    fn leases_of(&self, row: RowId) -> impl DoubleEndedIterator<Item = (&LeaseKey, &Held)> {
        self.leases.range(LeaseKey { row, token: Token(i64::MIN) }..=LeaseKey { row, token: Token(i64::MAX) })
    }

    /// **P4**: the newest lease of a row gets its turn once no other one is left.
    fn release_next_of(&mut self, row: RowId) {
        let mut leases = self.leases_of(row).map(|(key, held)| (*key, held.phase == Phase::Behind));
        let next = leases.next().filter(|(_, behind)| *behind && leases.next().is_none());
        drop(leases);
        if let Some((key, _)) = next {
            if self.drain.is_some() {
                self.conclude(key, Outcome::Release { due: None, why: HeartbeatEnd::Drained });
            } else {
                self.enqueue(key);
            }
        }
    }

    /// A store call was answered: the clocks are compared (rule P4) and an outage ends (rule P10).
    fn store_answered(&mut self, sent: Moment, db: DbTime) {
        if let Some(last) = self.db {
            let most = self.now.age_of(last.sent).plus(Age::of(self.timing().fence_margin()));
            let ran = db.age_of(last.db);
            if ran > most && !planted!(self, ClockAheadIgnored) {
                self.observe(Observation::ClockRanAhead { by: ran.less(most).into() });
                self.fence_all();
            }
        }
        // The answer to an earlier call, that one to a later call has passed, may show a clock that has been stepped
        // since, and the next would show the step again.
        if self.db.is_none_or(|last| last.sent <= sent) {
            self.db = Some(DbReading { sent, received: self.now, db });
        }
        // One sent before says nothing of the time since.
        if let Some(since) = self.failing_since.take_if(|since| *since <= sent) {
            self.observe(Observation::StoreRecovered { after: self.now.since(since) });
            if sent.since(since) >= self.timing().heartbeat() && !planted!(self, OutageForgotten) {
                self.embargo_after_outage();
            }
        }
    }

    fn store_failed(&mut self, call: StoreCall, sent: Moment, fault: StoreFault, keys: Vec<LeaseKey>) {
        if !matches!(fault, StoreFault::Permanent { .. }) {
            // Whatever kept this call from its answer, a store that has answered one sent later was not down.
            let sent = self.db.map_or(sent, |last| sent.max(last.sent));
            self.failing_since = Some(self.failing_since.map_or(sent, |since| since.min(sent)));
        }
        self.observe(Observation::StoreCallFailed { call, fault, keys });
    }

    /// Whether a call without an answer took so long that less of it might have had one. A stop of this process counts, and
    /// costs no more than a smaller statement.
    fn took_long(&self, sent: Moment) -> bool {
        self.now.since(sent) * 2 >= self.timing().store_timeout()
    }

    /// Short backoff before a failed store call is tried again: 10 ms, doubling up to `R/4`.
    fn backoff(&self, failures: u32) -> Duration {
        let doubled = Duration::from_millis(10).saturating_mul(1 << failures.saturating_sub(1).min(16));
        doubled.min(self.timing().store_timeout() / 4).max(Duration::from_millis(1))
    }

    /// How soon a locked row is tried again (rule P5).
    fn locked_again(&self) -> Duration {
        self.backoff(3)
    }
}
