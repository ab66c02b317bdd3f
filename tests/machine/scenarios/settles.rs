//! Outcomes (P6, P9).

use super::*;

#[test]
fn an_event_is_claimed_sent_and_settled() {
    let (mut bed, key) = one_open();
    bed.respond(key, 204);
    bed.answer_all();
    assert_eq!(bed.row(1).status, Status::Delivered);
    assert_eq!(bed.row(1).attempts, 1);
    assert!(bed.seen.iter().any(|seen| matches!(seen, Observation::Cycle(cycle) if cycle.delivered == 1)));
}

#[test]
fn a_success_whose_settle_is_refused_is_not_silent() {
    let (mut bed, key) = one_open();
    bed.row_mut(1).token.0 += 1;
    bed.respond(key, 200);
    bed.answer_all();
    assert!(bed.seen.contains(&Observation::SettleRefused { key, kind: SettleKind::Delivered }));
    assert_eq!(bed.row(1).status, Status::Pending, "the event goes out again");
}

#[test]
fn a_lost_settle_reply_is_repeated_and_answered_ended() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    let settle = bed.pending.remove(0);
    let request = Bed::request_of(&settle);
    bed.apply(settle);
    bed.give(Input::Settled { request, reply: Err(unknown()) });
    bed.run(SECOND);
    let repeated =
        Observation::Settled { key, kind: SettleKind::Delivered, status: Some(200), repeated: true };
    assert!(bed.seen.contains(&repeated));
    assert_eq!(bed.row(1).attempts, 1, "counted once");
}

#[test]
fn no_claim_goes_before_settles_that_failed() {
    let (mut bed, key) = one_open();
    bed.add(2, "http://b");
    bed.respond(key, 200);
    bed.pending.retain(|action| matches!(action, Action::Settle(..)));
    let request = Bed::request_of(&bed.pending.remove(0));
    bed.give(Input::Settled { request, reply: Err(StoreFault::NotApplied { error: "down".into() }) });
    bed.pass(SECOND);
    assert!(bed.pending.iter().all(|action| matches!(action, Action::Settle(..))), "{:?}", bed.pending);
}

#[test]
fn a_settle_that_fails_is_repeated_ever_later_up_to_a_quarter_of_the_timeout() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    let mut waits = Vec::new();
    let mut failed_at = bed.now;
    while waits.len() < 11 {
        bed.now = bed.now.max(bed.worker.next_wakeup().unwrap_or(bed.now));
        bed.wake();
        while !bed.pending.is_empty() {
            let action = bed.pending.remove(0);
            if let Action::Settle(request, _) = action {
                waits.push(bed.now.since(failed_at).as_millis());
                failed_at = bed.now;
                let reply = Err(StoreFault::NotApplied { error: "down".into() });
                bed.give(Input::Settled { request, reply });
            } else {
                bed.answer(action);
            }
        }
    }
    assert_eq!(waits[1..], [10, 20, 40, 80, 160, 320, 640, 1_250, 1_250, 1_250]);
}

