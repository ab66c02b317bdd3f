//! Heartbeats (P5).

use leasehold::machine::{Moment, RenewRequest};

use super::*;

#[test]
fn a_request_far_longer_than_the_lease_keeps_its_lease() {
    let (mut bed, key) = one_open();
    bed.run(600 * SECOND);
    assert_eq!(bed.opened(), [key], "still the same request");
    let until = bed.row(1).lease.as_ref().expect("still leased").until;
    assert!(until > bed.db().early, "and live");
    assert!(!bed.seen.iter().any(|seen| matches!(seen, Observation::Fenced { .. })));
}

#[test]
fn events_waiting_in_the_queue_are_renewed_too() {
    let mut bed = Bed::new(settings());
    for id in 1..=4 {
        bed.add(id, "http://a");
    }
    bed.run(300 * SECOND);
    assert_eq!(bed.opened().len(), 2, "the destination's cap");
    for id in 1..=4 {
        assert!(bed.row(id).lease.as_ref().is_some_and(|lease| lease.until > bed.db().early), "event {id}");
    }
}

#[test]
fn a_fast_delivery_costs_no_heartbeat() {
    let (mut bed, key) = one_open();
    bed.pass(4 * SECOND);
    assert!(!bed.pending.iter().any(|action| matches!(action, Action::Renew(..))));
    bed.respond(key, 200);
}

#[test]
fn a_refused_renewal_aborts_at_once() {
    let (mut bed, key) = one_open();
    bed.row_mut(1).token.0 += 1;
    bed.run(9 * SECOND);
    assert!(bed.seen.contains(&Observation::HeartbeatEnded { key, why: HeartbeatEnd::Lost }));
    assert!(bed.worker.open() == 1, "until its socket is closed");
    bed.confirm_abort(key);
    assert_eq!(bed.worker.leased(), 0);
}

#[test]
fn a_renewal_that_comes_to_its_own_settle_loses_nothing() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    let settle = bed.pending.remove(0);
    let answer = bed.apply(settle);
    bed.run(11 * SECOND);
    assert!(bed.seen.contains(&Observation::HeartbeatEnded { key, why: HeartbeatEnd::Settled }));
    bed.give(answer);
    assert_eq!(bed.worker.leased(), 0);
}

#[test]
fn a_locked_row_is_renewed_alone_at_once_and_holds_up_nobody() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.add(2, "http://b");
    bed.run(MS);
    let (mut alone, mut batches) = (None, 0);
    for _ in 0..20_000 {
        let Some(at) = bed.worker.next_wakeup() else { break };
        bed.now = bed.now.max(at);
        bed.wake();
        while let Some(action) = (!bed.pending.is_empty()).then(|| bed.pending.remove(0)) {
            if matches!(&action, Action::Renew(_, renew) if renew.wait) {
                alone.get_or_insert(action);
                continue;
            }
            batches += u32::from(matches!(&action, Action::Renew(..)));
            let mut reply = bed.apply(action);
            if let Input::Renewed { reply: Ok(reply), .. } = &mut reply {
                for (key, answer) in &mut reply.answers {
                    if key.row.0 == 1 {
                        *answer = Answer::Skipped;
                    }
                }
            }
            bed.give(reply);
        }
        if alone.is_some() {
            break;
        }
    }
    let alone = alone.expect("a waiting renewal of its own");
    assert_eq!(batches, 1, "it was skipped once");
    assert!(matches!(&alone, Action::Renew(_, renew) if renew.keys.len() == 1 && renew.keys[0].row.0 == 1));
    bed.answer(alone);
    bed.run(60 * SECOND);
    assert_eq!(bed.opened().len(), 2, "both are still held");
}

