//! The oracle: an independent judge of a history.
//!
//! It sees facts in true time, keeps its own books and checks the invariants S1 to S9 and L1 to L4 of ARCHITECTURE.md
//! at the step at which they break. It depends on plain types only, never on the machine that it judges: what a lease,
//! a fence, a retry delay or a healthy holder is, is stated here a second time.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod clock;
mod embargo;
mod fact;
mod health;
mod ledger;
mod outcomes;
mod requests;
mod stats;
mod store;
mod terms;
mod violation;
mod waits;
mod workers;

pub use clock::{DbClockModel, LocalClock, STANDS_STILL};
pub use fact::{Answer, DbMicros, Down, End, Fact, Lane, Micros, RetryAfter, Settle, Spent, Status};
pub use stats::{Change, RowState, Sometimes, Stats, reachable};
pub use terms::Terms;
pub use violation::{Checks, Excuse, Excuses, Invariant, Violation};

use embargo::Return;
use ledger::{Call, Event, Lease, Link, NONE, Worker};
use waits::LONG;

/// Fails with a violation unless a condition holds or its invariant is not checked.
macro_rules! ensure {
    ($oracle:expr, $invariant:ident, $holds:expr, $($text:tt)*) => {
        if !$holds && $oracle.checks.has(crate::Invariant::$invariant) {
            return Err(crate::Violation {
                invariant: crate::Invariant::$invariant,
                text: format!($($text)*),
                at: $oracle.now,
            });
        }
    };
}
pub(crate) use ensure;

/// Broken or not.
pub type Verdict = Result<(), Violation>;

/// What the oracle has to know beforehand.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The settings that workers refer to by index.
    pub terms: Vec<Terms>,
    /// What the database's clock shows at the beginning.
    pub epoch: DbMicros,
    /// Which invariants are checked.
    pub checks: Checks,
    /// When every event must be terminal, if that is asked for.
    pub converge_by: Option<Micros>,
    /// Whether every worker always has room for every event, so that waiting times can be bounded.
    pub roomy: bool,
    /// Whether the store takes its time for each row, so that what a worker asks for is answered bit by bit.
    pub slow_rows: bool,
}

/// The judge. See the crate's documentation.
#[derive(Debug)]
pub struct Oracle {
    now: Micros,
    checks: Checks,
    terms: Vec<Terms>,
    db: DbClockModel,
    db_up: bool,
    down_at: Micros,
    returns: Vec<Return>,
    last_loss: Option<Micros>,
    /// When something last went wrong that may delay claims.
    quiet_since: Micros,
    /// What the database's clock showed at the most before it was stepped.
    db_highest: DbMicros,
    /// The longest that a claim was under way.
    longest_claim: Micros,
    converge_by: Option<Micros>,
    roomy: bool,
    slow_rows: bool,
    workers: Vec<Worker>,
    events: Vec<Event>,
    leases: Vec<Lease>,
    calls: Vec<Call>,
    links: Vec<Link>,
    pending: u32,
    delivered: u32,
    failed: u32,
    /// Counts of what was tested, excused and visited.
    pub stats: Stats,
}

impl Oracle {
    /// An oracle before the first fact.
    pub fn new(setup: Setup) -> Self {
        Self {
            now: 0,
            checks: setup.checks,
            terms: setup.terms,
            db: DbClockModel::new(setup.epoch),
            db_up: true,
            down_at: 0,
            returns: Vec::new(),
            last_loss: None,
            quiet_since: 0,
            db_highest: DbMicros::MIN,
            longest_claim: 0,
            converge_by: setup.converge_by,
            roomy: setup.roomy && !setup.slow_rows,
            slow_rows: setup.slow_rows,
            workers: Vec::with_capacity(32),
            events: Vec::with_capacity(64),
            leases: Vec::with_capacity(128),
            calls: Vec::with_capacity(1_024),
            links: Vec::with_capacity(512),
            pending: 0,
            delivered: 0,
            failed: 0,
            stats: Stats::default(),
        }
    }

