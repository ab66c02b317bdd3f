//! Workers and their calls: the conditions of **S2**, **S9**'s single renewal, **L4**.

use crate::clock::LocalClock;
use crate::embargo::Outage;
use crate::fact::{Down, Lane, Micros, Status};
use crate::ledger::{Call, Event, LaneBook, Link, NONE, UNKNOWN, Worker};
use crate::{Oracle, Sometimes, Verdict, ensure};

/// A real driver may see a signal somewhat later than it came.
const TOLD: u64 = 20_000;

/// How many leases a statement renews at most (rule P5).
const MOST_RENEWED: u32 = 1_000;

impl Oracle {
    pub(crate) fn worker_up(&mut self, worker: u32, terms: u16, local: i64, ppm: i32) -> Verdict {
        debug_assert_eq!(worker as usize, self.workers.len(), "workers are numbered in order");
        self.workers.push(Worker {
            terms,
            clock: LocalClock::new(self.now, local, ppm),
            down: None,
            stops: Vec::new(),
            stopped_since: None,
            still_since: None,
            clock_steps: Vec::new(),
            set_back: 0,
            shown: local,
            worst_ppm: u64::from(ppm.unsigned_abs()),
            lanes: [LaneBook::default(); 4],
            last_miss: None,
            outage: Outage::default(),
            drain_began: None,
            open: 0,
            open_by_destination: Vec::new(),
            held: 0,
            counted: 0,
            counted_by_destination: Vec::new(),
            told_at: None,
            ahead_since: None,
            told_ahead: None,
            met_store: None,
            claims_missed: 0,
            claims_back: 0,
            claimed_at: 0,
            unsettled_since: None,
            quiet_since: 0,
        });
        Ok(())
    }

    pub(crate) fn worker_stopped(&mut self, worker: u32) -> Verdict {
        let now = self.now;
        self.workers[worker as usize].stopped_since.get_or_insert(now);
        self.workers[worker as usize].quiet_since = now;
        Ok(())
    }

    pub(crate) fn worker_continued(&mut self, worker: u32) -> Verdict {
        let lease = self.terms_of(worker).lease;
        let book = &mut self.workers[worker as usize];
        if let Some(since) = book.stopped_since.take() {
            book.stops.push((since, self.now));
            if self.now - since > lease {
                self.stats.saw(Sometimes::StopBeyondLease);
            }
        }
        self.workers[worker as usize].quiet_since = self.now;
        Ok(())
    }

    pub(crate) fn worker_clock(&mut self, worker: u32, local: i64, ppm: i32) -> Verdict {
        let book = &mut self.workers[worker as usize];
        let before = book.clock.at(self.now);
        book.shown = book.shown.max(before);
        let off = local - before;
        if off.unsigned_abs() > 1 {
            book.clock_steps.push((self.now, off.unsigned_abs()));
            book.set_back += u64::try_from(-off).unwrap_or(0);
        }
        // What a clock misses while it stands still is a step when it goes on.
        if let Some(since) = book.still_since.take() {
            book.clock_steps.push((self.now, self.now - since));
        }
        if ppm == crate::STANDS_STILL {
            book.still_since = Some(self.now);
        }
        if ppm != crate::STANDS_STILL {
            book.worst_ppm = book.worst_ppm.max(u64::from(ppm.unsigned_abs()));
        }
        book.clock = LocalClock::new(self.now, local, ppm);
        self.workers[worker as usize].quiet_since = self.now;
        Ok(())
    }

    pub(crate) fn worker_down(&mut self, worker: u32, how: Down) -> Verdict {
        self.sockets_closed(worker, how)?;
        if how == Down::Ended {
            self.check_drain(worker)?;
            self.check_left(worker)?;
            self.check_empty(worker)?;
            let unsettled = self.workers[worker as usize].held > 0;
            self.stats.saw(if unsettled { Sometimes::DrainUnsettled } else { Sometimes::DrainClean });
        }
        let book = &mut self.workers[worker as usize];
        if let Some(since) = book.stopped_since.take() {
            book.stops.push((since, self.now));
        }
        book.down = Some(how);
        self.quiet_since = self.now;
        Ok(())
    }

    /// **L4**: the timeout, by the worker's own clock while it was running.
    fn check_drain(&mut self, worker: u32) -> Verdict {
        let book = &self.workers[worker as usize];
        let Some(began) = book.drain_began else { return Ok(()) };
        let terms = self.terms_of(worker);
        let took = self.now - began - book.stopped_between(began, self.now);
        let drift = took * book.worst_ppm / 900_000 + book.clock_stepped_since(0);
        let bound = terms.drain_timeout + drift + 10_000;
        ensure!(
            self,
            L4,
            took <= bound,
            "worker {worker} has drained for {took} us, allowed are {}",
            terms.drain_timeout
        );
        Ok(())
    }

