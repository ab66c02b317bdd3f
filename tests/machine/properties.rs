//! No sequence of inputs panics or breaks an invariant; spurious wake-ups change no action.

use std::time::Duration;

use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimReply, DbTime, DestinationKey, Grant, Incarnation, Input, LeaseKey,
    OwnedReply, Place, RenewReply, RequestId, RowId, SettleReply, StoreFault, Token,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::bed::{Bed, settings};
use crate::world::{Step, World};

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
    let claim = (db.clone(), vec(grant, 0..4), any::<bool>(), proptest::option::of(db.clone())).prop_map(
        |(db_now, grants, searched_expired, front)| ClaimReply {
            db_now,
            incarnation: Incarnation::new(if searched_expired { "1" } else { "2" }),
            searched_expired,
            grants,
            failed: vec![],
            front: front.map(Place::behind),
            leases_front: front.map(Token::of),
            next_due_in: Some(Duration::ZERO),
            any_pending: Some(searched_expired),
        },
    );
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

/// Found by `no_world_breaks_an_invariant`: a lease that waits behind an older one of its row is not given back by a
/// drain while the older one is unsettled, and runs out when the drain's time does.
#[test]
fn a_drain_may_end_with_a_lease_behind_another() {
    let mut world = World::new(false);
    for step in [
        Step::Pass(1),
        Step::LoseReply(0),
        Step::LoseReply(0),
        Step::Pass(250),
        Step::Answer(0),
        Step::RefuseCall(0),
        Step::RefuseCall(1),
        Step::LoseReply(1),
        Step::Shutdown,
        Step::Answer(0),
        Step::Stop(22_056),
        Step::Answer(3),
        Step::Pass(1_681),
        Step::Pass(1_640),
        Step::Pass(2_623),
    ] {
        world.step(&step);
    }
    let ended = world.bed.worker.ended().expect("the drain's time is over");
    assert!(ended.unsettled > 0, "{ended:?}");
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