    /// Events that are not terminal.
    pub fn pending(&self) -> u32 {
        self.pending
    }

    /// Takes the next fact.
    ///
    /// # Errors
    /// The invariant that it breaks.
    pub fn observe(&mut self, at: Micros, fact: &Fact) -> Verdict {
        debug_assert!(at >= self.now, "the history is in order");
        self.now = at;
        self.stats.facts += 1;
        match *fact {
            Fact::EventCommitted { event, destination, attempts, max_attempts, due, poison, sendable } => {
                self.event_committed(event, destination, (attempts, max_attempts), due);
                let book = &mut self.events[event as usize];
                (book.poison, book.sendable) = (poison, sendable);
                Ok(())
            }
            Fact::WorkerUp { worker, terms, local, ppm, .. } => self.worker_up(worker, terms, local, ppm),
            Fact::WorkerStopped { worker } => self.worker_stopped(worker),
            Fact::WorkerContinued { worker } => self.worker_continued(worker),
            Fact::WorkerClock { worker, local, ppm } => self.worker_clock(worker, local, ppm),
            Fact::WorkerDown { worker, how } => self.worker_down(worker, how),
            Fact::DrainBegan { worker } => {
                self.workers[worker as usize].drain_began.get_or_insert(at);
                self.quiet_since = at;
                Ok(())
            }
            Fact::CallSent { worker, call, lane, renews } => self.call_sent(worker, call, lane, renews),
            Fact::CallAnswered { worker, call, arrived } => self.call_answered(worker, call, arrived),
            Fact::CallFailed { worker, call } => self.call_failed(worker, call),
            Fact::Claimed { worker, call, event, token, until, reclaimed, began, locked } => {
                self.claimed(store::Claim { worker, call, event, began, locked }, token, until, reclaimed)?;
                self.lock_over(event, locked, LONG);
                Ok(())
            }
            Fact::ClaimFailed { worker, call, event, why, began, locked } => {
                self.claim_failed(store::Claim { worker, call, event, began, locked }, why)
            }
            Fact::Renewed { worker, call, event, token, answer, until, locked } => {
                if answer != Answer::Skipped {
                    self.unlocked(event, locked);
                }
                self.renewed(store::Guarded { worker, call, event, token, answer, locked }, until)
            }
            Fact::Settled { worker, call, event, token, settle, answer, attempts, due, locked } => {
                if answer != Answer::Skipped {
                    self.unlocked(event, locked);
                }
                let guarded = store::Guarded { worker, call, event, token, answer, locked };
                self.settled(guarded, settle, attempts, due)
            }
            Fact::SettleImpossible { worker, event, token } => {
                if let Some(lease) = self.find(event, worker, token) {
                    self.leases[lease as usize].impossible = true;
                    self.forgotten(lease, true);
                    self.call_refused(worker);
                }
                Ok(())
            }
            Fact::LockDropped { event, since, left } => {
                // Claims that lock and leave what is due, one after the other, are no excuse for not taking it. A claim that
                // fails is, for others that came by meanwhile.
                let least = if left { self.longest_poll() } else { 0 };
                let since = self.lock_over(event, since, least);
                self.note_lock(event, since);
                Ok(())
            }
            Fact::StartAllowed { worker, event, token, asked } => {
                self.check_overdue(worker, asked)?;
                self.start_allowed(worker, event, token)
            }
            Fact::RequestOpened { worker, event, token, number } => {
                self.request_opened(worker, event, token, number)
            }
            Fact::RequestEnded { worker, event, token, end } => self.request_ended(worker, event, token, end),
            Fact::OutcomeKnown { worker, event, token } => {
                if let Some(lease) = self.find(event, worker, token) {
                    self.leases[lease as usize].known = self.workers[worker as usize].clock.at(at);
                }
                Ok(())
            }
            Fact::RowLocked { event } => {
                self.events[event as usize].locked_since = Some(at);
                self.quiet_since = at;
                Ok(())
            }
            Fact::RowUnlocked { event } => {
                if let Some(since) = self.events[event as usize].locked_since.take() {
                    self.unlocked(event, since);
                    if let Some(lease) = self.leases.get_mut(self.events[event as usize].lease as usize) {
                        lease.locked_for += at - since;
                        lease.last_lock = (since, at);
                    }
                }
                self.quiet_since = at;
                Ok(())
            }
            Fact::DbStepped { by } => {
                self.db_highest = self.db_highest.max(self.db.at(at));
                self.ran_ahead(by);
                self.db.step(at, by);
                self.quiet_since = at;
                if self.events.iter().any(|event| event.lease != NONE) {
                    self.stats.saw(Sometimes::DbStepUnderLease);
                }
                Ok(())
            }
            Fact::DbDown => {
                self.db_up = false;
                self.down_at = at;
                self.quiet_since = at;
                Ok(())
            }
            Fact::DbUp { lost, standby } => {
                self.db_up = true;
                self.returns.push(Return { at, down_at: self.down_at, standby });
                self.quiet_since = at;
                if lost > 0 {
                    self.last_loss = Some(at);
                }
                Ok(())
            }
            Fact::RowRestored { event, status, attempts, due, token, reclaims, owner, until } => {
                self.restored(
                    event,
                    status,
                    attempts,
                    due,
                    reclaims,
                    owner.map(|owner| (owner, token)),
                    until,
                );
                self.events[event as usize].token = token;
                Ok(())
            }
            Fact::EventVanished { event } => {
                self.vanished(event);
                Ok(())
            }
            Fact::Disturbed { .. } | Fact::Healed => {
                self.quiet_since = at;
                Ok(())
            }
            Fact::Census { pending, delivered, failed } => self.census(pending, delivered, failed),
        }
    }

