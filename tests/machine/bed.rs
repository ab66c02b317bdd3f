//! A worker machine on a table of row machines, with a clock turned by hand. Store calls are answered only when a test
//! says so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimAnswer, ClaimReply, ClaimRequest, DbClock, DbTime, DestinationKey,
    Grant, Incarnation, Input, LeaseKey, Limits, Moment, Observation, OwnedReply, Place, RawTiming,
    RenewReply, RequestId, RetryPolicy, Row, RowId, SettleReply, Timing, Token, Worker, WorkerId,
    WorkerSettings,
};

pub(crate) const MS: Duration = Duration::from_millis(1);
pub(crate) const SECOND: Duration = Duration::from_secs(1);
const EPOCH: i64 = 1_700_000_000_000_000;

pub(crate) fn limits() -> Limits {
    Limits {
        max_in_flight: 4,
        max_in_flight_per_destination: 2,
        max_leased: 8,
        claim_batch: 6,
        poll_interval: 250 * MS,
        drain_timeout: 28 * SECOND,
        reclaim_limit: 100,
    }
}

pub(crate) fn retry() -> RetryPolicy {
    RetryPolicy {
        initial: 5 * SECOND,
        max: 3_600 * SECOND,
        jitter_bps: 0,
        budget: 0,
        retry_after_max: 86_400 * SECOND,
        fail_statuses: BTreeSet::new(),
    }
}

pub(crate) fn timing(lease: Duration) -> Timing {
    let raw =
        RawTiming { lease, heartbeat: None, store_timeout: None, fence_margin: None, reclaim_grace: None };
    Timing::parse(raw).expect("defaults always fit")
}

pub(crate) fn settings() -> WorkerSettings {
    WorkerSettings::parse(timing(30 * SECOND), limits(), retry(), 7).expect("sound settings")
}

#[derive(Clone)]
pub(crate) struct Bed {
    pub(crate) worker: Worker,
    pub(crate) now: Moment,
    /// How far the database's clock is from the worker's own.
    pub(crate) db_ahead: Duration,
    pub(crate) incarnation: u32,
    pub(crate) rows: BTreeMap<RowId, (Row, DestinationKey)>,
    pub(crate) pending: Vec<Action>,
    pub(crate) open: BTreeMap<LeaseKey, Moment>,
    pub(crate) seen: Vec<Observation>,
}