    /// **L4**: where nothing went wrong, a drain leaves no lease.
    fn check_left(&mut self, worker: u32) -> Verdict {
        let book = &self.workers[worker as usize];
        let Some(began) = book.drain_began.filter(|_| book.held > 0) else { return Ok(()) };
        let timeout = self.terms_of(worker).store_timeout;
        let mine = |event: &&Event| event.lease != NONE && self.leases[event.lease as usize].worker == worker;
        let kept = self.events.iter().filter(mine).all(|event| {
            let lease = &self.leases[event.lease as usize];
            event.locked_since.is_some()
                || event.restored_at.is_some()
                || lease.locked_long
                || lease.settle_skipped
                || lease.stray
        });
        // An abort may take half of `M`, and then there must be time for a settle.
        let in_time = self.terms_of(worker).fence_margin / 2 <= timeout;
        let troubled = self.slow_rows
            || !in_time
            || kept
            || book.stopped_between(began.saturating_sub(timeout), self.now) > 0
            || self.clock_error(worker, 0) > 0
            || book.last_miss.is_some_and(|at| at + timeout >= began);
        ensure!(self, L4, troubled, "worker {worker} leaves {} leases after a drain", book.held);
        Ok(())
    }

    /// **L1**: a worker that nobody told to drain ends by itself only if nothing was pending as its last claim began.
    fn check_empty(&mut self, worker: u32) -> Verdict {
        let book = &self.workers[worker as usize];
        if book.drain_began.is_none() {
            let left = self.events.iter().position(|event| {
                event.exists && event.status == Status::Pending && event.pending_since < book.claimed_at
            });
            ensure!(
                self,
                L1,
                left.is_none(),
                "worker {worker} ended by itself while event {left:?} was pending"
            );
            self.stats.saw(Sometimes::EndedEmpty);
        }
        Ok(())
    }

    pub(crate) fn workers_finished(&mut self) -> Verdict {
        for worker in 0..self.workers.len() as u32 {
            if self.workers[worker as usize].down.is_none() {
                self.check_drain(worker)?;
            }
        }
        Ok(())
    }

    pub(crate) fn call_sent(&mut self, worker: u32, call: u32, lane: Lane, renews: u32) -> Verdict {
        debug_assert_eq!(call as usize, self.calls.len(), "calls are numbered in order");
        let cut_off = self.is_cut_off(worker);
        let now = self.now;
        let book = &mut self.workers[worker as usize];
        let sent_local = book.clock.at(self.now);
        self.calls.push(Call { lane, sent: self.now, sent_local, over: false, cut_off, applied: NONE });
        if lane == Lane::Claim {
            book.claimed_at = self.now;
            let draining = book.drain_began.map(|began| now - began - book.stopped_between(began, now));
            let told = draining.is_none_or(|since| since <= TOLD);
            ensure!(self, L4, told, "worker {worker} claims, though it drains");
            self.check_settles_first(worker)?;
        }
        let book = &mut self.workers[worker as usize];
        let under_way = &mut book.lanes[lane.number()].under_way;
        *under_way += 1;
        let under_way = *under_way;
        ensure!(self, S9, under_way == 1, "worker {worker} has {under_way} calls of lane {lane:?} under way");
        ensure!(self, S9, renews <= MOST_RENEWED, "worker {worker} renews {renews} leases in one statement");
        if renews == MOST_RENEWED {
            self.stats.saw(Sometimes::FullRenewal);
        }
        Ok(())
    }

    /// **S9**, rule P6: who can't settle takes nothing more. A real driver may send a claim that was wanted just before.
    fn check_settles_first(&self, worker: u32) -> Verdict {
        let book = &self.workers[worker as usize];
        let since = book.unsettled_since.unwrap_or(self.now);
        let known_for = self.now - since - book.stopped_between(since, self.now);
        ensure!(self, S9, known_for <= TOLD, "worker {worker} claims, though its last settle had no answer");
        Ok(())
    }

