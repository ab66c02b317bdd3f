//! Heartbeats (rule P5).

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use super::super::id::{LeaseKey, RequestId};
use super::super::io::{Action, HeartbeatEnd, Observation, RenewReply, RenewRequest, StoreCall, StoreFault};
use super::super::row::Answer;
use super::super::time::Moment;
use super::{Heartbeat, Held, Phase, STATEMENT_MAX, Worker};

/// One renewal statement under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct UnderWay {
    request: RequestId,
    sent: Moment,
    keys: Vec<LeaseKey>,
}

/// Renewals under way: one batched statement, and beside it at most one that waits for a locked row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Renewals {
    batch: Option<UnderWay>,
    failures: u32,
    retry_at: Moment,
    /// The last statement was full, and left ripe leases.
    more: bool,
    alone: Option<UnderWay>,
    alone_queue: VecDeque<LeaseKey>,
    alone_failures: u32,
    alone_retry_at: Moment,
}

impl Worker {
    /// When a run of statements begins: when the oldest lease is seven eighths of `H` old. It takes all that are at least
    /// `H/2` old, and is over when none is left. The last eighth is for those that wait for the statements before theirs; a
    /// first failed try has its time in the rule `H + 2R + M <= L`.
    fn run_due_at(&self) -> Moment {
        let Some((oldest, _)) = self.heartbeats.first() else { return Moment::NEVER };
        if planted!(self, HeartbeatLate) {
            return oldest.after(self.timing().lease());
        }
        oldest.aged(if self.renewals.more { self.timing().ripe() } else { self.timing().run() })
    }

    /// When locked rows are tried again: a lock that ends must be noticed, however many rows stay locked.
    fn locked_due_at(&self) -> Moment {
        self.locked.first().map_or(Moment::NEVER, |(skipped, _)| skipped.after(self.locked_again()))
    }

    pub(super) fn renewal_due_at(&self) -> Moment {
        if self.renewals.batch.is_some() && !planted!(self, TwoRenewals) {
            return Moment::NEVER;
        }
        if planted!(self, DrainStopsRenewing) && self.drain.is_some() {
            return Moment::NEVER;
        }
        self.run_due_at().min(self.locked_due_at()).max(self.renewals.retry_at)
    }

    pub(super) fn alone_due_at(&self) -> Moment {
        let idle = self.renewals.alone.is_none() && !self.renewals.alone_queue.is_empty();
        if idle { self.renewals.alone_retry_at } else { Moment::NEVER }
    }

    /// **P4**: whether a renewal is overdue by `R`. A row that somebody keeps locked holds up nothing but itself.
    pub(super) fn renewal_overdue(&self) -> bool {
        self.heartbeats.first().is_some_and(|(oldest, _)| oldest.aged(self.timing().overdue()) < self.now)
    }

    /// The leases that may be renewed, the oldest first.
    fn ripe(&self) -> impl Iterator<Item = LeaseKey> {
        let age = self.timing().ripe();
        let ripe = self.heartbeats.iter().take_while(move |(confirmed, _)| confirmed.aged(age) <= self.now);
        ripe.map(|(_, key)| *key)
    }

    /// The locked rows that are to be tried again, those that were skipped first in front.
    fn locked_due(&self) -> impl Iterator<Item = LeaseKey> {
        let before = self.now.before(self.locked_again());
        let due = self.locked.iter().take_while(move |(skipped, _)| *skipped <= before);
        due.map(|(_, key)| *key)
    }

    pub(super) fn start_renewals(&mut self) {
        if self.renewal_due_at() <= self.now {
            let run = self.run_due_at() <= self.now;
            // Locked rows first, or behind a run of full statements they would wait for its end; and of a run no more than
            // half, or many of them would keep the others from theirs.
            let locked = if run { STATEMENT_MAX / 2 } else { STATEMENT_MAX };
            let mut keys: Vec<LeaseKey> = self.locked_due().take(locked).collect();
            let due = keys.len();
            if run {
                keys.extend(self.ripe().take(STATEMENT_MAX - due));
            }
            let full = run && keys.len() == STATEMENT_MAX;
            // Where there is room, what was skipped just now as well: calls may take so long that the next comes too late.
            let others = self.locked.iter().map(|(_, key)| *key).skip(due);
            keys.extend(others.take(STATEMENT_MAX - keys.len()));
            if planted!(self, QueueNotRenewed) {
                keys.retain(|key| {
                    self.leases.get(key).is_some_and(|held| !matches!(held.phase, Phase::Queued { .. }))
                });
                if keys.is_empty() {
                    self.renewals.retry_at = self.now.after(self.timing().heartbeat() / 2);
                }
            }
            keys.sort_unstable();
            self.renewals.more = full;
            if !keys.is_empty() {
                self.renewals.batch = Some(self.renew(keys, false));
            }
        }
        if self.alone_due_at() <= self.now {
            while let Some(key) = self.renewals.alone_queue.pop_front() {
                if self.leases.get(&key).is_some_and(Held::is_locked) {
                    self.renewals.alone = Some(self.renew(vec![key], true));
                    break;
                }
            }
        }
    }