impl Bed {
    pub(crate) fn new(settings: WorkerSettings) -> Self {
        let now = Moment::from_micros(1_000_000);
        let worker = Worker::new(WorkerId::new("w-1"), settings, now);
        Self {
            worker,

            now,
            db_ahead: Duration::ZERO,
            incarnation: 1,
            rows: BTreeMap::new(),
            pending: Vec::new(),
            open: BTreeMap::new(),
            seen: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, id: i64, destination: &str) {
        let row = Row::new(20, self.db().early);
        self.rows.insert(RowId(id), (row, DestinationKey::new(destination)));
    }

    pub(crate) fn row(&self, id: i64) -> &Row {
        &self.rows[&RowId(id)].0
    }

    pub(crate) fn row_mut(&mut self, id: i64) -> &mut Row {
        &mut self.rows.get_mut(&RowId(id)).expect("a row of the test").0
    }

    pub(crate) fn db(&self) -> DbClock {
        let now = DbTime::from_micros(EPOCH + self.now.as_micros() as i64).after(self.db_ahead);
        DbClock { early: now, late: now }
    }

    /// Gives one input and gathers what comes out. Returns the new actions.
    pub(crate) fn give(&mut self, input: Input) -> Vec<Action> {
        self.worker.handle(self.now, input);
        self.worker.assert_invariants();
        let mut actions = Vec::new();
        while let Some(action) = self.worker.poll_action() {
            match &action {
                Action::Send { key, start_before, .. } => {
                    assert!(self.now < *start_before, "S3: {key} would start past its fence");
                    let same_row = self.open.keys().any(|other| other.row == key.row);
                    assert!(!same_row, "S4: a second request for row {:?}", key.row);
                    self.open.insert(*key, self.now);
                }
                Action::Claim(..) | Action::Renew(..) | Action::Settle(..) | Action::Owned(..) => {
                    self.pending.push(action.clone());
                }
                Action::Abort { key } => assert!(self.open.contains_key(key), "aborts what is open"),
                Action::Forget { .. } => {}
            }
            actions.push(action);
        }
        while let Some(observation) = self.worker.poll_observation() {
            self.seen.push(observation);
        }
        actions
    }

    pub(crate) fn wake(&mut self) -> Vec<Action> {
        self.give(Input::Wake)
    }

    /// Turns the clock, waking the worker whenever it asks to be woken. Store calls stay unanswered.
    pub(crate) fn pass(&mut self, duration: Duration) {
        let until = self.now.after(duration);
        while let Some(at) = self.worker.next_wakeup().filter(|at| *at < until) {
            self.now = self.now.max(at);
            self.wake();
        }
        self.now = until;
        self.wake();
    }

    /// Turns the clock with a store that answers at once.
    pub(crate) fn run(&mut self, duration: Duration) {
        let until = self.now.after(duration);
        self.wake();
        self.answer_all();
        while let Some(at) = self.worker.next_wakeup().filter(|at| *at < until) {
            self.now = self.now.max(at);
            self.wake();
            self.answer_all();
        }
        self.now = until;
        self.wake();
        self.answer_all();
    }

    /// Returns the actions that came of the answers.
    pub(crate) fn answer_all(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        while !self.pending.is_empty() {
            let action = self.pending.remove(0);
            actions.extend(self.answer(action));
        }
        actions
    }

    /// Applies a store call and gives the reply.
    pub(crate) fn answer(&mut self, action: Action) -> Vec<Action> {
        let reply = self.apply(action);
        self.give(reply)
    }

    pub(crate) fn request_of(action: &Action) -> RequestId {
        match action {
            Action::Claim(id, _) | Action::Renew(id, _) | Action::Settle(id, _) | Action::Owned(id, _) => *id,
            Action::Send { .. } | Action::Abort { .. } | Action::Forget { .. } => {
                panic!("not a store call: {action:?}")
            }
        }
    }

    /// What the store does with a call, and the reply that it would send.
    pub(crate) fn apply(&mut self, action: Action) -> Input {
        let db = self.db();
        match action {
            Action::Claim(request, claim) => Input::Claimed { request, reply: Ok(self.claim(&claim)) },
            Action::Renew(request, renew) => {
                let answers = renew.keys.iter().map(|key| {
                    let row = self.rows.get_mut(&key.row).map(|(row, _)| row);
                    let answer = row
                        .map_or(Answer::Refused, |row| row.renew(db, &renew.owner, key.token, renew.lease));
                    (*key, answer)
                });
                let answers = answers.collect();
                Input::Renewed { request, reply: Ok(RenewReply { db_now: db.late, answers }) }
            }
            Action::Settle(request, settle) => {
                let answers = settle.entries.iter().map(|(key, outcome)| {
                    let row = self.rows.get_mut(&key.row).map(|(row, _)| row);
                    let answer =
                        row.map_or(Answer::Refused, |row| row.settle(db, &settle.owner, key.token, outcome));
                    (*key, answer)
                });
                let answers = answers.collect();
                Input::Settled { request, reply: Ok(SettleReply { db_now: db.late, answers }) }
            }
            Action::Owned(request, owned) => {
                let held = |row: &Row| row.lease.as_ref().is_some_and(|lease| lease.owner == owned.owner);
                let keys = self.rows.iter().filter(|(_, (row, _))| held(row));
                let keys = keys.map(|(id, (row, _))| LeaseKey { row: *id, token: row.token }).collect();
                Input::Owned { request, reply: Ok(OwnedReply { db_now: db.late, keys }) }
            }
            Action::Send { .. } | Action::Abort { .. } | Action::Forget { .. } => {
                panic!("not a store call: {action:?}")
            }
        }
    }

    fn claim(&mut self, claim: &ClaimRequest) -> ClaimReply {
        let db = self.db();
        let mut reply = ClaimReply {
            db_now: db.late,
            incarnation: Incarnation::new(self.incarnation.to_string()),
            searched_expired: claim.terms.expired && claim.terms.valid(db.early),
            grants: Vec::new(),
            failed: Vec::new(),
            front: None,
            leases_front: None,
            next_due_in: None,
            any_pending: None,
        };
        if reply.searched_expired {
            let leased = self.rows.values().map(|(row, _)| row).filter(|row| row.lease.is_some());
            let ahead = |token: &Token| claim.leases_from.is_none_or(|from| *token >= from);
            let first = leased.map(|row| row.token).filter(ahead).min();
            reply.leases_front = Some(first.unwrap_or(Token(i64::MAX)));
        }
        let mut rooms: BTreeMap<DestinationKey, u32> = claim.shares.iter().cloned().collect();
        let mut probation = claim.probation;
        for (id, (row, destination)) in &mut self.rows {
            let place = Place { due: row.next_attempt_at, row: *id };
            let fresh = row.lease.is_none() && !row.on_probation();
            let passed_over = |from| row.lease.is_some() && row.token < from;
            if (reply.grants.len() + reply.failed.len()) as u32 >= claim.limit
                || !row.eligible(db.early, &claim.terms)
                || fresh && claim.from.is_some_and(|from| place < from)
                || claim.leases_from.is_some_and(passed_over)
            {
                continue;
            }
            let room = rooms.entry(destination.clone()).or_insert(claim.share);
            let on_probation = row.on_probation();
            if *room == 0 || (on_probation && probation == 0) {
                continue;
            }
            match row.claim(db, &claim.owner, &claim.terms) {
                ClaimAnswer::Granted { token, reclaimed } => {
                    *room -= 1;
                    probation -= u32::from(on_probation);
                    reply.grants.push(Grant {
                        key: LeaseKey { row: *id, token },
                        destination: destination.clone(),
                        attempts: row.attempts,
                        max_attempts: row.max_attempts,
                        reclaims: row.reclaims,
                        reclaimed,
                        unsendable: None,
                    });
                }
                ClaimAnswer::Failed(why) => reply.failed.push((*id, why)),
                ClaimAnswer::NotEligible => {}
            }
        }
        let left = self
            .rows
            .iter()
            .filter(|(_, (row, _))| row.lease.is_none() && row.eligible(db.early, &claim.terms));
        let left = left.map(|(id, (row, _))| Place { due: row.next_attempt_at, row: *id });
        let left = left.filter(|place| claim.from.is_none_or(|from| *place >= from));
        reply.front = Some(left.min().unwrap_or(Place::behind(db.early)));
        reply.any_pending = claim
            .count_pending
            .then(|| self.rows.values().any(|(row, _)| row.status == leasehold::machine::Status::Pending));
        reply
    }

    pub(crate) fn respond(&mut self, key: LeaseKey, status: u16) -> Vec<Action> {
        self.open.remove(&key);
        self.give(Input::Attempted { key, result: AttemptResult::Responded { status, retry_after: None } })
    }

    pub(crate) fn confirm_abort(&mut self, key: LeaseKey) -> Vec<Action> {
        self.open.remove(&key);
        self.give(Input::Aborted { key })
    }

    pub(crate) fn opened(&self) -> Vec<LeaseKey> {
        self.open.keys().copied().collect()
    }
}

pub(crate) fn aborts(actions: &[Action]) -> Vec<LeaseKey> {
    actions
        .iter()
        .filter_map(|action| if let Action::Abort { key } = action { Some(*key) } else { None })
        .collect()
}
