//! What commits: **S1**, **S2**, **S5**, **S6**, **S7**, **S8**, and the waiting times **L2** and **L3**.

use crate::fact::{Answer, DbMicros, Down, Micros, Settle, Spent, Status};
use crate::health::Taker;
use crate::ledger::{Event, Lease, Link, NONE, UNKNOWN, entry};
use crate::violation::{Excuse, Excuses};
use crate::waits::LATE;
use crate::{Change, Invariant, Oracle, RowState, Sometimes, Verdict, ensure};

/// A claim of one row.
#[derive(Clone, Copy)]
pub(crate) struct Claim {
    pub(crate) worker: u32,
    pub(crate) call: u32,
    pub(crate) event: u32,
    pub(crate) began: Micros,
    pub(crate) locked: Micros,
}

/// A guarded write of one row.
#[derive(Clone, Copy)]
pub(crate) struct Guarded {
    pub(crate) worker: u32,
    pub(crate) call: u32,
    pub(crate) event: u32,
    pub(crate) token: i64,
    pub(crate) answer: Answer,
    pub(crate) locked: Micros,
}

/// Run-outs from which an event is on probation.
pub(crate) const PROBATION: u32 = 3;

impl Oracle {
    pub(crate) fn event_committed(
        &mut self,
        id: u32,
        destination: u16,
        (attempts, max_attempts): (u32, u32),
        due: DbMicros,
    ) {
        debug_assert_eq!(id as usize, self.events.len(), "events are numbered in order");
        self.pending += 1;
        self.events.push(Event {
            exists: true,
            status: Status::Pending,
            pending_since: self.now,
            destination,
            attempts,
            max_attempts,
            due,
            reclaims: 0,
            top_token: 0,
            token: 0,
            lease: NONE,
            until: 0,
            last: NONE,
            open: 0,
            successes: 0,
            poison: false,
            sendable: true,
            other_run_outs: 0,
            owners: 0,
            ended_late: false,
            restored_at: None,
            locked_since: None,
            long_locks: Vec::new(),
            freed_at: self.now,
            unlocked_at: 0,
            locked: (0, 0),
        });
    }

    fn count(&mut self, status: Status, by: i32) {
        let count = match status {
            Status::Pending => &mut self.pending,
            Status::Delivered => &mut self.delivered,
            Status::Failed => &mut self.failed,
        };
        *count = count.saturating_add_signed(by);
    }

    fn move_to(&mut self, event: u32, status: Status) {
        let book = &mut self.events[event as usize];
        let before = std::mem::replace(&mut book.status, status);
        if status == Status::Pending && before != status {
            book.pending_since = self.now;
        }
        self.count(before, -1);
        self.count(status, 1);
    }

    /// What a row is, as a statement that reads the clock at `time` finds it.
    fn state(&self, event: u32, time: Micros) -> RowState {
        let book = &self.events[event as usize];
        match book.status {
            Status::Delivered => RowState::Delivered,
            Status::Failed => RowState::Failed,
            Status::Pending if book.lease == NONE && book.due <= self.db.at(time) => RowState::Due,
            Status::Pending if book.lease == NONE => RowState::Waiting,
            Status::Pending if book.until > self.db.at(time) => RowState::Live,
            Status::Pending => RowState::Expired,
        }
    }

    fn met(&mut self, event: u32, time: Micros, change: Change) {
        let state = self.state(event, time);
        self.stats.matrix[state as usize][change as usize] += 1;
    }

