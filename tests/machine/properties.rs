//! No sequence of inputs panics or breaks an invariant; spurious wake-ups change no action.

use std::time::Duration;

use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimReply, DbTime, DestinationKey, Grant, Incarnation, Input, LeaseKey,
    OwnedReply, RenewReply, RequestId, RowId, SettleReply, StoreFault, Token,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::bed::{Bed, settings};

/// One step of an honest but unkind world.
#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    Stop(u64),
    Answer(usize),
    LoseReply(usize),
    LoseCall(usize),
    RefuseCall(usize),
    Respond(usize, u16),
    ConfirmAborts,
    Steal(i64),
    Lock(usize),
    Restart,
    DbMoves(u64),
    Hint,
    Shutdown,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..3_000_u64).prop_map(Step::Pass),
        1 => (1_000..60_000_u64).prop_map(Step::Stop),
        12 => (0..4_usize).prop_map(Step::Answer),
        2 => (0..4_usize).prop_map(Step::LoseReply),
        2 => (0..4_usize).prop_map(Step::LoseCall),
        1 => (0..4_usize).prop_map(Step::RefuseCall),
        6 => (0..4_usize, prop_oneof![Just(200), Just(500), Just(429), Just(302)]).prop_map(|(at, to)| Step::Respond(at, to)),
        4 => Just(Step::ConfirmAborts),
        1 => (1..10_i64).prop_map(Step::Steal),
        1 => (0..4_usize).prop_map(Step::Lock),
        1 => Just(Step::Restart),
        1 => (0..6_000_u64).prop_map(Step::DbMoves),
        1 => Just(Step::Hint),
        1 => Just(Step::Shutdown),
    ]
}

fn fail(action: &Action, fault: StoreFault) -> Input {
    match action {
        Action::Claim(request, _) => Input::Claimed { request: *request, reply: Err(fault) },
        Action::Renew(request, _) => Input::Renewed { request: *request, reply: Err(fault) },
        Action::Settle(request, _) => Input::Settled { request: *request, reply: Err(fault) },
        Action::Owned(request, _) => Input::Owned { request: *request, reply: Err(fault) },
        Action::Send { .. } | Action::Abort { .. } | Action::Forget { .. } => Input::Wake,
    }
}

struct World {
    bed: Bed,
    aborting: Vec<LeaseKey>,
    log: Vec<Action>,
    /// Whether every input is followed, and every pause preceded, by wake-ups that nobody asked for.
    spurious: bool,
}

impl World {
    fn new(spurious: bool) -> Self {
        let mut bed = Bed::new(settings());
        for id in 1..=9 {
            bed.add(id, ["http://a", "http://b", "http://c"][id as usize % 3]);
        }
        Self { bed, aborting: Vec::new(), log: Vec::new(), spurious }
    }

    fn give(&mut self, input: Input) {
        let actions = self.bed.give(input);
        self.note(actions);
        if self.spurious {
            let actions = self.bed.wake();
            assert!(actions.is_empty(), "a wake-up right after an input did {actions:?}");
        }
    }

    fn note(&mut self, actions: Vec<Action>) {
        for action in &actions {
            if let Action::Abort { key } = action {
                self.aborting.push(*key);
            }
        }
        self.log.extend(actions);
    }

    fn take(&mut self, at: usize) -> Option<Action> {
        let pending = &mut self.bed.pending;
        (!pending.is_empty()).then(|| pending.remove(at % pending.len()))
    }

    fn pass(&mut self, millis: u64) {
        let until = self.bed.now.after(Duration::from_millis(millis));
        loop {
            let due = self.bed.worker.next_wakeup().filter(|at| *at <= until);
            if self.spurious {
                let target = due.unwrap_or(until).max(self.bed.now);
                let half = target.since(self.bed.now) / 2;
                if half > Duration::ZERO {
                    self.bed.now = self.bed.now.after(half);
                    let actions = self.bed.wake();
                    assert!(actions.is_empty(), "a wake-up before its time did {actions:?}");
                }
            }
            let Some(at) = self.bed.worker.next_wakeup().filter(|at| *at <= until) else { break };
            let before = self.bed.now;
            self.bed.now = self.bed.now.max(at);
            self.give(Input::Wake);
            let next = self.bed.worker.next_wakeup();
            assert!(next.is_none_or(|next| next > before), "asks to be woken for ever");
        }
        self.bed.now = until;
        self.give(Input::Wake);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Pass(millis) => self.pass(*millis),
            Step::Stop(millis) => {
                self.bed.now = self.bed.now.after(Duration::from_millis(*millis));
                self.give(Input::Wake);
            }
            Step::Answer(at) => {
                if let Some(action) = self.take(*at) {
                    let reply = self.bed.apply(action);
                    self.give(reply);
                }
            }
            Step::LoseReply(at) => {
                if let Some(action) = self.take(*at) {
                    self.bed.apply(action.clone());
                    self.give(fail(&action, StoreFault::Unknown { error: "lost".into() }));
                }
            }
            Step::LoseCall(at) => {
                if let Some(action) = self.take(*at) {
                    self.give(fail(&action, StoreFault::NotApplied { error: "down".into() }));
                }
            }
            Step::RefuseCall(at) => {
                if let Some(action) = self.take(*at) {
                    self.give(fail(&action, StoreFault::Permanent { error: "42P01".into() }));
                }
            }
            Step::Respond(at, status) => {
                let open = self.bed.opened();
                if !open.is_empty() {
                    let key = open[at % open.len()];
                    self.aborting.retain(|other| *other != key);
                    self.bed.open.remove(&key);
                    let result = AttemptResult::Responded { status: *status, retry_after: None };
                    self.give(Input::Attempted { key, result });
                }
            }
            Step::ConfirmAborts => {
                for key in std::mem::take(&mut self.aborting) {
                    self.bed.open.remove(&key);
                    self.give(Input::Aborted { key });
                }
            }
            Step::Steal(id) => self.bed.row_mut(*id).token.0 += 1,
            Step::Lock(at) => {
                if let Some(action) = self.take(*at) {
                    let mut reply = self.bed.apply(action);
                    match &mut reply {
                        Input::Renewed { reply: Ok(reply), .. } => {
                            reply.answers.iter_mut().for_each(|(_, answer)| *answer = Answer::Skipped);
                        }
                        Input::Settled { reply: Ok(reply), .. } => {
                            reply.answers.iter_mut().for_each(|(_, answer)| *answer = Answer::Skipped);
                        }
                        _ => {}
                    }
                    self.give(reply);
                }
            }
            Step::Restart => self.bed.incarnation += 1,
            Step::DbMoves(millis) => self.bed.db_ahead += Duration::from_millis(*millis),
            Step::Hint => self.give(Input::Hint),
            Step::Shutdown => self.give(Input::Shutdown),
        }
    }
}

