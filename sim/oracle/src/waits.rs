//! How long events wait, until a claim has their lock: **L2** and **L3**. That it commits late is the store's doing.

use crate::fact::{DbMicros, Lane, Micros};
use crate::ledger::Worker;
use crate::store::{Claim, PROBATION};
use crate::{Invariant, Oracle, Sometimes, Verdict, ensure};

/// What claims and searches find that start where the last one ended.
pub(crate) const LATE: i64 = 1_000_000;

/// What has a row's lock for longer than that is more than a statement in passing.
pub(crate) const LONG: Micros = 1_000;

/// How far back a claim starts at least that starts ahead of the front.
const LEAST_BACK: i64 = 64_000_000;

impl Oracle {
    /// Since when claims could have taken whatever is due: a worker knows the store and nothing has gone wrong.
    pub(crate) fn ready_since(&self) -> Option<Micros> {
        self.ready().map(|(_, ready)| ready).min()
    }

    /// Who could have taken it, and since when.
    fn ready(&self) -> impl Iterator<Item = (&Worker, Micros)> {
        let ready = self.workers.iter().filter(|worker| {
            worker.down.is_none() && worker.stopped_since.is_none() && worker.drain_began.is_none()
        });
        let ready = ready.filter(|worker| worker.worst_ppm < 1_000);
        // A clock that was set back, also while it stood still, does not move until it has made up for it.
        let settled = |worker: &Worker| {
            let last = worker.clock_steps.last().map_or(0, |(at, _)| *at);
            last + worker.clock_stepped_since(0)
        };
        let ready = ready.filter(|_| self.roomy && self.db_up);
        ready.filter_map(move |worker| {
            let quiet = self.quiet_since.max(worker.quiet_since).max(worker.claims_back);
            Some((worker, worker.met_store?.max(settled(worker)).max(quiet)))
        })
    }

    /// **L2**: an orphan is taken within `L + G`, one search and, under an embargo, one `L` more, all by the settings of
    /// whoever could take it first; by a search that starts
    /// ahead of the front of the leases if its claim committed more than a second after it took its token, by the most
    /// that the database's clock ever showed, or if the database lost commits.
    pub(crate) fn check_orphan(&mut self, claim: Claim) -> Verdict {
        let event = &self.events[claim.event as usize];
        let overdue = u64::try_from(self.db.at(self.now) - event.until).unwrap_or(0);
        let ran_out = self.now.saturating_sub(overdue);
        // Who has missed answers to claims may take one lease at a time, and what is locked has the seat of what is behind.
        let ahead = self.events.iter().filter(|other| other.due <= event.due);
        let seat_kept = ahead.map(|other| other.unlocked_at).max().unwrap_or(0);
        let bounds = self.ready().filter(|_| event.reclaims + 1 < PROBATION).map(|(worker, ready)| {
            let terms = &self.terms[usize::from(worker.terms)];
            let missed = worker.lanes[Lane::Claim.number()].last_miss.is_some();
            let seat = if missed { seat_kept } else { event.unlocked_at };
            (ran_out + terms.reclaim_grace).max(seat).max(ready + terms.lease)
                + terms.search_interval(self.longest_claim)
                + 4 * terms.store_timeout
        });
        let Some(bound) = bounds.min() else {
            self.stats.unchecked[Invariant::L2 as usize] += 1;
            return Ok(());
        };
        self.stats.checked[Invariant::L2 as usize] += 1;
        let lease = &self.leases[event.lease as usize];
        let behind = lease.behind || event.restored_at.is_some();
        let age = self.db_highest.max(self.db.at(self.now)) - lease.token.saturating_mul(1_000);
        let bound = bound + if behind { self.rescan(age) } else { 0 };
        if behind {
            self.stats.saw(Sometimes::LeaseBehind);
        }
        ensure!(
            self,
            L2,
            claim.locked <= bound,
            "event {} ran out {} us ago and was taken {} us late",
            claim.event,
            overdue,
            claim.locked - bound
        );
        Ok(())
    }

    /// **L3**: what is due is taken by the next poll, or by a claim that starts ahead of the front of the queue if it came
    /// into it more than a second after it was due, by the most that the database's clock ever showed.
    pub(crate) fn check_wait(&mut self, claim: Claim, attempted: bool) -> Verdict {
        let event = &self.events[claim.event as usize];
        let Some(ready) = self.ready_since().filter(|_| attempted && event.reclaims < PROBATION) else {
            self.stats.unchecked[Invariant::L3 as usize] += 1;
            return Ok(());
        };
        self.stats.checked[Invariant::L3 as usize] += 1;
        let overdue = u64::try_from(self.db.at(self.now) - event.due).unwrap_or(0);
        let poll = self.longest_poll();
        let late = self.db.at(event.freed_at).max(self.db_highest) - event.due > LATE;
        let bound = (self.now - overdue.min(self.now)).max(event.freed_at).max(event.unlocked_at).max(ready)
            + poll
            + if late { self.rescan(self.db_highest.max(self.db.at(self.now)) - event.due) } else { 0 };
        if late {
            self.stats.saw(Sometimes::CameLate);
        }
        ensure!(
            self,
            L3,
            claim.locked <= bound,
            "event {} was due {overdue} us ago and was taken {} us late",
            claim.event,
            claim.locked - bound
        );
        Ok(())
    }

    /// How long what is due may wait: for the next poll itself, looks that unknown claims ask for and that go first, and
    /// claims that came too late to begin (rule P7). With calls that take most of `R` each there were two of these, and
    /// five looks.
    pub(crate) fn longest_poll(&self) -> Micros {
        self.terms.iter().map(|terms| terms.poll_interval + 8 * terms.store_timeout).max().unwrap_or(0)
    }

    /// How long what is ahead of the front by that much waits. Where claims that start ahead of it took too long, they
    /// start a minute back, and each that takes little doubles that; the first is measured by claims from before.
    fn rescan(&self, age: DbMicros) -> Micros {
        let turns = (age.max(0) / LEAST_BACK).checked_ilog2().map_or(1, |doubled| doubled + 2) + 1;
        let longest = self.terms.iter().map(|terms| terms.rescan_interval(self.longest_claim)).max();
        longest.unwrap_or(0) * u64::from(turns)
    }

    /// Somebody's transaction is over, and it kept the row from its holder too.
    pub(crate) fn unlocked(&mut self, event: u32, locked: Micros) {
        let since = self.lock_over(event, locked, LONG);
        self.note_lock(event, since);
    }

    /// Somebody's transaction is over. Where they had the row's lock for longer than `least`, one or several that waited
    /// for each other, no claim could have taken it until now. Answers since when they had it.
    pub(crate) fn lock_over(&mut self, event: u32, locked: Micros, least: Micros) -> Micros {
        let event = &mut self.events[event as usize];
        let since = if locked <= event.locked.1 { event.locked.0 } else { locked };
        event.locked = (since, self.now);
        if self.now - since > least {
            event.unlocked_at = self.now;
        }
        since
    }
}