#[test]
fn a_settle_that_is_twice_not_answered_in_time_is_repeated_in_parts() {
    let limits = Limits { max_in_flight: 9, max_leased: 9, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound");
    let timeout = settings.timing().store_timeout();
    let mut bed = Bed::new(settings);
    for id in 1..=9 {
        bed.add(id, &format!("http://{id}"));
    }
    bed.run(MS);
    let open = bed.opened();
    assert_eq!(open.len(), 9);
    let next = |bed: &mut Bed, took: Duration, answered: bool| loop {
        bed.now = bed.now.max(bed.worker.next_wakeup().unwrap_or(bed.now));
        bed.wake();
        let at = bed.pending.iter().position(|action| matches!(action, Action::Settle(..)));
        let settle = at.map(|at| bed.pending.remove(at));
        bed.answer_all();
        let Some(Action::Settle(request, settle)) = settle else { continue };
        let size = settle.entries.len();
        bed.now = bed.now.after(took);
        if answered {
            bed.answer(Action::Settle(request, settle));
        } else {
            let reply = Err(StoreFault::Unknown { error: "too much".into() });
            bed.give(Input::Settled { request, reply });
        }
        return size;
    };
    for key in &open[1..] {
        bed.respond(*key, 200);
    }
    // The first outcome goes alone, the others gather.
    assert_eq!(next(&mut bed, MS, true), 1);
    let tries = [(timeout, false), (timeout, false), (MS, true)];
    let sizes: Vec<usize> = tries.map(|(took, answered)| next(&mut bed, took, answered)).into();
    assert_eq!(sizes, [7, 7, 3]);
    // No claim goes before the rest.
    assert!(!bed.pending.iter().any(|action| matches!(action, Action::Claim(..))));
    assert_eq!(next(&mut bed, MS, true), 4);
    // Two that failed at once were not too large.
    bed.respond(open[0], 200);
    let sizes: Vec<usize> =
        [(MS, false), (MS, false), (MS, true)].map(|(took, answered)| next(&mut bed, took, answered)).into();
    assert_eq!(sizes, [1, 1, 1]);
    assert_eq!(bed.worker.leased(), 0);
}

#[test]
fn one_bad_outcome_is_isolated_and_given_up() {
    let mut bed = Bed::new(settings());
    for id in 1..=4 {
        bed.add(id, if id % 2 == 0 { "http://a" } else { "http://b" });
    }
    bed.run(MS);
    let open = bed.opened();
    assert_eq!(open.len(), 4);
    bed.respond(open[0], 200);
    let first = bed.pending.remove(0);
    for key in &open[1..] {
        bed.respond(*key, 200);
    }
    bed.answer(first);
    for _ in 0..10 {
        let Some(at) = bed.pending.iter().position(|action| matches!(action, Action::Settle(..))) else {
            break;
        };
        let settle = bed.pending.remove(at);
        let bad = matches!(&settle, Action::Settle(_, settle) if settle.entries.iter().any(|(key, _)| key.row == open[2].row));
        if bad {
            let request = Bed::request_of(&settle);
            bed.give(Input::Settled { request, reply: Err(StoreFault::Permanent { error: "22003".into() }) });
        } else {
            bed.answer(settle);
        }
    }
    assert!(bed.seen.contains(&Observation::SettleAbandoned { key: open[2], error: "22003".into() }));
    for key in &open {
        let delivered = bed.row(key.row.0).status == Status::Delivered;
        assert_eq!(delivered, *key != open[2], "event {}", key.row.0);
    }
    assert_eq!(bed.worker.leased(), 0);
}

#[test]
fn the_delay_is_fixed_when_the_outcome_is_known() {
    let (mut bed, key) = one_open();
    let db = bed.db().late;
    bed.give(Input::Attempted {
        key,
        result: AttemptResult::Responded { status: 503, retry_after: Some(RetryAfter::Delay(10 * SECOND)) },
    });
    let request = Bed::request_of(&bed.pending.remove(0));
    bed.now = bed.now.after(4 * SECOND);
    bed.give(Input::Settled { request, reply: Err(StoreFault::NotApplied { error: "down".into() }) });
    bed.run(SECOND);
    assert_eq!(bed.row(1).next_attempt_at, db.after(10 * SECOND), "not 14 s");
}

#[test]
fn an_oversized_payload_is_a_failed_attempt_without_a_request() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    let mut reply = bed.apply(claim);
    if let Input::Claimed { reply: Ok(reply), .. } = &mut reply {
        reply.grants[0].unsendable = Some(leasehold::machine::Unsendable::Oversized { bytes: 9_000_000 });
    }
    bed.give(reply);
    assert!(bed.opened().is_empty());
    bed.answer_all();
    assert_eq!((bed.row(1).status, bed.row(1).attempts), (Status::Pending, 1));
    assert!(bed.row(1).last_error.as_ref().is_some_and(|error| error.contains("9000000 bytes")));
}

#[test]
fn an_outcome_given_up_on_is_not_taken_for_an_orphan() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    let settle = bed.pending.remove(0);
    let request = Bed::request_of(&settle);
    bed.give(Input::Settled { request, reply: Err(StoreFault::Permanent { error: "22003".into() }) });
    assert!(bed.seen.contains(&Observation::HeartbeatEnded { key, why: HeartbeatEnd::Abandoned }));
    bed.pass(SECOND);
    let claim = bed.pending.remove(0);
    let request = Bed::request_of(&claim);
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    bed.run(10 * SECOND);
    assert!(!bed.seen.iter().any(|seen| matches!(seen, Observation::OrphanReleased { .. })));
    assert!(bed.row(1).lease.is_some(), "its lease runs out by itself");
}

