//! Starting requests and taking their ends.

use core::time::Duration;

use super::super::id::{DestinationKey, LeaseKey};
use super::super::io::{Action, AttemptResult, HeartbeatEnd, Observation};
use super::super::retry::{Judged, Verdict};
use super::{Aborting, Outcome, Phase, Worker};

impl Worker {
    /// Puts a lease at the end of its destination's queue.
    pub(super) fn enqueue(&mut self, key: LeaseKey) {
        let Some(held) = self.leases.get_mut(&key) else { return };
        self.last_seq += 1;
        held.phase = Phase::Queued { seq: self.last_seq };
        self.queued += 1;
        let name = held.destination.clone();
        if let Some(destination) = name.as_ref().and_then(|name| self.destinations.get_mut(name)) {
            destination.queue.insert((self.last_seq, key));
        }
        self.offer(name.as_ref());
    }

    /// Puts a destination into the ring of those that may send, if it may.
    pub(super) fn offer(&mut self, name: Option<&DestinationKey>) {
        let cap = self.settings.limits().max_in_flight_per_destination;
        if let Some(name) = name
            && let Some(destination) = self.destinations.get_mut(name)
            && !destination.in_ring
            && (destination.open < cap || planted!(self, DestinationUnlimited))
            && !destination.queue.is_empty()
        {
            destination.in_ring = true;
            self.ring.push_back(name.clone());
        }
    }

    /// Starts what may start: one event of each destination in turn. **P4**: while a renewal is overdue by `R`, nothing.
    pub(super) fn start_sends(&mut self) {
        if self.ring.is_empty() || self.drain.is_some() || self.renewal_overdue() {
            return;
        }
        while (self.open < self.settings.limits().max_in_flight || planted!(self, RequestsUnlimited))
            && let Some(name) = self.ring.pop_front()
        {
            let Some(destination) = self.destinations.get_mut(&name) else { continue };
            destination.in_ring = false;
            // A place in the ring may have been overtaken by fences: the queue can be empty by now.
            let Some((_, key)) = destination.queue.pop_first() else { continue };
            destination.open += 1;
            self.open += 1;
            self.queued -= 1;
            self.offer(Some(&name));
            let timestamp = self.db_now().as_secs();
            if let Some(held) = self.leases.get_mut(&key) {
                held.phase = Phase::Open;
                let (confirmed, number) = (held.confirmed, held.attempts.saturating_add(1));
                let start_before = self.fence_at(confirmed);
                self.actions.push_back(Action::Send { key, number, timestamp, start_before });
            }
        }
    }

    /// A request ended by itself. An abort that came too late does not undo that: a fence ends the request, never an
    /// outcome already in hand (rule P4).
    pub(super) fn attempted(&mut self, key: LeaseKey, result: AttemptResult) {
        let phase = self.leases.get(&key).map(|held| held.phase.clone());
        match phase {
            Some(Phase::Open | Phase::Aborting(Aborting::Fenced | Aborting::Drained)) => {
                let outcome = self.judge(key, result);
                self.conclude(key, outcome);
            }
            Some(Phase::Aborting(Aborting::Lost)) => {
                let kind = self.judge(key, result).kind();
                self.observe(Observation::SettleRefused { key, kind });
                self.drop_lease(key, HeartbeatEnd::Lost, None);
            }
            _ => self.observe(Observation::Unexpected { what: "the outcome of an attempt that is not open" }),
        }
    }

    pub(super) fn judge(&self, key: LeaseKey, result: AttemptResult) -> Outcome {
        let (attempts, max_attempts) =
            self.leases.get(&key).map_or((0, u32::MAX), |held| (held.attempts, held.max_attempts));
        let max_attempts = if planted!(self, RetryBeyondLimit) { u32::MAX } else { max_attempts };
        let mut number = attempts.saturating_add(1);
        if planted!(self, FailBeforeLimit) {
            number += 1;
        }
        let result = self.misread(result);
        let judged = Judged { row: key.row, number, max_attempts, db_now: self.db_now() };
        match self.settings.retry().judge(self.settings.seed, judged, result) {
            Verdict::Delivered { status } => Outcome::Delivered { status },
            Verdict::Retry { delay, error, status } => {
                let delay = self.misjudge(key, delay);
                Outcome::Retry { due: self.now.after(delay), error, status }
            }
            Verdict::Failed { error, status, tried } => Outcome::Failed { error, status, tried },
        }
    }

    /// Planted mistakes in reading a response.
    fn misread(&self, result: AttemptResult) -> AttemptResult {
        match result {
            AttemptResult::Responded { status: 300..=399, retry_after }
                if planted!(self, RedirectIsSuccess) =>
            {
                AttemptResult::Responded { status: 200, retry_after }
            }
            AttemptResult::Responded { status, .. } if planted!(self, RetryAfterIgnored) => {
                AttemptResult::Responded { status, retry_after: None }
            }
            AttemptResult::Undeliverable { error } if planted!(self, UndeliverableRetried) => {
                AttemptResult::Errored { error }
            }
            result => result,
        }
    }

    /// Planted mistakes in delays.
    fn misjudge(&self, key: LeaseKey, delay: Duration) -> Duration {
        let (retry, seed) = (self.settings.retry(), self.settings.seed);
        let number = || self.leases.get(&key).map_or(1, |held| held.attempts + 1);
        if planted!(self, BackoffStuck) && number() > 2 {
            return retry.backoff(seed, key.row, 1);
        }
        if planted!(self, BackoffOffByOne) {
            return delay.max(retry.backoff(seed, key.row, number() + 1));
        }
        if planted!(self, DelayFromClaim) {
            let claimed = self.leases.get(&key).map_or(self.now, |held| held.confirmed);
            return delay.saturating_sub(self.now.since(claimed));
        }
        if planted!(self, RetryAfterUncapped) && delay >= retry.retry_after_max && delay > retry.max {
            return delay * 2;
        }
        delay
    }

    /// A request was not started, or its socket is closed.
    pub(super) fn aborted(&mut self, key: LeaseKey) {
        let phase = self.leases.get(&key).map(|held| held.phase.clone());
        match phase {
            // Not started since the world had stopped: its fence has come.
            Some(Phase::Open) => {
                self.observe(Observation::Fenced { key, open: false });
                self.conclude(key, Outcome::Release { due: None, why: HeartbeatEnd::Fenced });
            }
            Some(Phase::Aborting(Aborting::Fenced)) if planted!(self, AbortSpends) => {
                let outcome = self.judge(key, AttemptResult::Errored { error: alloc::string::String::new() });
                self.conclude(key, outcome);
            }
            Some(Phase::Aborting(Aborting::Fenced)) => {
                self.conclude(key, Outcome::Release { due: None, why: HeartbeatEnd::Fenced });
            }
            // **P8**: with a delay of `G`, since the receiver may still be at work on it.
            Some(Phase::Aborting(Aborting::Drained)) => {
                if let Some(drain) = &mut self.drain {
                    drain.aborted += 1;
                }
                let due = self.now.after(self.timing().reclaim_grace());
                let due = Some(due).filter(|_| !planted!(self, DrainReleasesDue));
                self.conclude(key, Outcome::Release { due, why: HeartbeatEnd::Drained });
            }
            Some(Phase::Aborting(Aborting::Lost)) => self.drop_lease(key, HeartbeatEnd::Lost, None),
            _ => self.observe(Observation::Unexpected { what: "an abort of an attempt that is not open" }),
        }
    }
}
