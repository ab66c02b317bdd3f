//! Looking for what a claim without an answer may have granted (rule P7).

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::time::Duration;

use super::super::id::{LeaseKey, RequestId};
use super::super::io::{Action, HeartbeatEnd, Observation, OwnedReply, OwnedRequest, StoreCall, StoreFault};
use super::super::time::{DbTime, Moment};
use super::{Heartbeat, Held, Outcome, Phase, Worker};

/// When to look at what the store shows under this worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Looks {
    /// With the moment at which it was sent.
    under_way: Option<(RequestId, Moment)>,
    /// Several times for each claim without an answer, since a commit may come late.
    at: BTreeSet<Moment>,
    /// Looks that failed in a row.
    failures: u32,
    /// A claim had no answer.
    ever: bool,
    /// It may be applied until then.
    until: Option<DbTime>,
}

impl Looks {
    /// Whether the last one failed, so that what this worker owns is not known.
    pub(super) fn failing(&self) -> bool {
        self.failures > 0
    }

    pub(super) fn done(&self) -> bool {
        self.under_way.is_none() && self.at.is_empty()
    }
}

impl Worker {
    /// Whether no claim and no look is under way: the two never overlap, so that the reply of one can't show leases of the
    /// other that are not yet known.
    pub(super) fn neither_claims_nor_looks(&self) -> bool {
        self.claims.idle() && self.looks.under_way.is_none()
    }

    /// A claim that was sent at `sent` has no answer. Looks come at once, and again for a commit that comes late: twice
    /// more while what was granted can still be found and given back before it runs out, at two tries each and at one.
    pub(super) fn look_for(&mut self, sent: Moment, valid_until: Option<DbTime>) {
        self.looks.ever = true;
        let timing = *self.timing();
        // At any time, where it was sent when no clock of the database was known.
        let until = valid_until.map_or(DbTime::NEVER, |until| until.after(timing.store_timeout()));
        self.looks.until = self.looks.until.max(Some(until));
        let (lease, timeout) = (timing.lease(), timing.store_timeout());
        let left = lease.saturating_sub(self.now.since(sent)).saturating_sub(timing.fence_margin());
        let before = |tries: u32| left.saturating_sub(timeout * tries).max(timeout);
        let mut waits = alloc::vec![Duration::ZERO, timeout, before(4), before(2), lease];
        if planted!(self, LateClaimForgotten) {
            waits.truncate(2);
        }
        if planted!(self, LateLookAtLease) {
            waits.drain(2..4);
        }
        if planted!(self, LooksReplaced) {
            self.looks.at.clear();
        }
        let forgotten = [
            planted!(self, LateLocksForgotten),
            planted!(self, LateClaimForgotten),
            planted!(self, LateLookAtLease),
            planted!(self, LooksReplaced),
        ];
        if !forgotten.contains(&true) {
            // It may have its locks as late as it is valid, by a clock that was set back by as much as `G`: all that is
            // above may come that much later.
            let latest = timing.reclaim_grace() * 2 + timeout;
            let last = latest.max((left + latest).saturating_sub(timeout * 4));
            let mut wait = before(4);
            while wait < last {
                wait += self.look_step();
                waits.push(wait);
            }
        }
        // The looks for an earlier one stay due: what it left runs out earlier.
        self.looks.at.extend(waits.into_iter().map(|wait| self.now.after(wait)));
    }

    /// How far apart looks are for leases that may appear at any time: of one that commits with four tries left, three are
    /// left when it is found, or fewer where `R` is less than `L/16`.
    fn look_step(&self) -> Duration {
        self.timing().store_timeout().max(self.timing().lease() / 16)
    }

    pub(super) fn look_due_at(&self) -> Moment {
        let idle = self.neither_claims_nor_looks();
        self.looks.at.first().copied().filter(|_| idle).unwrap_or(Moment::NEVER)
    }

    /// Asks what the store shows under this worker.
    pub(super) fn start_look(&mut self) {
        if self.look_due_at() > self.now {
            return;
        }
        self.looks.at.retain(|at| *at > self.now);
        let request = self.next_request();
        self.looks.under_way = Some((request, self.now));
        self.actions.push_back(Action::Owned(request, OwnedRequest { owner: self.id.clone() }));
    }

    /// Before exit, a last look.
    pub(super) fn look_once_more(&mut self) {
        self.looks.at = BTreeSet::from([self.now]);
    }

    pub(super) fn owned(&mut self, request: RequestId, reply: Result<OwnedReply, StoreFault>) {
        let Some((_, sent)) = self.looks.under_way.take_if(|(asked, _)| *asked == request) else {
            return self.observe(Observation::Unexpected { what: "a reply to a look that is not under way" });
        };
        match reply {
            Ok(reply) => {
                self.looks.failures = 0;
                self.store_answered(sent, reply.db_now);
                if self.looks.at.is_empty() && self.drain.is_none() {
                    // By the database's own clock, however wrong this worker's was when the claim was sent.
                    self.looks.until = self.looks.until.filter(|until| reply.db_now <= *until);
                    if self.looks.until.is_some() {
                        self.looks.at.insert(self.now.after(self.look_step()));
                    }
                }
                for key in reply.keys {
                    if !self.leases.contains_key(&key) && !self.settles.gave_up(key) {
                        self.release_orphan(key, sent);
                    }
                }
            }
            Err(fault) => {
                self.looks.failures = self.looks.failures.saturating_add(1);
                let again = self.now.after(self.backoff(self.looks.failures));
                self.looks.at.retain(|at| *at > again);
                // Where every claim was answered, the last look is made to be sure, and no end waits for it.
                if self.drain.is_none() || self.looks.ever {
                    self.looks.at.insert(again);
                }
                self.store_failed(StoreCall::Owned, sent, fault, Vec::new());
            }
        }
    }

    fn release_orphan(&mut self, key: LeaseKey, sent: Moment) {
        self.observe(Observation::OrphanReleased { key });
        let orphan = Held {
            cycle: None,
            destination: None,
            attempts: 0,
            max_attempts: u32::MAX,
            reclaims: 0,
            confirmed: sent,
            heartbeat: Heartbeat::Off,
            phase: Phase::Outcome(Outcome::Release { due: None, why: HeartbeatEnd::Fenced }),
        };
        self.leases.insert(key, orphan);
        self.settles.push_orphan(key);
    }
}