#[test]
fn a_refusal_for_good_after_a_failure_ends_the_precedence_of_settles() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    for fault in [unknown(), StoreFault::Permanent { error: "22003".into() }] {
        bed.pass(SECOND);
        let settle = bed.pending.iter().position(|action| matches!(action, Action::Settle(..)));
        let settle = bed.pending.remove(settle.expect("a settle"));
        let request = Bed::request_of(&settle);
        bed.give(Input::Settled { request, reply: Err(fault) });
    }
    assert!(bed.seen.contains(&Observation::HeartbeatEnded { key, why: HeartbeatEnd::Abandoned }));
    bed.add(2, "http://b");
    bed.run(10 * SECOND);
    assert!(bed.opened().iter().any(|key| key.row.0 == 2), "the worker claims on");
}

#[test]
fn a_cycle_counts_what_became_of_each_of_its_events() {
    let limits = Limits { max_in_flight: 9, max_leased: 9, claim_batch: 9, ..limits() };
    let retry = RetryPolicy { fail_statuses: [410].into(), ..retry() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry, 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    for id in 1..=7 {
        bed.add(id, &format!("http://{id}"));
    }
    bed.wake();
    bed.answer_all();
    let keys = bed.opened();
    assert_eq!(keys.len(), 7);
    assert_eq!(bed.worker.open(), 7);
    for (key, status) in keys.iter().zip([200, 201, 204, 500, 503, 410, 410]) {
        bed.respond(*key, status);
    }
    bed.answer_all();
    assert_eq!(bed.worker.open(), 0);
    let cycles: Vec<_> = bed.seen.iter().filter(|seen| matches!(seen, Observation::Cycle(_))).collect();
    let [Observation::Cycle(cycle)] = cycles[..] else { panic!("one cycle: {cycles:?}") };
    assert_eq!((cycle.claimed, cycle.reclaimed, cycle.failed_by_claim), (7, 0, 0));
    assert_eq!((cycle.delivered, cycle.retried, cycle.failed), (3, 2, 2));
    assert_eq!((cycle.released, cycle.lost), (0, 0));
}

#[test]
fn a_cycle_counts_what_was_reclaimed_lost_and_released() {
    let mut bed = Bed::new(settings());
    for (id, destination) in [(1, "http://a"), (2, "http://b"), (3, "http://b"), (4, "http://b")] {
        bed.add(id, destination);
        let db = bed.db();
        bed.row_mut(id).claim(db, &WorkerId::new("dies"), &TERMS);
    }
    bed.run(5 * SECOND);
    let keys = bed.opened();
    assert_eq!(keys.iter().map(|key| key.row.0).collect::<Vec<_>>(), [1, 2, 3]);
    bed.row_mut(1).token.0 += 1;
    bed.run(8 * SECOND);
    bed.confirm_abort(keys[0]);
    bed.give(Input::Shutdown);
    for key in &keys[1..] {
        bed.respond(*key, 200);
    }
    bed.answer_all();
    let cycles: Vec<_> = bed.seen.iter().filter(|seen| matches!(seen, Observation::Cycle(_))).collect();
    let [Observation::Cycle(cycle)] = cycles[..] else { panic!("one cycle: {cycles:?}") };
    assert_eq!((cycle.claimed, cycle.reclaimed, cycle.delivered), (4, 4, 2));
    assert_eq!((cycle.released, cycle.lost), (1, 1));
}

#[test]
fn a_claim_that_only_failed_events_is_a_cycle_and_an_empty_one_is_none() {
    let mut bed = Bed::new(settings());
    bed.run(MS);
    assert!(bed.seen.is_empty(), "{:?}", bed.seen);
    bed.add(1, "http://a");
    bed.row_mut(1).attempts = 20;
    bed.run(10 * MS);
    let cycles: Vec<_> = bed.seen.iter().filter(|seen| matches!(seen, Observation::Cycle(_))).collect();
    let [Observation::Cycle(cycle)] = cycles[..] else { panic!("one cycle: {cycles:?}") };
    assert_eq!((cycle.claimed, cycle.failed_by_claim), (0, 1));
}