    /// Everything that must hold before a claim may take a row, or fail it. Ends the lease that ran out.
    fn claimable(&mut self, claim: Claim, attempted: bool) -> Result<bool, crate::Violation> {
        let Claim { worker, call, event, began, locked } = claim;
        let early = self.db.at(began);
        let grace = self.terms_of(worker).reclaim_grace;
        let book = &self.events[event as usize];
        ensure!(
            self,
            S7,
            book.status == Status::Pending,
            "event {event} is {:?} and was claimed",
            book.status
        );
        ensure!(self, S8, book.exists, "event {event} was never committed and was claimed");
        ensure!(
            self,
            S6,
            book.due <= early,
            "event {event} was claimed {} us before its next attempt was due",
            book.due - early
        );
        let lease = book.lease;
        if lease == NONE {
            self.check_wait(claim, attempted)?;
            return Ok(false);
        }
        ensure!(
            self,
            S1,
            book.until + grace as i64 <= early,
            "event {event} was taken from worker {} by worker {worker} while its lease and grace had {} us to run",
            self.leases[lease as usize].worker,
            book.until + grace as i64 - early
        );
        ensure!(
            self,
            S2,
            !self.under_embargo(worker, call, began),
            "worker {worker} took event {event} from its holder in an outage, or within L of its end"
        );
        self.check_orphan(claim)?;
        if self.leases[lease as usize].open {
            self.stats.saw(Sometimes::ReclaimWhileOpen);
        }
        let excuses = self.lease_over(lease, Some(Taker { grace, began, locked }));
        self.leases[lease as usize].lost = excuses;
        let holder = self.leases[lease as usize].worker;
        ensure!(
            self,
            S2,
            !excuses.none(),
            "event {event} was taken from worker {holder}, a healthy holder of token {} since {} us, by worker {worker}",
            self.leases[lease as usize].token,
            self.now - self.leases[lease as usize].claimed_at
        );
        self.stats.checked[Invariant::S2 as usize] += 1;
        self.stats.reclaims_excused += 1;
        let by_poison = matches!(self.workers[holder as usize].down, Some(Down::Poison(_)));
        self.unlease(event);
        self.note_lock(event, locked);
        let book = &mut self.events[event as usize];
        book.reclaims += 1;
        book.other_run_outs += u32::from(!by_poison);
        Ok(true)
    }

    fn unlease(&mut self, event: u32) {
        let book = &mut self.events[event as usize];
        book.freed_at = self.now;
        let lease = std::mem::replace(&mut book.lease, NONE);
        if lease != NONE {
            self.count_held(lease, -1);
        }
    }

    fn lease_to(&mut self, event: u32, lease: u32, until: DbMicros) {
        let book = &mut self.events[event as usize];
        (book.lease, book.until) = (lease, until);
        self.count_held(lease, 1);
    }

    fn count_held(&mut self, lease: u32, by: i32) {
        let book = &self.leases[lease as usize];
        let destination = self.events[book.event as usize].destination;
        let holder = &mut self.workers[book.worker as usize];
        let add = |count: &mut u32, counted: bool| {
            if counted {
                *count = count.saturating_add_signed(by);
            }
        };
        add(&mut holder.held, true);
        add(&mut holder.counted, !book.stray);
        add(entry(&mut holder.counted_by_destination, destination), book.is_known());
    }

    /// What the holder of a lease knows of it is less from now on.
    pub(crate) fn forgotten(&mut self, lease: u32, stray: bool) {
        let event = self.leases[lease as usize].event;
        let in_force = self.events[event as usize].lease == lease;
        if in_force {
            self.count_held(lease, -1);
        }
        let book = &mut self.leases[lease as usize];
        (book.stray, book.orphan) = (book.stray || stray, true);
        if in_force {
            self.count_held(lease, 1);
        }
    }

    pub(crate) fn claimed(&mut self, claim: Claim, token: i64, until: DbMicros, reclaimed: bool) -> Verdict {
        let Claim { worker, call, event, began, locked } = claim;
        self.late_commit(call);
        self.met(event, began, Change::Grant);
        let was_leased = self.claimable(claim, true)?;
        let terms = *self.terms_of(worker);
        let book = &self.events[event as usize];
        ensure!(
            self,
            S1,
            reclaimed == was_leased,
            "the claim of event {event} took a run-out for none, or the reverse"
        );
        let late = self.db.at(locked);
        ensure!(
            self,
            S1,
            until == late + terms.lease as i64,
            "a claim of event {event} gave {} us instead of L",
            until - late
        );
        // A lost number comes again only if the clock went back as well.
        let again = self.last_loss.is_some() && self.db.stepped_since(1) > 0 && token > book.token;
        ensure!(
            self,
            S5,
            token > book.top_token || again,
            "event {event} got token {token} after {}",
            book.top_token
        );
        let limit = terms.tries(book.max_attempts);
        ensure!(
            self,
            S6,
            book.attempts < limit,
            "event {event} was leased with {} of {limit} tries spent",
            book.attempts
        );
        if book.reclaims >= PROBATION {
            self.stats.saw(Sometimes::Probation);
        }
        // A lost number that comes again to the same worker is one lease to it: its request goes on under this one, and its
        // outcome may still be settled.
        let (mut open, mut opened_at, mut confirmed) = (false, 0, UNKNOWN);
        let (mut end_before, mut known) = (None, UNKNOWN);
        if let Some(same) = self.find(event, worker, token) {
            let same = &mut self.leases[same as usize];
            (end_before, known) = (same.end.or(same.end_before), same.known);
            if std::mem::take(&mut same.open) {
                (open, opened_at, confirmed) = (true, same.opened_at, same.confirmed);
            }
        }
        let book = &self.events[event as usize];
        let lease = self.leases.len() as u32;
        self.leases.push(Lease {
            event,
            worker,
            token,
            asked_at: self.calls[call as usize].sent,
            claimed_at: self.now,
            granted_at: locked,
            renewals: 0,
            confirmed,
            open,
            opened: open,
            opened_at,
            end: None,
            end_before,
            known,
            impossible: false,
            lost: Excuses::default(),
            skipped: None,
            settle_skipped: false,
            stray: self.calls[call as usize].over,
            orphan: false,
            asked_local: self.calls[call as usize].sent_local,
            known_since: Micros::MAX,
            closed_at: 0,
            locked_long: false,
            locked_for: 0,
            last_lock: (0, 0),
            locked_to_end: 0,
            born_dead: until <= self.db.at(self.now)
                || self.calls[call as usize].over
                    && until <= self.db.at(self.now) + terms.hardly_given_back() as i64,
            behind: self.db_highest.max(self.db.at(self.now)) - token.saturating_mul(1_000) > LATE,
            before: book.last,
        });
        let another = book.last == NONE || self.leases[book.last as usize].worker != worker;
        let book = &mut self.events[event as usize];
        book.last = lease;
        (book.token, book.top_token) = (token, book.top_token.max(token));
        book.owners += u32::from(another);
        if book.owners == 3 {
            self.stats.saw(Sometimes::ThreeOwners);
        }
        self.lease_to(event, lease, until);
        self.link(call, lease);
        self.check_probation(lease)?;
        self.check_share(worker, event)
    }

