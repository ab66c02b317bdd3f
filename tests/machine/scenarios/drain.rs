//! Ends: drains, and an empty outbox (P8).

use super::*;

#[test]
fn until_the_outbox_is_empty_claims_that_are_not_full_start_at_the_beginning() {
    let mut settings = settings();
    settings.until_empty = true;
    let mut bed = Bed::new(settings);
    bed.add(1, "http://a");
    bed.row_mut(1).next_attempt_at = bed.db().early.after(SECOND);
    let claims = claims_within(&mut bed, 500 * MS);
    assert!(claims.len() > 1 && claims.iter().all(|(_, claim)| claim.from.is_none() && claim.count_pending));
}

#[test]
fn a_drain_releases_the_queue_and_finishes_what_is_open() {
    let mut bed = Bed::new(settings());
    for id in 1..=4 {
        bed.add(id, "http://a");
    }
    bed.run(MS);
    let open = bed.opened();
    bed.give(Input::Shutdown);
    bed.answer_all();
    assert_eq!(bed.worker.leased(), open.len(), "the queue was released");
    assert!((1..=4).all(|id| bed.row(id).attempts == 0));
    let drained =
        |seen: &&Observation| matches!(seen, Observation::HeartbeatEnded { why: HeartbeatEnd::Drained, .. });
    assert_eq!(bed.seen.iter().filter(drained).count(), 4 - open.len());
    for key in open {
        bed.respond(key, 200);
    }
    bed.answer_all();
    let ended = bed.worker.ended().expect("drained");
    assert_eq!((ended.aborted, ended.unsettled), (0, 0));
    assert!(bed.worker.next_wakeup().is_none());
}

#[test]
fn what_is_granted_during_a_drain_is_given_back_at_once() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    bed.give(Input::Shutdown);
    bed.answer(claim);
    bed.answer_all();
    assert!(bed.opened().is_empty());
    assert!(bed.row(1).lease.is_none());
    assert!(
        bed.seen
            .iter()
            .any(|seen| { matches!(seen, Observation::HeartbeatEnded { why: HeartbeatEnd::Drained, .. }) })
    );
    assert!(bed.worker.ended().is_some());
}

#[test]
fn a_drain_aborts_2r_before_its_timeout_and_delays_what_it_aborted() {
    let (mut bed, key) = one_open();
    bed.give(Input::Shutdown);
    let began = bed.now;
    let aborted = loop {
        bed.answer_all();
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it drains"));
        let aborted = aborts(&bed.wake());
        if !aborted.is_empty() {
            break aborted;
        }
    };
    assert_eq!((aborted, bed.now.since(began)), (vec![key], 18 * SECOND));
    let db = bed.db().late;
    bed.confirm_abort(key);
    bed.answer_all();
    assert_eq!(bed.row(1).next_attempt_at, db.after(3 * SECOND));
    assert!(bed.row(1).lease.is_none());
    assert_eq!(bed.worker.ended().map(|ended| ended.aborted), Some(1));
}

#[test]
fn a_drain_ends_at_its_timeout_whatever_the_store_does() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    bed.give(Input::Shutdown);
    let began = bed.now;
    while bed.worker.ended().is_none() {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it drains"));
        bed.wake();
    }
    assert_eq!(bed.now.since(began), 28 * SECOND);
    assert!(bed.seen.contains(&Observation::DrainUnsettled { keys: vec![key] }));
    assert_eq!(bed.worker.ended().map(|ended| ended.unsettled), Some(1));
}

#[test]
fn until_empty_ends_only_when_nothing_is_pending() {
    let mut settings = settings();
    settings.until_empty = true;
    let mut bed = Bed::new(settings);
    bed.add(1, "http://a");
    bed.run(MS);
    let key = bed.opened()[0];
    bed.respond(key, 500);
    bed.run(4 * SECOND);
    assert!(bed.worker.ended().is_none(), "it waits for its retry");
    bed.run(2 * SECOND);
    let key = bed.opened()[0];
    bed.respond(key, 200);
    bed.run(SECOND);
    assert!(bed.worker.ended().is_some());
}

/// One that fails is made again, but not where every claim was answered: a worker that was never let in has nothing.
#[test]
fn a_drain_ends_only_after_a_last_look() {
    for unknown_claim in [true, false] {
        let mut bed = Bed::new(settings());
        let request = next_claim(&mut bed);
        let reply = if unknown_claim { unknown() } else { StoreFault::NotApplied { error: "no".into() } };
        bed.give(Input::Claimed { request, reply: Err(reply) });
        bed.answer_all();
        let actions = bed.give(Input::Shutdown);
        let look = actions.iter().find(|action| matches!(action, Action::Owned(..))).expect("a look").clone();
        bed.pending.clear();
        bed.now = bed.now.after(SECOND);
        bed.wake();
        assert!(bed.worker.ended().is_none());
        bed.give(Input::Owned { request: Bed::request_of(&look), reply: Err(unknown()) });
        assert_eq!(bed.worker.ended().is_none(), unknown_claim, "after one that failed");
        bed.run(SECOND);
        assert!(bed.worker.ended().is_some());
    }
}