/// Lets a worker be until `done`, with answers to batched renewals that take `took` and skip the rows that `skip` picks
/// for a statement.
fn renew_skipping<Rows: Fn(i64) -> bool>(
    bed: &mut Bed,
    took: Duration,
    mut done: impl FnMut(&Bed) -> bool,
    mut skip: impl FnMut(Moment, &RenewRequest) -> Rows,
) {
    while !done(bed) {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
        while !bed.pending.is_empty() && !done(bed) {
            let action = bed.pending.remove(0);
            let Action::Renew(_, renew) = &action else {
                bed.answer(action);
                continue;
            };
            if renew.wait {
                continue;
            }
            let skipped = skip(bed.now, renew);
            bed.now = bed.now.after(took);
            let mut reply = bed.apply(action);
            if let Input::Renewed { reply: Ok(reply), .. } = &mut reply {
                let locked = reply.answers.iter_mut().filter(|(key, _)| skipped(key.row.0));
                locked.for_each(|(_, answer)| *answer = Answer::Skipped);
            }
            bed.give(reply);
        }
    }
}

/// The statement that waits may stand behind others whose rows stay locked.
#[test]
fn a_locked_row_stays_in_the_batches() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.add(2, "http://b");
    bed.run(MS);
    let (start, mut tries) = (bed.now, Vec::new());
    renew_skipping(
        &mut bed,
        Duration::ZERO,
        |bed| bed.now.since(start) >= 26 * SECOND,
        |now, renew| {
            let at = now.since(start);
            let locked = at < 12 * SECOND;
            let tried = locked && renew.keys.iter().any(|key| key.row.0 == 1);
            tries.extend(tried.then_some((at, renew.keys.len())));
            move |row| locked && row == 1
        },
    );
    assert_eq!(bed.opened().len(), 2, "both are still held");
    // The first one takes both; the others are no run of their own, and come every 40 ms.
    let (first, rest) = tries.split_first().expect("a batch");
    assert_eq!(first.1, 2);
    assert!(rest.iter().all(|(_, keys)| *keys == 1), "{rest:?}");
    assert!(tries.windows(2).all(|pair| pair[1].0 - pair[0].0 == 40 * MS), "{tries:?}");
}

/// Where calls take long, the statement after that may come too late.
#[test]
fn what_was_skipped_just_now_goes_along_with_what_is_due() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.run(4 * SECOND);
    bed.add(2, "http://b");
    bed.run(SECOND);
    assert_eq!(bed.opened().len(), 2);
    let (end, statements) = (bed.now.after(20 * SECOND), core::cell::RefCell::new(Vec::new()));
    renew_skipping(
        &mut bed,
        4_500 * MS,
        |bed| bed.now >= end || statements.borrow().len() >= 2,
        |_, renew| {
            let mut statements = statements.borrow_mut();
            let first = statements.is_empty();
            statements.push(renew.keys.iter().map(|key| key.row.0).collect::<Vec<_>>());
            move |_| first
        },
    );
    assert_eq!(statements.borrow()[..], [vec![1], vec![1, 2]]);
}

/// A worker that holds 3,500 leases.
fn crowd() -> Bed {
    let limits = Limits {
        max_in_flight: 1,
        max_leased: 4_000,
        claim_batch: 4_000,
        max_in_flight_per_destination: 4_000,
        ..limits()
    };
    let mut settings =
        WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    settings.eager_poll = 100 * MS;
    let mut bed = Bed::new(settings);
    for id in 1..=3_500 {
        bed.add(id, "http://a");
    }
    bed.run(SECOND);
    bed
}

/// A run of full statements may take long.
#[test]
fn a_locked_row_does_not_wait_for_the_end_of_a_run() {
    let mut bed = crowd();
    let statements = core::cell::RefCell::new(Vec::new());
    renew_skipping(
        &mut bed,
        50 * MS,
        |_| statements.borrow().len() >= 5,
        |_, renew| {
            let mut statements = statements.borrow_mut();
            let first = statements.is_empty();
            statements.push((renew.keys.len(), renew.keys.iter().any(|key| key.row.0 == 1)));
            move |row| first && row == 1
        },
    );
    // 40 ms after it was skipped, with what is left of the run behind it.
    let first_four = [(1_000, true), (1_000, false), (1_000, true), (501, false)];
    assert_eq!(statements.borrow()[..4], first_four);
}

