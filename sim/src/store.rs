//! The simulated outbox: rows under the row machine, and what SQL adds to it: statements with a stable early clock and
//! a late one, row locks, SKIP LOCKED, commits apart from replies, and a server that restarts and forgets.

use leasehold::machine::{
    Answer, ClaimAnswer, ClaimFailure, ClaimReply, ClaimRequest, ClaimTerms, DbClock, DbTime, DestinationKey,
    Grant, Incarnation, LeaseKey, OwnedReply, Place, RenewReply, RenewRequest, Row, RowId, Settle,
    SettleReply, SettleRequest, Status, Token, WorkerId,
};
use sim_oracle::{DbClockModel, Fact};
use std::time::Duration;

use crate::bugs::Bug;
use crate::plain::{plain, plain_settle};
use crate::schedule::{EventPlan, Payload};
use crate::statement::{Ask, Reply, Statement};

/// Who has a row locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Nobody.
    Free,
    /// A session that is none of ours.
    Outside,
    /// A statement.
    Statement(u32),
}

/// How much of payloads a claim brings.
pub(crate) const MOST_BYTES: u64 = 8 << 20;

/// What the row machine does not know about a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    pub(crate) destination: u16,
    pub(crate) payload: Payload,
    pub(crate) lock: Lock,
    pub(crate) cursed: bool,
    pub(crate) exists: bool,
    /// Which commit changed it last.
    pub(crate) changed: u64,
}

/// In this order a claim takes what may be claimed.
const EXPIRED: u8 = 0;
const PROBATION: u8 = 1;
const FRESH: u8 = 2;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) rows: Vec<Row>,
    pub(crate) meta: Vec<Meta>,
    /// Rows that are pending, in order.
    pub(crate) pending: Vec<u32>,
    pub(crate) keys: Vec<DestinationKey>,
    /// The server's clock.
    pub(crate) clock: DbClockModel,
    /// Whether it runs.
    pub(crate) up: bool,
    /// Whether it refuses writes.
    pub(crate) read_only: bool,
    /// Counts the server's runs.
    pub(crate) epoch: u32,
    pub(crate) incarnation: Incarnation,
    pub(crate) booted: u64,
    /// Rows before each commit, if a failover may want them: (when, row, what it was).
    pub(crate) history: Option<Vec<(u64, u32, Option<Row>)>>,
    pub(crate) waiting: Vec<(u32, u32)>,
    /// Counts the commits.
    pub(crate) commits: u64,
    pub(crate) rooms: Vec<u32>,
    /// What a claim that takes its locks may take: a list that is used again.
    found: Vec<(u8, u32)>,
    pub(crate) bug: Option<Bug>,
}

impl Store {
    /// An empty outbox whose server has been up for long.
    pub(crate) fn new(epoch: i64, destinations: usize, forgets: bool, bug: Option<Bug>) -> Self {
        Self {
            rows: Vec::new(),
            meta: Vec::new(),
            pending: Vec::new(),
            keys: (0..destinations).map(|at| DestinationKey::new(format!("https://d{at}"))).collect(),
            clock: DbClockModel::new(epoch),
            up: true,
            read_only: false,
            epoch: 0,
            incarnation: Incarnation::new("server 0"),
            booted: 0,
            history: forgets.then(Vec::new),
            waiting: Vec::new(),
            commits: 0,
            rooms: Vec::new(),
            found: Vec::new(),
            bug,
        }
    }