    /// **S9**, rule P11: of events on probation a worker takes one at a time.
    fn check_probation(&self, lease: u32) -> Verdict {
        let Lease { event, worker, .. } = self.leases[lease as usize];
        let on_probation = |event: &&Event| {
            let book = (event.lease != NONE).then(|| &self.leases[event.lease as usize]);
            event.reclaims >= PROBATION && book.is_some_and(|book| book.worker == worker && book.is_known())
        };
        if self.events[event as usize].reclaims >= PROBATION {
            let held = self.events.iter().filter(on_probation).count();
            ensure!(self, S9, held <= 1, "worker {worker} holds {held} events on probation");
        }
        Ok(())
    }

    /// **S9** as the store sees it.
    fn check_share(&mut self, worker: u32, event: u32) -> Verdict {
        let terms = *self.terms_of(worker);
        let destination = self.events[event as usize].destination;
        let holder = &mut self.workers[worker as usize];
        self.stats.checked[Invariant::S9 as usize] += 1;
        let (held, there) = (holder.counted, *entry(&mut holder.counted_by_destination, destination));
        ensure!(
            self,
            S9,
            held <= terms.max_leased,
            "worker {worker} holds {held} of {} leases",
            terms.max_leased
        );
        let share = 2 * terms.max_in_flight_per_destination;
        ensure!(
            self,
            S9,
            there <= share,
            "worker {worker} holds {there} leases of one destination, share {share}"
        );
        Ok(())
    }

    pub(crate) fn claim_failed(&mut self, claim: Claim, why: Spent) -> Verdict {
        let Claim { worker, call, event, began, .. } = claim;
        self.late_commit(call);
        let change = match why {
            Spent::Attempts => Change::FailAttempts,
            Spent::Reclaims => Change::FailReclaims,
            Spent::Bound => {
                ensure!(
                    self,
                    S6,
                    false,
                    "a claim failed event {event} for a bound that no number comes near"
                );
                return Ok(());
            }
        };
        self.met(event, began, change);
        if self.claimable(claim, false)? {
            // Taken from an owner: the token rose, to a number that nobody is told.
            self.events[event as usize].token = i64::MAX;
        }
        let terms = *self.terms_of(worker);
        let book = &self.events[event as usize];
        match why {
            Spent::Attempts => {
                let limit = terms.tries(book.max_attempts);
                ensure!(
                    self,
                    S6,
                    book.attempts >= limit,
                    "a claim failed event {event} after {} of {limit} tries",
                    book.attempts
                );
                self.stats.saw(Sometimes::ClaimAttemptsSpent);
            }
            Spent::Reclaims => {
                ensure!(
                    self,
                    S6,
                    terms.reclaim_limit > 0 && book.reclaims > terms.reclaim_limit,
                    "a claim failed event {event} after {} run-outs, allowed are {}",
                    book.reclaims,
                    terms.reclaim_limit
                );
                ensure!(
                    self,
                    S6,
                    book.poison || book.other_run_outs > 0,
                    "event {event} is innocent: its run-outs are another event's doing, and a claim failed it"
                );
                self.stats.saw(Sometimes::ClaimReclaimsSpent);
            }
            Spent::Bound => {}
        }
        self.move_to(event, Status::Failed);
        Ok(())
    }

