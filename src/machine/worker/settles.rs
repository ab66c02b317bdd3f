//! Settling outcomes (rule P6).

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

use super::super::id::{LeaseKey, RequestId};
use super::super::io::{
    Action, HeartbeatEnd, Observation, SettleKind, SettleReply, SettleRequest, StoreCall, StoreFault,
};
use super::super::row::{Answer, Settle};
use super::super::time::Moment;
use super::portion::Portion;
use super::{Held, Outcome, Phase, STATEMENT_MAX, Worker};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct UnderWay {
    request: RequestId,
    sent: Moment,
    keys: Vec<LeaseKey>,
}

/// Outcomes on their way into the store: one batch at a time holds all that gathered while the last was under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Settles {
    /// What P7 gives back goes first, and by itself: nobody renews it, and a batch that is refused for good or not answered
    /// would keep it.
    orphans: VecDeque<LeaseKey>,
    ready: VecDeque<LeaseKey>,
    /// Batches to be repeated: halves of one that the store refused for good, until the one bad outcome is alone, or what
    /// had no answer.
    halves: Vec<Vec<LeaseKey>>,
    /// Locked rows, to be asked for again.
    skipped: BTreeSet<(Moment, LeaseKey)>,
    under_way: Option<UnderWay>,
    portion: Portion,
    failures: u32,
    retry_at: Moment,
    /// Given up on, so that they are not taken for orphans (rule P7) while their leases run out.
    abandoned: BTreeSet<(Moment, LeaseKey)>,
}

impl Settles {
    pub(super) fn push(&mut self, key: LeaseKey) {
        self.ready.push_back(key);
    }

    pub(super) fn push_orphan(&mut self, key: LeaseKey) {
        self.orphans.push_back(key);
    }

    fn waiting(&self) -> bool {
        !self.orphans.is_empty() || !self.ready.is_empty() || !self.halves.is_empty()
    }

    /// **P6**: after an outage settles go before claims, if there are any left.
    pub(super) fn failing(&self) -> bool {
        self.failures > 0 && (self.waiting() || !self.skipped.is_empty() || self.under_way.is_some())
    }

    pub(super) fn gave_up(&self, key: LeaseKey) -> bool {
        self.abandoned.iter().any(|(_, other)| *other == key)
    }

    pub(super) fn knows(&self, key: LeaseKey) -> bool {
        self.orphans.contains(&key)
            || self.ready.contains(&key)
            || self.halves.iter().flatten().any(|other| *other == key)
            || self.skipped.iter().any(|(_, other)| *other == key)
            || self.under_way.as_ref().is_some_and(|way| way.keys.contains(&key))
    }
}

impl Worker {
    pub(super) fn settle_due_at(&self) -> Moment {
        if self.settles.under_way.is_some() {
            return Moment::NEVER;
        }
        let skipped = || self.settles.skipped.first().map_or(Moment::NEVER, |(due, _)| *due);
        let due = if self.settles.waiting() { self.now } else { skipped() };
        due.max(self.settles.retry_at)
    }

    pub(super) fn start_settle(&mut self) {
        if self.settle_due_at() > self.now {
            return;
        }
        while let Some(&(due, key)) = self.settles.skipped.first()
            && due <= self.now
        {
            self.settles.skipped.pop_first();
            if self.leases.get(&key).is_some_and(Held::is_orphan) {
                self.settles.orphans.push_back(key);
            } else {
                self.settles.ready.push_back(key);
            }
        }
        let most = self.settles.portion.of(STATEMENT_MAX);
        let first = |queue: &mut VecDeque<LeaseKey>| -> Vec<LeaseKey> {
            let batch = queue.len().min(most);
            queue.drain(..batch).collect()
        };
        let mut keys = first(&mut self.settles.orphans);
        if keys.is_empty() {
            keys = self.settles.halves.pop().unwrap_or_else(|| first(&mut self.settles.ready));
        }
        if keys.len() > most {
            self.settles.halves.push(keys.split_off(most));
        }
        keys.sort_unstable();
        let entries = keys.iter().filter_map(|key| match self.leases.get(key) {
            Some(Held { phase: Phase::Outcome(outcome), .. }) => {
                let mut settle = outcome.settle(self.now);
                if planted!(self, SettleDelayRestarts)
                    && let Settle::Retry { delay, .. } = &mut settle
                {
                    *delay += self.timing().heartbeat();
                }
                Some((*key, settle))
            }
            _ => None,
        });
        let settle = SettleRequest { owner: self.id.clone(), entries: entries.collect() };
        if settle.entries.is_empty() {
            return;
        }
        let request = self.next_request();
        self.actions.push_back(Action::Settle(request, settle));
        self.settles.under_way = Some(UnderWay { request, sent: self.now, keys });
    }