    fn renew(&mut self, keys: Vec<LeaseKey>, wait: bool) -> UnderWay {
        let request = self.next_request();
        let renew =
            RenewRequest { owner: self.id.clone(), lease: self.timing().lease(), keys: keys.clone(), wait };
        self.actions.push_back(Action::Renew(request, renew));
        UnderWay { request, sent: self.now, keys }
    }

    pub(super) fn renewed(&mut self, request: RequestId, reply: Result<RenewReply, StoreFault>) {
        let asked = |way: &mut UnderWay| way.request == request;
        let batch = self.renewals.batch.take_if(asked);
        let alone = batch.is_none();
        let Some(UnderWay { sent, keys, .. }) = batch.or_else(|| self.renewals.alone.take_if(asked)) else {
            return self
                .observe(Observation::Unexpected { what: "a reply to a renewal that is not under way" });
        };
        match reply {
            Ok(reply) => {
                self.store_answered(sent, reply.db_now);
                if alone {
                    self.renewals.alone_failures = 0;
                } else {
                    self.renewals.failures = 0;
                }
                for (key, answer) in reply.answers {
                    if keys.binary_search(&key).is_ok() {
                        self.renew_answered(key, sent, answer);
                    } else {
                        self.observe(Observation::Unexpected {
                            what: "a renewal's answer for a lease not asked about",
                        });
                    }
                }
                if alone {
                    // Still locked, or not answered at all: again, after the others.
                    self.requeue_alone(&keys);
                }
            }
            Err(fault) => {
                if alone {
                    self.renewals.alone_failures = self.renewals.alone_failures.saturating_add(1);
                    self.renewals.alone_retry_at = self.now.after(self.backoff(self.renewals.alone_failures));
                    self.requeue_alone(&keys);
                } else {
                    self.renewals.failures = self.renewals.failures.saturating_add(1);
                    self.renewals.retry_at = self.now.after(self.backoff(self.renewals.failures));
                    if planted!(self, HeartbeatForgottenOnFailure) {
                        keys.iter().for_each(|key| self.end_heartbeat(*key, HeartbeatEnd::Lost));
                    }
                }
                self.store_failed(StoreCall::Renew, sent, fault, keys);
            }
        }
        if !alone {
            // What ripens from now on waits for the next run: a run that never ended would renew at twice the rate.
            let left = self.ripe().next().is_some();
            self.renewals.more &= left;
        }
    }

    fn requeue_alone(&mut self, keys: &[LeaseKey]) {
        for key in keys {
            if self.leases.get(key).is_some_and(Held::is_locked) {
                self.renewals.alone_queue.push_back(*key);
                self.renewals.alone_retry_at = self
                    .renewals
                    .alone_retry_at
                    .max(self.now.after(self.backoff(self.renewals.alone_failures + 1)));
            }
        }
    }

    fn renew_answered(&mut self, key: LeaseKey, sent: Moment, answer: Answer) {
        let Some(held) = self.leases.get_mut(&key) else { return };
        match (answer, held.heartbeat) {
            (_, Heartbeat::Off) => {}
            (Answer::Applied, heartbeat) => {
                let (before, fenceable) = (held.confirmed, held.can_be_fenced());
                held.confirmed = before.max(if planted!(self, DeadlineFromReply) { self.now } else { sent });
                held.heartbeat = Heartbeat::Batched;
                let confirmed = held.confirmed;
                match heartbeat {
                    Heartbeat::Locked { skipped } => self.locked.remove(&(skipped, key)),
                    Heartbeat::Batched | Heartbeat::Off => self.heartbeats.remove(&(before, key)),
                };
                self.heartbeats.insert((confirmed, key));
                if fenceable {
                    self.fences.remove(&(before, key));
                    self.fences.insert((confirmed, key));
                }
                if planted!(self, HeartbeatOnce) {
                    self.heartbeats.remove(&(confirmed, key));
                }
            }
            // A settle of this lease landed whose reply is still to come, or is to be asked for again.
            (Answer::Ended, _) if matches!(held.phase, Phase::Outcome(_)) => {
                self.end_heartbeat(key, HeartbeatEnd::Settled);
            }
            (Answer::Ended | Answer::Refused, _) => self.lost(key),
            (Answer::Skipped, Heartbeat::Batched) if planted!(self, AloneNever) => {
                self.end_heartbeat(key, HeartbeatEnd::Lost);
            }
            (Answer::Skipped, Heartbeat::Batched) => {
                held.heartbeat = Heartbeat::Locked { skipped: self.now };
                self.heartbeats.remove(&(held.confirmed, key));
                self.locked.insert((self.now, key));
                self.renewals.alone_queue.push_back(key);
            }
            (Answer::Skipped, Heartbeat::Locked { skipped }) => {
                held.heartbeat = Heartbeat::Locked { skipped: self.now };
                self.locked.remove(&(skipped, key));
                self.locked.insert((self.now, key));
            }
        }
    }
}

impl Held {
    fn is_locked(&self) -> bool {
        matches!(self.heartbeat, Heartbeat::Locked { .. })
    }

    pub(super) fn can_be_fenced(&self) -> bool {
        matches!(self.phase, Phase::Queued { .. } | Phase::Behind | Phase::Open)
    }
}