    pub(crate) fn call_answered(&mut self, worker: u32, call: u32, arrived: Micros) -> Verdict {
        let timeout = self.terms_of(worker).store_timeout;
        let book = &mut self.calls[call as usize];
        if book.over {
            return Ok(());
        }
        book.over = true;
        let Call { lane, sent, sent_local, mut applied, .. } = *book;
        if lane == Lane::Claim {
            self.longest_claim = self.longest_claim.max(self.now - sent);
        }
        while applied != NONE {
            let link = self.links[applied as usize];
            let lease = &mut self.leases[link.lease as usize];
            if lease.confirmed == UNKNOWN {
                lease.known_since = self.now;
            }
            lease.confirmed = lease.confirmed.max(sent_local);
            lease.locked_for = 0;
            // Of two copies of it the worker may have the answer of the other one, and of another call one that is to come.
            lease.skipped =
                lease.skipped.filter(|skipped| *skipped == call || !self.calls[*skipped as usize].over);
            applied = link.next;
        }
        self.call_met(worker, lane, sent);
        let now = self.now;
        let holder = &mut self.workers[worker as usize];
        let lane_book = &mut holder.lanes[lane.number()];
        lane_book.under_way = lane_book.under_way.saturating_sub(1);
        if arrived - sent <= timeout {
            lane_book.misses = 0;
        } else {
            lane_book.misses = lane_book.misses.saturating_add(1);
            lane_book.last_miss = Some(now);
            if lane_book.misses >= 2 {
                lane_book.double_miss = Some(now);
            }
        }
        match lane {
            Lane::Claim => {
                holder.met_store.get_or_insert(now);
                holder.claims_missed = 0;
            }
            Lane::Settle => holder.unsettled_since = None,
            Lane::Owned | Lane::Renew | Lane::RenewAlone => {}
        }
        self.told_the_time(worker, lane, sent);
        Ok(())
    }

    /// Rule P4: the database's clock is being stepped. Ahead by more than `M` and two round trips, no reply hides it from a
    /// worker that knew the time before.
    pub(crate) fn ran_ahead(&mut self, by: i64) {
        for worker in 0..self.workers.len() as u32 {
            let terms = *self.terms_of(worker);
            let book = &mut self.workers[worker as usize];
            let before = book.told_at.is_some_and(|at| self.db.stepped_since(at) == 0);
            let plain = before && book.ahead_since.is_none() && book.is_steady();
            let least = terms.fence_margin + 2 * terms.store_timeout;
            book.ahead_since = (plain && by > least as i64).then_some(self.now);
        }
    }

    /// A reply to a call that was sent after the step shows it. One to a settle may be a refusal, which shows no time.
    fn told_the_time(&mut self, worker: u32, lane: Lane, sent: Micros) {
        if lane == Lane::Settle {
            return;
        }
        let book = &mut self.workers[worker as usize];
        book.told_at = book.told_at.max(Some(sent));
        if let Some(since) = book.ahead_since
            && since < sent
        {
            book.ahead_since = None;
            if book.is_steady() && book.stopped_between(since, self.now) == 0 {
                book.told_ahead = Some((since, self.now));
                if book.open > 0 {
                    self.stats.saw(Sometimes::ToldAhead);
                }
            }
        }
    }

    pub(crate) fn call_failed(&mut self, worker: u32, call: u32) -> Verdict {
        let now = self.now;
        let book = &mut self.calls[call as usize];
        book.over = true;
        let Call { lane, sent, .. } = *book;
        if lane == Lane::Claim {
            self.longest_claim = self.longest_claim.max(now - sent);
        }
        self.call_missed(worker, sent);
        let holder = &mut self.workers[worker as usize];
        let lane_book = &mut holder.lanes[lane.number()];
        lane_book.under_way = lane_book.under_way.saturating_sub(1);
        lane_book.misses = lane_book.misses.saturating_add(1);
        lane_book.last_miss = Some(now);
        if lane_book.misses >= 2 {
            lane_book.double_miss = Some(now);
        }
        // A renewal that waits for a row has no answer for as long as somebody keeps that.
        if lane != Lane::RenewAlone {
            holder.quiet_since = now;
            holder.last_miss = Some(now);
        }
        match lane {
            Lane::Settle => _ = holder.unsettled_since.get_or_insert(now),
            Lane::Claim => {
                holder.claims_missed = holder.claims_missed.saturating_add(1);
                if holder.claims_missed > 1 {
                    let terms = &self.terms[usize::from(holder.terms)];
                    let pause = terms.poll_interval.saturating_mul(1 << (holder.claims_missed - 1).min(16));
                    holder.claims_back = now + pause.min(terms.lease);
                }
                self.forget_claim(call);
            }
            Lane::Owned | Lane::Renew | Lane::RenewAlone => {}
        }
        Ok(())
    }

    /// A claim has no answer: its worker learns of what it took by a look.
    fn forget_claim(&mut self, call: u32) {
        let mut applied = self.calls[call as usize].applied;
        while applied != NONE {
            let Link { lease, next } = self.links[applied as usize];
            self.forgotten(lease, false);
            applied = next;
        }
    }
}