/// Inputs that no world would give.
fn nonsense() -> impl Strategy<Value = Input> {
    let key = (1..5_i64, 0..3_i64).prop_map(|(row, token)| LeaseKey { row: RowId(row), token: Token(token) });
    let request = (0..12_u64).prop_map(RequestId);
    let db = any::<i64>().prop_map(DbTime::from_micros);
    let answer =
        prop_oneof![Just(Answer::Applied), Just(Answer::Ended), Just(Answer::Refused), Just(Answer::Skipped)];
    let answers = vec((key.clone(), answer), 0..6);
    let fault = prop_oneof![
        Just(StoreFault::Unknown { error: String::new() }),
        Just(StoreFault::NotApplied { error: String::new() }),
        Just(StoreFault::Permanent { error: String::new() }),
    ];
    let grant =
        (key.clone(), 0..3_u8, any::<u32>(), any::<u32>()).prop_map(|(key, to, attempts, reclaims)| Grant {
            key,
            destination: DestinationKey::new(format!("http://{to}")),
            attempts,
            max_attempts: attempts,
            reclaims,
            reclaimed: true,
            unsendable: None,
        });
    let claim =
        (db.clone(), vec(grant, 0..4), any::<bool>()).prop_map(|(db_now, grants, searched_expired)| {
            ClaimReply {
                db_now,
                incarnation: Incarnation::new(if searched_expired { "1" } else { "2" }),
                searched_expired,
                grants,
                failed: vec![],
                next_due_in: Some(Duration::ZERO),
                any_pending: Some(searched_expired),
            }
        });
    prop_oneof![
        Just(Input::Wake),
        Just(Input::Hint),
        (key.clone(), any::<u16>()).prop_map(|(key, status)| Input::Attempted {
            key,
            result: AttemptResult::Responded { status, retry_after: None }
        }),
        key.clone().prop_map(|key| Input::Aborted { key }),
        (request.clone(), claim).prop_map(|(request, reply)| Input::Claimed { request, reply: Ok(reply) }),
        (request.clone(), fault.clone())
            .prop_map(|(request, fault)| Input::Claimed { request, reply: Err(fault) }),
        (request.clone(), db.clone(), answers.clone()).prop_map(|(request, db_now, answers)| {
            Input::Renewed { request, reply: Ok(RenewReply { db_now, answers }) }
        }),
        (request.clone(), fault.clone())
            .prop_map(|(request, fault)| Input::Renewed { request, reply: Err(fault) }),
        (request.clone(), db.clone(), answers).prop_map(|(request, db_now, answers)| Input::Settled {
            request,
            reply: Ok(SettleReply { db_now, answers })
        }),
        (request.clone(), fault.clone())
            .prop_map(|(request, fault)| Input::Settled { request, reply: Err(fault) }),
        (request.clone(), db, vec(key, 0..4)).prop_map(|(request, db_now, keys)| Input::Owned {
            request,
            reply: Ok(OwnedReply { db_now, keys })
        }),
        (request, fault).prop_map(|(request, fault)| Input::Owned { request, reply: Err(fault) }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_world_breaks_an_invariant(steps in vec(step(), 1..200)) {
        let mut world = World::new(false);
        for step in &steps {
            world.step(step);
        }
    }

    #[test]
    fn spurious_wakeups_change_no_action(steps in vec(step(), 1..120)) {
        let (mut calm, mut noisy) = (World::new(false), World::new(true));
        for step in &steps {
            calm.step(step);
            noisy.step(step);
            prop_assert_eq!(&calm.log, &noisy.log);
        }
    }

    #[test]
    fn no_nonsense_panics(inputs in vec((0..5_000_u64, nonsense()), 1..200)) {
        let mut bed = Bed::new(settings());
        let mut open = std::collections::BTreeSet::new();
        for (millis, input) in inputs {
            bed.now = bed.now.after(Duration::from_millis(millis));
            bed.worker.handle(bed.now, input);
            bed.worker.assert_invariants();
            while let Some(action) = bed.worker.poll_action() {
                if let Action::Send { key, .. } = action {
                    open.insert(key);
                }
            }
            while bed.worker.poll_observation().is_some() {}
        }
    }
}