/// Or they would take up every statement.
#[test]
fn many_locked_rows_do_not_keep_the_others_from_theirs() {
    const LOCKED: i64 = 2_500;
    let mut bed = crowd();
    let (end, mut renewed) = (bed.now.after(10 * SECOND), std::collections::BTreeSet::new());
    renew_skipping(
        &mut bed,
        50 * MS,
        |bed| bed.now >= end,
        |now, renew| {
            let free = renew.keys.iter().map(|key| key.row.0).filter(|row| *row > LOCKED && now < end);
            renewed.extend(free);
            |row| row <= LOCKED
        },
    );
    assert_eq!(renewed.len(), 1_000, "each of the others has its turn in the run");
}

/// Two events open and one queued at one destination, and no renewal answered for a while.
fn unrenewed_for(duration: Duration) -> (Bed, LeaseKey) {
    let mut bed = Bed::new(settings());
    for id in 1..=3 {
        bed.add(id, "http://a");
    }
    bed.run(MS);
    bed.pass(duration);
    let key = bed.opened()[0];
    (bed, key)
}

fn starts(actions: &[Action]) -> usize {
    actions.iter().filter(|action| matches!(action, Action::Claim(..) | Action::Send { .. })).count()
}

#[test]
fn nothing_starts_while_a_renewal_is_overdue() {
    let (mut bed, key) = unrenewed_for(14_999 * MS);
    assert_eq!(starts(&bed.respond(key, 200)), 1, "no more than H + R have passed");
    let (mut bed, key) = unrenewed_for(15_000 * MS);
    assert_eq!(starts(&bed.respond(key, 200)), 0);
    bed.answer_all();
    assert_eq!(bed.opened().len(), 2, "the queued event starts once renewals are answered");
}

#[test]
fn a_renewed_deadline_counts_from_the_renewals_send() {
    let (mut bed, key) = one_open();
    bed.pass(9 * SECOND);
    let at = bed
        .pending
        .iter()
        .position(|action| matches!(action, Action::Renew(..)))
        .expect("it fell due at 8.75 s");
    let renew = bed.pending.remove(at);
    bed.now = bed.now.after(4 * SECOND);
    bed.answer(renew);
    bed.pending.clear();
    // Sent 8.75 s after the claim: fenced 27 s later, not 27 s after the reply.
    bed.pass(22_700 * MS);
    assert!(!bed.seen.iter().any(|seen| matches!(seen, Observation::Fenced { .. })));
    bed.pass(200 * MS);
    assert!(bed.seen.contains(&Observation::Fenced { key, open: true }));
}

#[test]
fn a_hundred_thousand_leases_are_renewed_in_full_statements_without_a_late_one() {
    let limits = Limits {
        max_in_flight: 100_000,
        max_in_flight_per_destination: 100_000,
        max_leased: 100_000,
        claim_batch: 10_000,
        ..limits()
    };
    let settings = leasehold::machine::WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 0);
    let mut bed = Bed::new(settings.expect("sound settings"));
    for id in 1..=100_000 {
        bed.add(id, "http://a");
    }
    // Only the outermost checks: a whole-state scan each input would take for ever.
    let mut statements = 0;
    let mut give = |bed: &mut Bed, input: Input| {
        bed.worker.handle(bed.now, input);
        while let Some(action) = bed.worker.poll_action() {
            match action {
                Action::Renew(_, ref renew) => {
                    statements += 1;
                    assert!(renew.keys.len() <= 1_000);
                    bed.pending.push(action);
                }
                Action::Claim(..) => bed.pending.push(action),
                _ => {}
            }
        }
        while let Some(seen) = bed.worker.poll_observation() {
            assert!(!matches!(seen, Observation::Fenced { .. }), "{seen:?}");
        }
    };
    give(&mut bed, Input::Wake);
    let end = bed.now.after(40 * SECOND);
    while bed.now < end {
        if let Some(action) = bed.pending.pop() {
            bed.now = bed.now.after(20 * MS);
            let reply = bed.apply(action);
            give(&mut bed, reply);
        } else {
            bed.now = bed.worker.next_wakeup().expect("leases are held").max(bed.now);
            give(&mut bed, Input::Wake);
        }
    }
    bed.worker.assert_invariants();
    assert_eq!(statements, 400, "a hundred statements every seven eighths of H");
    let least = bed.rows.values().filter_map(|(row, _)| row.lease.as_ref()).map(|lease| lease.until).min();
    assert!(
        least.is_some_and(|until| until.since(bed.db().late) > 15 * SECOND),
        "no lease came close to its end"
    );
}