    /// **S5**: whether the guard's answer is the true one.
    fn guard(&mut self, write: Guarded) -> Verdict {
        let Guarded { worker, event, token, answer, .. } = write;
        let book = &self.events[event as usize];
        if !book.exists {
            ensure!(
                self,
                S8,
                answer != Answer::Applied,
                "event {event} is not in the outbox and was written to"
            );
            return Ok(());
        }
        let holder = (book.lease != NONE).then(|| &self.leases[book.lease as usize]);
        let matches = holder.is_some_and(|lease| lease.worker == worker && lease.token == token);
        let ended = holder.is_none() && book.token == token;
        let right = match answer {
            Answer::Applied => matches,
            Answer::Ended => ended,
            Answer::Refused => !matches && !ended,
            Answer::Skipped => true,
        };
        if answer == Answer::Applied && book.status != Status::Pending {
            ensure!(self, S7, false, "event {event} is {:?} and was written to", book.status);
        }
        ensure!(
            self,
            S5,
            right,
            "worker {worker} wrote to event {event} under token {token} and was answered {answer:?}; the holder is {:?}",
            holder.map(|lease| (lease.worker, lease.token))
        );
        Ok(())
    }

    pub(crate) fn renewed(&mut self, write: Guarded, until: DbMicros) -> Verdict {
        let Guarded { worker, call, event, answer, locked, .. } = write;
        self.late_commit(call);
        let change = match answer {
            Answer::Applied => Change::RenewApplied,
            Answer::Ended => Change::RenewEnded,
            Answer::Refused => Change::RenewRefused,
            Answer::Skipped => Change::RenewSkipped,
        };
        self.met(event, locked, change);
        self.guard(write)?;
        match answer {
            Answer::Applied => {}
            Answer::Refused => return self.note(Sometimes::StaleRenewRefused),
            Answer::Skipped => {
                if let Some(lease) = self.find(event, worker, write.token) {
                    self.leases[lease as usize].skipped = Some(call);
                }
                return self.note(Sometimes::RenewSkipped);
            }
            Answer::Ended => return Ok(()),
        }
        if self.state(event, locked) == RowState::Expired {
            self.stats.saw(Sometimes::RenewedExpired);
        }
        if self.calls[call as usize].lane == crate::Lane::RenewAlone {
            self.stats.saw(Sometimes::RenewedAlone);
        }
        let full = self.db.at(locked) + self.terms_of(worker).lease as i64;
        let book = &self.events[event as usize];
        ensure!(
            self,
            S1,
            until == full.max(book.until),
            "a renewal of event {event} extended its lease to {until}, but L from now is {full}"
        );
        let lease = book.lease;
        self.events[event as usize].until = until;
        self.leases[lease as usize].granted_at = locked;
        self.leases[lease as usize].renewals += 1;
        self.link(call, lease);
        Ok(())
    }

