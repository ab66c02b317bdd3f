//! **S2**: what excuses the loss of a lease, by exactly the conditions of ARCHITECTURE.md.

use crate::fact::{Down, Micros};
use crate::ledger::Lease;
use crate::violation::{Excuse, Excuses};
use crate::waits::LONG;
use crate::{Invariant, Oracle, Sometimes, Verdict, ensure};

/// What ARCHITECTURE.md accepts as a cause for two open requests (rule P12).
pub(crate) const OVERLAP: &[Excuse] =
    &[Excuse::Stopped, Excuse::ClockWrong, Excuse::DbStepped, Excuse::CommitLost, Excuse::Impossible];

/// Of these, what may be seen by whoever has the event later: it can't cause an overlap by what it does itself.
pub(crate) const NEWER: &[Excuse] = &[Excuse::DbStepped, Excuse::CommitLost, Excuse::Impossible];

/// Whoever takes a lease that ran out: its `G`, when its statement began, and when that had the row's lock.
#[derive(Clone, Copy)]
pub(crate) struct Taker {
    pub(crate) grace: u64,
    pub(crate) began: Micros,
    pub(crate) locked: Micros,
}

impl Oracle {
    /// What excuses a lease's holder for losing it now.
    ///
    /// A stop, a missed call or a clock's error before the last renewal that was applied took its lock has done no harm:
    /// only the time since then counts, however late it commits. That is stricter than "since its claim".
    pub(crate) fn excuses(&self, lease: &Lease, taker: Option<Taker>) -> Excuses {
        let holder = &self.workers[lease.worker as usize];
        let terms = self.terms_of(lease.worker);
        let (reach, margin) = (terms.lease + terms.reclaim_grace, terms.fence_margin);
        let (grace, now) = (terms.reclaim_grace, self.now);
        let Taker { grace, began, locked } = taker.unwrap_or(Taker { grace, began: now, locked: now });
        // From the taker's lock on the holder can do nothing more, however late that commits.
        let since =
            lease.granted_at.max(locked.saturating_sub(reach + terms.heartbeat + 2 * terms.store_timeout));
        let calls_since = since.saturating_sub(terms.store_timeout);
        let mut excuses = Excuses::default();
        excuses.add(Excuse::Crashed, matches!(holder.down, Some(Down::Crash | Down::Poison(_))));
        excuses.add(Excuse::Ended, holder.down == Some(Down::Ended));
        excuses.add(Excuse::Stopped, holder.stopped_between(since, locked) > margin);
        excuses.add(Excuse::ClockWrong, self.clock_error(lease.worker, since) > margin);
        // A renewal that waits for a row alone has no answer for as long as somebody keeps that row: no excuse for others.
        let missed = |lane: usize| holder.lanes[lane].double_miss.is_some_and(|at| at >= calls_since);
        let unknown = lease.confirmed == crate::ledger::UNKNOWN;
        excuses.add(Excuse::Unanswered, missed(1) || (unknown && (missed(0) || missed(3))));
        let stepped_since = if lease.renewals == 0 { lease.asked_at } else { lease.granted_at };
        let event = &self.events[lease.event as usize];
        let timeout = terms.store_timeout;
        let locked_now = event.locked_since.map_or(0, |from| self.now - from);
        let locked_for = lease.locked_for + locked_now;
        // A lock and a lost call beside it both ask for their time.
        let (from, to) = event.locked_since.map_or(lease.last_lock, |from| (from, self.now));
        let beside = from.saturating_sub(timeout)..=to + terms.heartbeat + timeout;
        let missed_one =
            holder.lanes[1].last_miss.is_some_and(|at| at >= calls_since && beside.contains(&at));
        let no_room = missed_one && locked_for > 0 && !terms.has_room_for_locks(locked_for);
        let row_locked = locked_now > timeout
            || event.long_locks.iter().any(|(until, held)| *until >= since && *held > timeout)
            || no_room;
        excuses.add(Excuse::RowLocked, row_locked);
        excuses.add(Excuse::DbStepped, self.db.stepped_since(stepped_since.min(began)) > grace);
        excuses.add(Excuse::CommitLost, event.restored_at.is_some_and(|at| at >= lease.claimed_at));
        excuses.add(Excuse::Draining, self.drain_gives_up(lease.worker));
        excuses.add(Excuse::BornDead, lease.born_dead);
        excuses.add(Excuse::Impossible, lease.impossible);
        excuses
    }