#[test]
fn more_than_a_statement_of_ripe_leases_is_renewed_in_one_go() {
    let limits =
        Limits { max_leased: 2_000, claim_batch: 2_000, max_in_flight_per_destination: 1_000, ..limits() };
    let mut settings =
        WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    settings.eager_poll = 100 * MS;
    let mut bed = Bed::new(settings);
    for id in 1..=1_000 {
        bed.add(id, "http://a");
    }
    bed.run(SECOND);
    // Confirmed later: more than half of H old when the run begins, but not seven eighths.
    for id in 1_001..=1_200 {
        bed.add(id, "http://a");
    }
    let (start, mut renewals) = (bed.now, Vec::new());
    while bed.now.since(start) < 9 * SECOND {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
        while !bed.pending.is_empty() {
            let action = bed.pending.remove(0);
            if let Action::Renew(_, renew) = &action {
                renewals.push((bed.now.since(start).as_millis(), renew.keys.len()));
            }
            bed.answer(action);
        }
    }
    let [(first, 1_000), (second, 200)] = renewals[..] else { panic!("{renewals:?}") };
    assert_eq!(first, second);
}

#[test]
fn a_renewal_alone_that_fails_is_repeated_ever_later() {
    let (mut bed, key) = one_open();
    let mut waits = Vec::new();
    let mut failed_at = None;
    while waits.len() < 3 {
        assert!(bed.row(1).lease.as_ref().is_some_and(|lease| lease.until > bed.db().early), "{waits:?}");
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
        while !bed.pending.is_empty() {
            let action = bed.pending.remove(0);
            match &action {
                Action::Renew(request, renew) if renew.wait => {
                    assert_eq!(renew.keys, [key]);
                    waits.extend(failed_at.map(|at| bed.now.since(at).as_millis()));
                    failed_at = Some(bed.now);
                    let reply = Err(StoreFault::NotApplied { error: String::new() });
                    bed.give(Input::Renewed { request: *request, reply });
                }
                Action::Renew(request, _) => {
                    let reply = RenewReply { db_now: bed.db().late, answers: vec![(key, Answer::Skipped)] };
                    bed.give(Input::Renewed { request: *request, reply: Ok(reply) });
                }
                _ => drop(bed.answer(action)),
            }
        }
    }
    assert_eq!(waits, [20, 40, 80]);
}

#[test]
fn a_waiting_renewal_whose_row_is_locked_again_is_repeated() {
    let (mut bed, key) = one_open();
    let mut alone = 0;
    let start = bed.now;
    while alone < 3 {
        assert!(bed.now.since(start) < 20 * SECOND);
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
        while !bed.pending.is_empty() {
            let action = bed.pending.remove(0);
            if let Action::Renew(request, renew) = &action {
                alone += u32::from(renew.wait);
                let reply = RenewReply { db_now: bed.db().late, answers: vec![(key, Answer::Skipped)] };
                bed.give(Input::Renewed { request: *request, reply: Ok(reply) });
            } else {
                bed.answer(action);
            }
        }
    }
}