    pub(crate) fn settled(
        &mut self,
        write: Guarded,
        settle: Settle,
        attempts: u32,
        due: DbMicros,
    ) -> Verdict {
        let Guarded { worker, call, event, answer, locked, .. } = write;
        self.late_commit(call);
        let change = match (answer, settle) {
            (Answer::Applied, Settle::Delivered) => Change::Delivered,
            (Answer::Applied, Settle::Retry(_)) => Change::Retry,
            (Answer::Applied, Settle::Failed { .. }) => Change::Failed,
            (Answer::Applied, Settle::Release(_)) => Change::Release,
            (Answer::Ended, _) => Change::SettleEnded,
            (Answer::Refused, _) => Change::SettleRefused,
            (Answer::Skipped, _) => Change::SettleSkipped,
        };
        self.met(event, locked, change);
        self.guard(write)?;
        match answer {
            Answer::Applied => {}
            Answer::Ended => {
                self.stats.saw(Sometimes::SettleRepeated);
                if self.events[event as usize].ended_late {
                    self.stats.saw(Sometimes::LateCommitSeen);
                }
                return Ok(());
            }
            Answer::Skipped => {
                if let Some(lease) = self.find(event, worker, write.token) {
                    self.leases[lease as usize].settle_skipped = true;
                }
                return self.note(Sometimes::SettleSkipped);
            }
            Answer::Refused => {
                self.stats.saw(Sometimes::StaleSettleRefused);
                if settle == Settle::Delivered {
                    self.stats.saw(Sometimes::StaleSuccessRefused);
                }
                return Ok(());
            }
        }
        if self.state(event, locked) == RowState::Expired {
            self.stats.saw(Sometimes::SettledExpired);
        }
        self.events[event as usize].ended_late = self.calls[call as usize].over;
        if !self.events[event as usize].sendable {
            self.stats.saw(Sometimes::Unsendable);
        }
        let lease = self.events[event as usize].lease;
        if matches!(settle, Settle::Release(_)) {
            self.check_given_back(lease)?;
        }
        self.lease_over(lease, None);
        self.unlease(event);
        self.outcome(worker, call, lease, settle)?;
        let late = self.db.at(locked);
        let book = &mut self.events[event as usize];
        match settle {
            Settle::Delivered | Settle::Failed { tried: true } => book.attempts += 1,
            Settle::Retry(delay) => (book.attempts, book.due) = (book.attempts + 1, late + delay as i64),
            Settle::Release(Some(delay)) => book.due = late + delay as i64,
            Settle::Failed { tried: false } | Settle::Release(None) => {}
        }
        let limit = self.terms[usize::from(self.workers[worker as usize].terms)].tries(book.max_attempts);
        match settle {
            Settle::Release(_) => self.stats.saw(Sometimes::Released),
            Settle::Delivered => self.move_to(event, Status::Delivered),
            Settle::Failed { .. } => {
                if self.events[event as usize].attempts >= limit {
                    self.stats.saw(Sometimes::FailedAfterAll);
                }
                self.move_to(event, Status::Failed);
            }
            Settle::Retry(_) => {}
        }
        let book = &mut self.events[event as usize];
        if !matches!(settle, Settle::Release(_)) {
            (book.reclaims, book.other_run_outs) = (0, 0);
        }
        let (my_attempts, my_due) = (book.attempts, book.due);
        ensure!(
            self,
            S6,
            my_attempts == attempts
                && (my_due == due || !matches!(settle, Settle::Retry(_) | Settle::Release(_))),
            "after a settle event {event} has {attempts} attempts and is due at {due}; that should be {my_attempts} and \
             {my_due}"
        );
        Ok(())
    }

    fn note(&mut self, what: Sometimes) -> Verdict {
        self.stats.saw(what);
        Ok(())
    }

    fn link(&mut self, call: u32, lease: u32) {
        let book = &mut self.calls[call as usize];
        self.links.push(Link { lease, next: book.applied });
        book.applied = self.links.len() as u32 - 1;
    }

    fn late_commit(&mut self, call: u32) {
        if self.calls[call as usize].over {
            self.stats.saw(Sometimes::LateCommit);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one fact's fields")]
    pub(crate) fn restored(
        &mut self,
        event: u32,
        status: Status,
        attempts: u32,
        due: DbMicros,
        reclaims: u32,
        owner: Option<(u32, i64)>,
        until: DbMicros,
    ) {
        self.met(event, self.now, Change::Restored);
        let (before, lease) = (self.events[event as usize].status, self.events[event as usize].lease);
        let claim_lost = lease != NONE
            && owner != Some((self.leases[lease as usize].worker, self.leases[lease as usize].token));
        if claim_lost {
            self.stats.saw(Sometimes::ClaimLost);
        }
        if before != status || attempts < self.events[event as usize].attempts {
            self.stats.saw(Sometimes::SettleLost);
        }
        self.unlease(event);
        self.move_to(event, status);
        let now = self.now;
        let book = &mut self.events[event as usize];
        (book.attempts, book.due, book.reclaims) = (attempts, due, reclaims);
        book.restored_at = Some(now);
        if let Some((worker, token)) = owner
            && let Some(lease) = self.find(event, worker, token)
        {
            self.forgotten(lease, true);
            self.lease_to(event, lease, until);
        }
    }

    pub(crate) fn vanished(&mut self, event: u32) {
        self.unlease(event);
        let status = self.events[event as usize].status;
        self.count(status, -1);
        self.events[event as usize].exists = false;
    }

    /// Whether an overlap of requests is one that ARCHITECTURE.md names, of these causes.
    pub(crate) fn overlap_excused(&self, lease: u32, causes: &[Excuse]) -> bool {
        let excuses = self.excuses(&self.leases[lease as usize], None);
        let lost = self.leases[lease as usize].lost;
        !(excuses.among(causes).none() && lost.among(causes).none())
    }
}