    pub(super) fn settled(&mut self, request: RequestId, reply: Result<SettleReply, StoreFault>) {
        let Some(UnderWay { sent, mut keys, .. }) =
            self.settles.under_way.take_if(|way| way.request == request)
        else {
            return self
                .observe(Observation::Unexpected { what: "a reply to a settle that is not under way" });
        };
        match reply {
            Ok(reply) => {
                self.store_answered(sent, reply.db_now);
                if self.settles.halves.is_empty() {
                    self.settles.failures = 0;
                }
                self.settles.portion.answered(keys.len());
                for (key, answer) in reply.answers {
                    match keys.binary_search(&key) {
                        Ok(at) => {
                            keys.remove(at);
                            self.settle_answered(key, answer);
                        }
                        Err(_) => self.observe(Observation::Unexpected {
                            what: "a settle's answer for a lease not asked about",
                        }),
                    }
                }
                // What was not answered is as unknown as what was locked.
                for key in keys {
                    self.settle_answered(key, Answer::Skipped);
                }
            }
            Err(fault) => {
                self.store_failed(StoreCall::Settle, sent, fault.clone(), keys.clone());
                match fault {
                    StoreFault::Permanent { error } => {
                        // An answer, if a bad one: the store works.
                        self.settles.failures = 0;
                        self.settle_refused_for_good(keys, error);
                    }
                    StoreFault::Unknown { .. } | StoreFault::NotApplied { .. } => {
                        self.settles.failures = self.settles.failures.saturating_add(1);
                        self.settles.retry_at = self.now.after(self.backoff(self.settles.failures));
                        if planted!(self, SettleOnce) {
                            keys.iter().for_each(|key| self.drop_lease(*key, HeartbeatEnd::Settled, None));
                            return;
                        }
                        // One may have been lost.
                        if self.settles.failures > 1 && self.took_long(sent) && !planted!(self, SettlesWhole)
                        {
                            self.settles.portion.unanswered(keys.len());
                        }
                        self.settles.halves.push(keys);
                    }
                }
            }
        }
    }

    fn settle_refused_for_good(&mut self, mut keys: Vec<LeaseKey>, error: alloc::string::String) {
        if keys.len() > 1 {
            let half = keys.split_off(keys.len() / 2);
            self.settles.halves.push(half);
            self.settles.halves.push(keys);
        } else if let Some(key) = keys.pop() {
            let forgotten = self.now.before(self.timing().lease() * 2);
            while self.settles.abandoned.first().is_some_and(|(since, _)| *since < forgotten) {
                self.settles.abandoned.pop_first();
            }
            self.settles.abandoned.insert((self.now, key));
            self.observe(Observation::SettleAbandoned { key, error });
            self.drop_lease(key, HeartbeatEnd::Abandoned, None);
        }
    }

    fn settle_answered(&mut self, key: LeaseKey, answer: Answer) {
        let Some(Held { phase: Phase::Outcome(outcome), .. }) = self.leases.get(&key) else { return };
        let (kind, status) = (outcome.kind(), outcome.status());
        let why = match outcome {
            Outcome::Release { why, .. } => *why,
            Outcome::Delivered { .. } | Outcome::Retry { .. } | Outcome::Failed { .. } => {
                HeartbeatEnd::Settled
            }
        };
        match answer {
            Answer::Applied | Answer::Ended => {
                let repeated = answer == Answer::Ended;
                self.observe(Observation::Settled { key, kind, status, repeated });
                if kind == SettleKind::Release {
                    // It falls due when it did before.
                    self.rescan_soon();
                }
                self.drop_lease(key, why, Some(kind));
            }
            // **P9**: counted and logged, never silent. Giving back what is gone already is nothing to speak of.
            Answer::Refused => {
                if kind != SettleKind::Release {
                    self.observe(Observation::SettleRefused { key, kind });
                }
                self.drop_lease(key, HeartbeatEnd::Lost, None);
            }
            Answer::Skipped => {
                let again = self.now.after(self.locked_again());
                self.settles.skipped.insert((again, key));
            }
        }
    }
}

impl Held {
    /// What an unknown claim left (rule P7).
    fn is_orphan(&self) -> bool {
        self.cycle.is_none()
    }
}