    fn db(&self, time: u64) -> DbTime {
        DbTime::from_micros(self.clock.at(time))
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// A producer's commit.
    pub(crate) fn insert(&mut self, now: u64, plan: &EventPlan) -> i64 {
        let began = now.saturating_sub(plan.late);
        let before_all = Duration::from_micros(plan.late - (now - began));
        let due = self.db(began).before(before_all).after(Duration::from_micros(plan.delay));
        let row = self.rows.len() as u32;
        self.rows.push(Row { attempts: plan.attempts, ..Row::new(plan.max_attempts, due) });
        let EventPlan { destination, cursed, payload, .. } = *plan;
        self.meta.push(Meta { destination, payload, lock: Lock::Free, cursed, exists: true, changed: 0 });
        self.pending.push(row);
        if let Some(history) = &mut self.history {
            history.push((now, row, None));
        }
        due.as_micros()
    }

    /// The statement's start: its early clock, and for a claim what it picks, by what is committed now. Locks are not
    /// looked at yet.
    pub(crate) fn begin(&mut self, statement: &mut Statement, now: u64) {
        (statement.began, statement.epoch, statement.snapshot) = (now, self.epoch, self.commits);
        if matches!(statement.ask, Ask::Claim(_)) {
            self.pick(statement);
        }
    }

    /// Takes locks. Answers `false` if the statement waits for one.
    pub(crate) fn begin_work(&mut self, id: u32, statement: &mut Statement, now: u64) -> bool {
        statement.locked = now;
        match &statement.ask {
            Ask::Claim(_) => self.lock_picked(id, statement),
            Ask::Renew(request) => {
                if request.wait
                    && let Some(row) = request.keys.first().map(|key| row_of(*key))
                    && self.meta[row as usize].lock != Lock::Free
                {
                    self.waiting.push((row, id));
                    return false;
                }
                self.lock(id, request.keys.iter().map(|key| row_of(*key)), &mut statement.rows);
            }
            Ask::Settle(request) => {
                self.lock(id, request.entries.iter().map(|(key, _)| row_of(*key)), &mut statement.rows);
            }
            Ask::Owned(_) => {}
        }
        true
    }

    fn lock(&mut self, id: u32, rows: impl Iterator<Item = u32>, locked: &mut Vec<u32>) {
        for row in rows {
            let meta = &mut self.meta[row as usize];
            if meta.lock == Lock::Free {
                meta.lock = Lock::Statement(id);
                locked.push(row);
            }
        }
    }

    /// The clock that a claim compares with.
    fn seen(&self, began: u64) -> DbTime {
        self.db(if self.has(Bug::ClaimLateClock) { began + 50_000 } else { began })
    }

    fn eligible(&self, row: u32, seen: DbTime, terms: &ClaimTerms) -> bool {
        let state = &self.rows[row as usize];
        let over_for = || seen.since(state.next_attempt_at).as_secs();
        let seen = match self.bug {
            Some(Bug::ClaimIgnoresDue) => seen.max(state.next_attempt_at),
            Some(Bug::ReclaimEarly) if state.lease.is_some() => seen.after(terms.grace + terms.lease / 10),
            Some(Bug::ClaimTerminal) if state.status == Status::Delivered && over_for() > 3 => return true,
            _ => seen,
        };
        state.eligible(seen, terms)
    }

    fn terms(&self, request: &ClaimRequest, searched: bool) -> ClaimTerms {
        let mut terms = request.terms;
        terms.expired = searched && !self.has(Bug::NeverReclaim);
        if self.has(Bug::GraceIgnored) {
            terms.grace = Duration::ZERO;
        }
        terms
    }

    /// What a claim may take, by what is committed when it begins: expired leases, events on probation, fresh ones.
    fn pick(&mut self, statement: &mut Statement) {
        let Ask::Claim(request) = &statement.ask else { return };
        let early = self.db(statement.began);
        let seen = self.seen(statement.began);
        let up_for = statement.began.saturating_sub(self.booted);
        let long_up = || {
            self.booted == 0
                || Duration::from_micros(up_for) >= request.terms.lease
                || self.has(Bug::UpIgnored)
        };
        let known = || request.incarnation.as_ref() == Some(&self.incarnation);
        let valid = request.terms.valid(early);
        statement.searched = request.terms.expired && valid && long_up() && known();
        let terms = self.terms(request, statement.searched);
        statement.candidates.clear();
        let (mut next_due, mut leases_front) = (None, Token(i64::MAX));
        let all: Vec<u32>;
        let mut rows = &self.pending;
        if self.has(Bug::ClaimTerminal) {
            all = (0..self.rows.len() as u32).collect();
            rows = &all;
        }
        for &row in rows {
            let state = &self.rows[row as usize];
            let (leased, probation, due) =
                (state.lease.is_some(), state.on_probation(), state.next_attempt_at);
            if !leased && !probation && due > early {
                next_due = Some(next_due.map_or(due, |next: DbTime| next.min(due)));
            }
            if leased {
                if request.leases_from.is_some_and(|from| state.token < from) {
                    continue;
                }
                leases_front = leases_front.min(state.token);
            }
            if self.meta[row as usize].exists && self.eligible(row, seen, &terms) {
                let turn = if probation {
                    PROBATION
                } else if leased {
                    EXPIRED
                } else {
                    FRESH
                };
                let passed_over = |from| place(due, row) < from;
                if turn != FRESH || !request.from.is_some_and(passed_over) {
                    statement.candidates.push((turn, due, row));
                }
            }
        }
        statement.candidates.sort_unstable();
        let candidates = statement.candidates.iter().map(|&(turn, _, row)| (turn, row)).filter(|_| valid);
        self.choose(request, candidates, &mut statement.picked);
        statement.leases_front = statement.searched.then_some(leases_front);
        statement.next_due_in = next_due.map(|due| due.since(early));
        statement.pending = self.pending.len();
    }

    /// What a claim takes of these, in this order: as much as shares, probation and its limit let it.
    fn choose(
        &mut self,
        request: &ClaimRequest,
        candidates: impl Iterator<Item = (u8, u32)>,
        chosen: &mut Vec<(u8, u32)>,
    ) {
        chosen.clear();
        let mut candidates = candidates.peekable();
        if candidates.peek().is_none() {
            return;
        }
        self.rooms.clear();
        for key in &self.keys {
            let room = request.shares.binary_search_by(|(name, _)| name.cmp(key));
            self.rooms.push(room.map_or(request.share, |at| request.shares[at].1));
        }
        let mut probation = request.probation;
        for (turn, row) in candidates {
            if chosen.len() >= request.limit as usize {
                break;
            }
            let room = &mut self.rooms[usize::from(self.meta[row as usize].destination)];
            let suspect = turn == PROBATION;
            if (*room == 0 && self.bug != Some(Bug::ClaimIgnoresShare)) || (suspect && probation == 0) {
                continue;
            }
            *room = room.saturating_sub(1);
            probation -= u32::from(suspect);
            chosen.push((turn, row));
        }
    }

    /// Locks what a claim takes and nobody has locked. Fresh events are locked as they are found, so that others come in
    /// the place of those that are locked or have changed: the front of the queue, whatever becomes of it, and what is
    /// taken behind it. Leases and events on probation were ranked before: nothing comes in their place. What has
    /// changed stays locked.
    fn lock_picked(&mut self, id: u32, statement: &mut Statement) {
        let Ask::Claim(request) = &statement.ask else { return };
        if statement.candidates.is_empty() {
            (statement.front, statement.allowed) = (Some(Place::behind(self.db(statement.began))), 0);
            return;
        }
        let seen = self.seen(statement.began);
        let terms = self.terms(request, statement.searched);
        let valid = terms.valid(self.db(statement.began));
        let mut candidates = std::mem::take(&mut self.found);
        candidates.clear();
        candidates.extend(statement.picked.iter().filter(|(turn, _)| *turn < FRESH));
        let mut front = request.limit;
        for &(turn, _, row) in &statement.candidates {
            if turn != FRESH || !valid || !self.is_free(row) {
                continue;
            }
            if front > 0 {
                statement.rows.push(row);
            }
            let state = &self.rows[row as usize];
            let fresh = state.lease.is_none() && !state.on_probation();
            if fresh && self.eligible(row, seen, &terms) {
                front = front.saturating_sub(1);
                candidates.push((turn, row));
            }
        }
        let picked = &mut statement.picked;
        self.choose(request, candidates.iter().copied(), picked);
        self.found = candidates;
        picked.retain(|(_, row)| self.is_free(*row));
        for (_, row) in &*picked {
            if !statement.rows.contains(row) {
                statement.rows.push(*row);
            }
        }
        if self.bug != Some(Bug::DoubleClaim) {
            for row in &statement.rows {
                self.meta[*row as usize].lock = Lock::Statement(id);
            }
        }
        picked.retain(|&(turn, row)| {
            let suspect = turn == PROBATION;
            self.eligible(row, seen, &terms) && (suspect || !self.rows[row as usize].on_probation())
        });
        if !terms.valid(self.db(statement.locked)) {
            picked.clear();
        }
        self.cut_off(picked);
        statement.allowed = picked.len();
        // A row is changed where this statement's snapshot shows it, or not at all.
        if self.bug != Some(Bug::DoubleClaim) {
            picked.retain(|(_, row)| !self.changed_since(*row, statement.snapshot));
        }
        let left = statement.candidates.iter().filter(|(turn, _, row)| {
            *turn == FRESH
                && !picked.contains(&(FRESH, *row))
                && (self.bug != Some(Bug::FrontPastLocked) || self.is_free(*row))
        });
        let left = left.map(|&(_, due, row)| place(due, row)).next();
        statement.front = Some(left.unwrap_or(Place::behind(self.db(statement.began))));
    }

    /// Leaves what would be too much for one reply, but for what comes first, in the order of due times.
    fn cut_off(&self, picked: &mut Vec<(u8, u32)>) {
        let bytes = |row: u32| self.meta[row as usize].payload.brought();
        if picked.iter().map(|(_, row)| bytes(*row)).sum::<u64>() <= MOST_BYTES {
            return;
        }
        picked.sort_unstable_by_key(|(_, row)| place(self.rows[*row as usize].next_attempt_at, *row));
        let mut total = 0;
        let fits = picked.iter().position(|(_, row)| {
            total += bytes(*row);
            total > MOST_BYTES
        });
        picked.truncate(fits.unwrap_or(picked.len()).max(1));
    }

    fn changed_since(&self, row: u32, snapshot: u64) -> bool {
        self.meta[row as usize].changed > snapshot
    }

    fn is_free(&self, row: u32) -> bool {
        let meta = &self.meta[row as usize];
        meta.lock == Lock::Free && meta.exists
    }

    /// Whether the statement would be refused for good: it settles a cursed row.
    pub(crate) fn impossible(&self, statement: &Statement) -> Option<Vec<LeaseKey>> {
        let Ask::Settle(request) = &statement.ask else { return None };
        let cursed = request.entries.iter().filter(|(key, settle)| {
            self.meta[row_of(*key) as usize].cursed && !matches!(settle, Settle::Release { .. })
        });
        let cursed: Vec<LeaseKey> = cursed.map(|(key, _)| *key).collect();
        (!cursed.is_empty()).then_some(cursed)
    }

    /// A statement's client has gone while it waits for a lock.
    pub(crate) fn stop_waiting(&mut self, id: u32) {
        self.waiting.retain(|(_, other)| *other != id);
    }

    /// After a commit: lets go of the statement's rows.
    pub(crate) fn finish(&mut self, id: u32, statement: &Statement) -> Vec<u32> {
        self.unlock(id, &statement.rows)
    }

    /// Lets go of a statement's rows. Answers the statements that may go on now, since they had waited for them.
    fn unlock(&mut self, id: u32, rows: &[u32]) -> Vec<u32> {
        let mut next = Vec::new();
        for row in rows {
            if self.meta[*row as usize].lock == Lock::Statement(id) {
                next.extend(self.free(*row));
            }
        }
        next
    }

    pub(crate) fn free(&mut self, row: u32) -> Option<u32> {
        self.meta[row as usize].lock = Lock::Free;
        let at = self.waiting.iter().position(|(waiting, _)| *waiting == row)?;
        Some(self.waiting.remove(at).1)
    }

    /// Rolls a statement back: its rows are as they were.
    pub(crate) fn roll_back(&mut self, id: u32, statement: &Statement, facts: &mut Vec<Fact>) -> Vec<u32> {
        let since = statement.locked;
        let dropped = statement.rows.iter().map(|row| Fact::LockDropped { event: *row, since, left: false });
        facts.extend(dropped);
        self.unlock(id, &statement.rows)
    }

    fn remember(&mut self, now: u64, row: u32) {
        if let Some(history) = &mut self.history {
            history.push((now, row, Some(self.rows[row as usize].clone())));
        }
    }

    fn note_change(&mut self, row: u32, answer: Answer) {
        if answer == Answer::Applied {
            self.meta[row as usize].changed = self.commits;
        }
    }

    /// Whether a lease that would be settled was changed, as by a renewal, after the statement's snapshot.
    fn is_out_of_sight(&self, statement: &Statement, owner: &WorkerId, key: LeaseKey) -> bool {
        let row = &self.rows[row_of(key) as usize];
        let held = row.token == key.token && row.lease.as_ref().is_some_and(|lease| lease.owner == *owner);
        held && self.changed_since(row_of(key), statement.snapshot)
    }

    fn drop_terminal(&mut self, row: u32) {
        if self.rows[row as usize].status != Status::Pending
            && let Ok(at) = self.pending.binary_search(&row)
        {
            self.pending.remove(at);
        }
    }

    /// The commit: applies the statement to the rows that it has locked.
    pub(crate) fn commit(&mut self, statement: &Statement, now: u64, facts: &mut Vec<Fact>) -> Reply {
        let clock = DbClock { early: self.db(statement.began), late: self.db(statement.locked) };
        self.commits += 1;
        match &statement.ask {
            Ask::Claim(request) => Reply::Claim(self.claim(statement, request, clock, now, facts)),
            Ask::Renew(request) => Reply::Renew(self.renew(statement, request, clock, now, facts)),
            Ask::Settle(request) => Reply::Settle(self.settle(statement, request, clock, now, facts)),
            Ask::Owned(request) => {
                let owned = self.pending.iter().filter(|row| {
                    self.rows[**row as usize].lease.as_ref().is_some_and(|lease| lease.owner == request.owner)
                });
                let keys = owned.map(|row| key_of(*row, &self.rows[*row as usize])).collect();
                Reply::Owned(OwnedReply { db_now: clock.late, keys })
            }
        }
    }

    fn claim(
        &mut self,
        statement: &Statement,
        request: &ClaimRequest,
        clock: DbClock,
        now: u64,
        facts: &mut Vec<Fact>,
    ) -> ClaimReply {
        let mut terms = request.terms;
        terms.expired = statement.searched;
        let Statement { worker, call, began, locked, .. } = *statement;
        let mut grants = Vec::with_capacity(statement.rows.len());
        let mut failed = Vec::new();
        for &(_, event) in &statement.picked {
            self.remember(now, event);
            let answer = self.claim_row(event, clock, &request.owner, &terms);
            if answer != ClaimAnswer::NotEligible {
                self.meta[event as usize].changed = self.commits;
            }
            let row = &self.rows[event as usize];
            match answer {
                ClaimAnswer::NotEligible => {}
                ClaimAnswer::Granted { token, reclaimed } => {
                    let until = row.lease.as_ref().map_or(0, |lease| lease.until.as_micros());
                    facts.push(Fact::Claimed {
                        worker,
                        call,
                        event,
                        token: token.0,
                        until,
                        reclaimed,
                        began,
                        locked,
                    });
                    grants.push(Grant {
                        key: key_of(event, row),
                        destination: self.keys[usize::from(self.meta[event as usize].destination)].clone(),
                        attempts: row.attempts,
                        max_attempts: row.max_attempts,
                        reclaims: row.reclaims,
                        reclaimed,
                        unsendable: self.meta[event as usize].payload.unsendable(),
                    });
                }
                ClaimAnswer::Failed(why) => {
                    let spent = match why {
                        ClaimFailure::AttemptsSpent => sim_oracle::Spent::Attempts,
                        ClaimFailure::ReclaimsSpent => sim_oracle::Spent::Reclaims,
                        ClaimFailure::AtBound => sim_oracle::Spent::Bound,
                    };
                    facts.push(Fact::ClaimFailed { worker, call, event, why: spent, began, locked });
                    failed.push((RowId(i64::from(event)), why));
                    self.drop_terminal(event);
                }
            }
        }
        if statement.rows.len() > grants.len() + failed.len() {
            // Rows that it locked and left.
            let taken = |row: u32| {
                let id = RowId(i64::from(row));
                grants.iter().any(|grant| grant.key.row == id)
                    || failed.iter().any(|(failed, _)| *failed == id)
            };
            let left = statement.rows.iter().copied().filter(|row| !taken(*row));
            facts.extend(left.map(|event| Fact::LockDropped { event, since: locked, left: true }));
        }
        let more = statement.allowed < request.limit as usize;
        ClaimReply {
            db_now: clock.late,
            incarnation: self.incarnation.clone(),
            searched_expired: statement.searched,
            front: statement.front,
            leases_front: statement.leases_front,
            next_due_in: statement.next_due_in.filter(|_| more),
            // Counted by what was committed when the claim began, without what it fails itself.
            any_pending: request.count_pending.then_some(statement.pending > failed.len()),
            grants,
            failed,
        }
    }

    fn claim_row(&mut self, event: u32, clock: DbClock, owner: &WorkerId, terms: &ClaimTerms) -> ClaimAnswer {
        let bug = self.bug;
        let row = &mut self.rows[event as usize];
        let (token, attempts, due) = (row.token, row.attempts, row.next_attempt_at);
        let (mut clock, mut terms) = (clock, *terms);
        match bug {
            Some(Bug::LeaseFromEarlyClock) => clock.late = clock.early,
            Some(Bug::ClaimIgnoresSpent) => row.attempts = 0,
            Some(Bug::ClaimTerminal) => row.status = Status::Pending,
            Some(
                Bug::GraceIgnored
                | Bug::ReclaimEarly
                | Bug::ClaimLateClock
                | Bug::DoubleClaim
                | Bug::ClaimIgnoresDue,
            ) => {
                let until = row.lease.as_ref().map_or(clock.early, |lease| lease.until.after(terms.grace));
                clock.early = clock.early.max(until).max(due);
                terms.valid_until = None;
            }
            _ => {}
        }
        let answer = row.claim(clock, owner, &terms);
        match bug {
            Some(Bug::ClaimIgnoresSpent) => row.attempts = attempts,
            Some(Bug::TokenKept) if token.0 > 0 => row.token = token,
            Some(Bug::TokenSinks)
                if token.0 > 0 && matches!(answer, ClaimAnswer::Granted { reclaimed: false, .. }) =>
            {
                row.token = Token(token.0 - 1);
            }
            Some(Bug::LeaseHalved) => {
                if let Some(lease) = &mut row.lease {
                    lease.until = clock.late.after(terms.lease / 2);
                }
            }
            _ => {}
        }
        match answer {
            ClaimAnswer::Granted { reclaimed, .. } => ClaimAnswer::Granted { token: row.token, reclaimed },
            other => other,
        }
    }

    fn renew(
        &mut self,
        statement: &Statement,
        request: &RenewRequest,
        clock: DbClock,
        now: u64,
        facts: &mut Vec<Fact>,
    ) -> RenewReply {
        let Statement { worker, call, locked, .. } = *statement;
        let mut answers = Vec::with_capacity(request.keys.len());
        for key in &request.keys {
            let event = row_of(*key);
            let answer = if !self.meta[event as usize].exists {
                Answer::Refused
            } else if statement.rows.contains(&event) {
                self.remember(now, event);
                self.renew_row(event, clock, request, *key)
            } else {
                Answer::Skipped
            };
            self.note_change(event, answer);
            let until = self.rows[event as usize].lease.as_ref().map_or(0, |lease| lease.until.as_micros());
            facts.push(Fact::Renewed {
                worker,
                call,
                event,
                token: key.token.0,
                answer: plain(answer),
                until,
                locked,
            });
            answers.push((*key, answer));
        }
        RenewReply { db_now: clock.late, answers }
    }

    fn renew_row(&mut self, event: u32, clock: DbClock, request: &RenewRequest, key: LeaseKey) -> Answer {
        let row = &mut self.rows[event as usize];
        match self.bug {
            Some(Bug::RenewHalved) => row.renew(clock, &request.owner, key.token, request.lease / 2),
            Some(Bug::RenewFromEarlyClock) => {
                row.renew(DbClock { late: clock.early, ..clock }, &request.owner, key.token, request.lease)
            }
            Some(Bug::RenewIgnoresToken) => row.renew(clock, &request.owner, row.token, request.lease),
            Some(Bug::RenewIgnoresOwner) => {
                let owner = row.lease.as_ref().map(|lease| lease.owner.clone());
                let token = if owner.is_some() { row.token } else { key.token };
                row.renew(clock, owner.as_ref().unwrap_or(&request.owner), token, request.lease)
            }
            _ => row.renew(clock, &request.owner, key.token, request.lease),
        }
    }

    fn settle(
        &mut self,
        statement: &Statement,
        request: &SettleRequest,
        clock: DbClock,
        now: u64,
        facts: &mut Vec<Fact>,
    ) -> SettleReply {
        let Statement { worker, call, locked, .. } = *statement;
        let mut answers = Vec::with_capacity(request.entries.len());
        for (key, settle) in &request.entries {
            let event = row_of(*key);
            let unseen = self.is_out_of_sight(statement, &request.owner, *key);
            let mistaken = unseen && self.has(Bug::RenewedIsRefused);
            let answer = if !self.meta[event as usize].exists || mistaken {
                Answer::Refused
            } else if !statement.rows.contains(&event) || unseen {
                Answer::Skipped
            } else {
                self.remember(now, event);
                self.settle_row(event, clock, &request.owner, *key, settle)
            };
            self.note_change(event, answer);
            let row = &self.rows[event as usize];
            facts.push(Fact::Settled {
                worker,
                call,
                event,
                token: key.token.0,
                settle: plain_settle(settle),
                answer: plain(answer),
                attempts: row.attempts,
                due: row.next_attempt_at.as_micros(),
                locked,
            });
            self.drop_terminal(event);
            if self.has(Bug::LostRow) && row_failed(&self.rows[event as usize], answer) {
                self.meta[event as usize].exists = false;
            }
            answers.push((*key, answer));
        }
        SettleReply { db_now: clock.late, answers }
    }

    fn settle_row(
        &mut self,
        event: u32,
        clock: DbClock,
        owner: &WorkerId,
        key: LeaseKey,
        settle: &Settle,
    ) -> Answer {
        let row = &mut self.rows[event as usize];
        let attempts = row.attempts;
        let holder = row.lease.as_ref().map(|lease| lease.owner.clone());
        match self.bug {
            Some(Bug::SettleUnguarded) => {
                let holder = holder.unwrap_or_else(|| owner.clone());
                row.settle(clock, &holder, row.token, settle)
            }
            Some(Bug::SettleIgnoresToken) => row.settle(clock, owner, row.token, settle),
            Some(Bug::SettleRefusesExpired)
                if row.lease.as_ref().is_some_and(|lease| lease.until < clock.late) =>
            {
                Answer::Refused
            }
            Some(Bug::SettleTerminalAgain) => match row.settle(clock, owner, key.token, settle) {
                Answer::Ended if row.status != Status::Pending => Answer::Applied,
                answer => answer,
            },
            Some(Bug::AttemptsKept) => {
                let answer = row.settle(clock, owner, key.token, settle);
                row.attempts = attempts;
                answer
            }
            Some(Bug::ReleaseSpends) => {
                let answer = row.settle(clock, owner, key.token, settle);
                if answer == Answer::Applied && matches!(settle, Settle::Release { .. }) {
                    row.attempts += 1;
                }
                answer
            }
            Some(Bug::RetryDueNow) => {
                let answer = row.settle(clock, owner, key.token, settle);
                if answer == Answer::Applied && matches!(settle, Settle::Retry { .. }) {
                    row.next_attempt_at = clock.late;
                }
                answer
            }
            _ => row.settle(clock, owner, key.token, settle),
        }
    }
}

fn row_failed(row: &Row, answer: Answer) -> bool {
    row.status == Status::Failed && answer == Answer::Applied
}

fn place(due: DbTime, row: u32) -> Place {
    Place { due, row: RowId(i64::from(row)) }
}

fn row_of(key: LeaseKey) -> u32 {
    key.row.0 as u32
}

fn key_of(event: u32, row: &Row) -> LeaseKey {
    LeaseKey { row: RowId(i64::from(event)), token: row.token }
}