    /// **S2**, the other way to lose an event: a holder to whom nothing at all happened has no reason to give it back.
    pub(crate) fn check_given_back(&mut self, lease: u32) -> Verdict {
        let book = &self.leases[lease as usize];
        let holder = &self.workers[book.worker as usize];
        let terms = self.terms_of(book.worker);
        let since = book.claimed_at.saturating_sub(terms.lease);
        let locked = if book.end.is_some() { book.locked_to_end } else { book.locked_for };
        let troubled = book.confirmed == crate::ledger::UNKNOWN
            || !self.excuses(book, None).none()
            // A drain gives back what was not started, and in its last 2R the rest (rule P8).
            || (holder.drain_began.is_some() && !book.opened)
            || holder.stopped_between(since, self.now) > 0
            || holder.clock_stepped_since(0) > 0
            || holder.worst_ppm > 0
            || holder.last_miss.is_some_and(|at| at >= since)
            || self.db.stepped_since(since) > 0
            || self.events[book.event as usize].restored_at.is_some()
            || book.locked_long
            // One lock after another leaves no time for a renewal between them, nor does one where each call takes nearly
            // `R`.
            || locked > terms.store_timeout
            || !terms.has_room_for_locks(locked);
        if troubled {
            self.stats.unchecked[Invariant::S2 as usize] += 1;
            return Ok(());
        }
        self.stats.checked[Invariant::S2 as usize] += 1;
        ensure!(
            self,
            S2,
            false,
            "worker {} gave event {} back after {} us, though nothing was wrong with it",
            book.worker,
            book.event,
            self.now - book.claimed_at
        );
        Ok(())
    }

    /// Whether a worker may have come to the last `2R` of its drain, in which it breaks off what is open (rule P8).
    fn drain_gives_up(&self, worker: u32) -> bool {
        let terms = self.terms_of(worker);
        self.workers[worker as usize].drain_began.is_some_and(|began| {
            let took = self.now - began + self.clock_error(worker, began);
            took + 2 * terms.store_timeout >= terms.drain_timeout
        })
    }

    /// By how much a worker's clock may have gone wrong since then.
    pub(crate) fn clock_error(&self, worker: u32, since: Micros) -> u64 {
        let book = &self.workers[worker as usize];
        let drift = book.worst_ppm * (self.now - since) / 1_000_000;
        drift + book.clock_stepped_since(since)
    }

    /// A lease ended, taken by somebody or not: counts whether the promise held for it.
    pub(crate) fn lease_over(&mut self, lease: u32, taker: Option<Taker>) -> Excuses {
        let book = &self.leases[lease as usize];
        let excuses = self.excuses(book, taker);
        if excuses.none() {
            self.stats.healthy += 1;
            self.stats.healthy_renewed += u64::from(book.renewals > 0);
        } else {
            for excuse in Excuse::ALL {
                self.stats.excused[*excuse as usize] += u64::from(excuses.has(*excuse));
            }
        }
        excuses
    }

    /// Remembers a lock that was let go of now, if it was held for long.
    pub(crate) fn note_lock(&mut self, event: u32, since: Micros) {
        let held = self.now - since;
        let book = &mut self.events[event as usize];
        if held > LONG {
            while book.long_locks.pop_if(|(_, other)| *other <= held).is_some() {}
            book.long_locks.push((self.now, held));
        }
        if book.lease != crate::ledger::NONE {
            let lease = book.lease as usize;
            let beyond = held > self.terms_of(self.leases[lease].worker).store_timeout;
            self.leases[lease].locked_long |= beyond;
        }
        let book = &self.events[event as usize];
        let now = self.db.at(self.now);
        if book.lease != crate::ledger::NONE && book.until < now && self.db.at(since) < book.until {
            self.stats.saw(Sometimes::ExpiredUnderLock);
        }
    }
}