    /// The run is over at `at`: what should have happened by then has, or not.
    ///
    /// # Errors
    /// The liveness invariant that is broken.
    pub fn finish(&mut self, at: Micros) -> Verdict {
        self.now = at.max(self.now);
        self.workers_finished()?;
        self.requests_finished()?;
        if let Some(by) = self.converge_by {
            let left = self.events.iter().position(|event| event.exists && event.status == Status::Pending);
            if let Some(event) = left {
                let text = self.describe(event as u32);
                ensure!(self, L1, self.now < by, "{} events are not terminal in time: {text}", self.pending);
            }
        }
        let leased: Vec<u32> =
            self.events.iter().filter(|event| event.lease != NONE).map(|event| event.lease).collect();
        for lease in leased {
            self.lease_over(lease, None);
        }
        Ok(())
    }

    fn census(&self, pending: u32, delivered: u32, failed: u32) -> Verdict {
        ensure!(
            self,
            S8,
            (pending, delivered, failed) == (self.pending, self.delivered, self.failed),
            "the store has {pending} pending, {delivered} delivered and {failed} failed events; committed were {}, {} \
             and {}",
            self.pending,
            self.delivered,
            self.failed
        );
        Ok(())
    }

    fn terms_of(&self, worker: u32) -> &Terms {
        &self.terms[usize::from(self.workers[worker as usize].terms)]
    }

    /// The lease of an event under a token.
    fn find(&self, event: u32, worker: u32, token: i64) -> Option<u32> {
        let mut at = self.events[event as usize].last;
        while at != NONE {
            let lease = &self.leases[at as usize];
            if lease.token == token && lease.worker == worker {
                return Some(at);
            }
            at = lease.before;
        }
        None
    }

    fn describe(&self, event: u32) -> String {
        let book = &self.events[event as usize];
        let holder = (book.lease != NONE).then(|| &self.leases[book.lease as usize]);
        let holder = holder.map(|lease| (lease.worker, self.workers[lease.worker as usize].down));
        format!(
            "event {event} has {} of {} attempts, {} run-outs, holder {holder:?}, is due at {} and leased until {}, the \
             database's clock shows {}",
            book.attempts,
            book.max_attempts,
            book.reclaims,
            book.due,
            book.until,
            self.db.at(self.now)
        )
    }
}
