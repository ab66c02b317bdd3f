//! When to claim, and how much (P1, P13).

use super::*;

#[test]
fn a_destination_gets_no_more_than_its_share() {
    let mut bed = Bed::new(settings());
    for id in 1..=20 {
        bed.add(id, "http://slow");
    }
    bed.add(21, "http://quick");
    bed.run(SECOND);
    let held =
        bed.rows.values().filter(|(row, to)| row.lease.is_some() && to.as_str() == "http://slow").count();
    assert_eq!(held, 4, "the cap and one refill");
    assert!(bed.opened().iter().any(|key| key.row.0 == 21), "the other destination is not kept waiting");
}

#[test]
fn events_of_a_destination_are_sent_in_the_order_in_which_they_were_claimed() {
    let mut bed = Bed::new(settings());
    for id in [5, 6, 8] {
        bed.add(id, "http://a");
    }
    bed.run(MS);
    bed.add(1, "http://a");
    bed.run(2 * SECOND);
    assert_eq!(bed.worker.leased(), 4);
    let mut sent = Vec::new();
    while let Some(key) = bed.opened().first().copied() {
        sent.extend(
            bed.opened().iter().map(|key| key.row.0).filter(|id| !sent.contains(id)).collect::<Vec<_>>(),
        );
        bed.respond(key, 200);
        bed.answer_all();
    }
    assert_eq!(sent, [5, 6, 8, 1]);
}

#[test]
fn a_refill_does_not_wait_for_the_next_poll() {
    let mut bed = Bed::new(settings());
    for id in 1..=20 {
        bed.add(id, "http://a");
    }
    bed.run(MS);
    let start = bed.now;
    for _ in 0..20 {
        let key = bed.opened()[0];
        bed.respond(key, 200);
        bed.answer_all();
    }
    assert_eq!(bed.now, start);
    assert!((1..=20).all(|id| bed.row(id).status == Status::Delivered));
}

#[test]
fn a_claim_that_shares_limited_makes_the_next_one_read_less_until_more_is_found() {
    let limits = Limits { claim_batch: 500, max_leased: 1_000, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    for id in 1..=1_000 {
        bed.add(id, "http://full");
    }
    let read = |claims: Vec<(Duration, ClaimRequest)>| -> Vec<u32> {
        let fresh = claims.into_iter().filter(|(_, claim)| !claim.terms.expired);
        fresh.map(|(_, claim)| claim.limit).collect()
    };
    let claims = read(claims_within(&mut bed, 100 * MS));
    assert_eq!(claims[0], 500, "as much as there is room for");
    assert!(claims.len() > 50 && claims[1..].iter().all(|limit| *limit == 32), "{claims:?}");
    // 400 destinations have something as well: at first 32 of them are found, then all.
    for id in 1_001..=1_400 {
        bed.add(id, &format!("http://{id}"));
    }
    let claims = read(claims_within(&mut bed, 5 * MS));
    assert_eq!(claims[..2], [32, 500], "{claims:?}");
    assert_eq!(bed.worker.leased(), 404);
}

#[test]
fn who_pauses_for_a_poll_interval_has_said_that_it_sleeps() {
    for micros in (100..2_000).step_by(100) {
        let mut bed = Bed::new(settings());
        let (start, mut asleep) = (bed.now, false);
        while bed.now.since(start) < 2 * SECOND {
            for action in bed.wake() {
                if let Action::Claim(_, claim) = action {
                    asleep = claim.asleep.is_some();
                }
            }
            bed.pass(Duration::from_micros(micros));
            bed.answer_all();
            let next = bed.worker.next_wakeup().expect("it polls");
            assert!(asleep || next.since(bed.now) <= 4 * MS, "a store that takes {micros} microseconds");
            bed.now = bed.now.max(next);
        }
        assert!(asleep, "it never slept");
    }
}

#[test]
fn a_claim_that_found_something_is_followed_after_as_long_as_it_took() {
    let mut bed = Bed::new(settings());
    bed.run(10 * MS);
    bed.add(1, "http://a");
    for (claim, pause) in [("of an event", 3 * MS), ("of nothing", settings().eager_poll)] {
        bed.now = bed.worker.next_wakeup().expect("it polls");
        bed.wake();
        bed.pass(3 * MS);
        bed.answer_all();
        let next = bed.worker.next_wakeup().expect("it polls");
        assert_eq!(next.since(bed.now), pause, "after a claim {claim}");
    }
}

#[test]
fn a_worker_polls_eagerly_for_a_second_and_then_says_that_it_sleeps() {
    let (mut bed, key) = one_open();
    bed.respond(key, 204);
    bed.answer_all();
    let claims = claims_within(&mut bed, 3 * SECOND);
    let (awake, asleep): (Vec<_>, Vec<_>) = claims.iter().partition(|(_, claim)| claim.asleep.is_none());
    for polls in awake.windows(2) {
        let (poll, next) = (polls[0].0, polls[1].0);
        // It had found the event at most 2 ms before.
        let pause = |idle: Duration| (idle / 64).clamp(MS / 10, 4 * MS);
        assert!((pause(poll)..=pause(poll + 2 * MS)).contains(&(next - poll)), "{poll:?}, then {next:?}");
    }
    assert!(awake.iter().all(|(at, _)| *at < SECOND));
    assert!(asleep.first().is_some_and(|(at, _)| *at < SECOND + 4 * MS), "it looks once more as it says so");
    assert!((8..=9).contains(&asleep.len()), "then every poll interval: {asleep:?}");
    let poll = Some(settings().limits().poll_interval);
    assert!(asleep.iter().all(|(_, claim)| claim.asleep == poll), "as it says: {asleep:?}");
    // An event ends the sleep.
    bed.add(2, "http://a");
    bed.give(Input::Hint);
    bed.answer_all();
    let next = claims_within(&mut bed, SECOND / 10);
    assert!(next.len() > 50 && next.iter().all(|(_, claim)| claim.asleep.is_none()), "{next:?}");
}

#[test]
fn max_leased_is_never_exceeded() {
    let mut bed = Bed::new(settings());
    for id in 1..=50 {
        bed.add(id, &format!("http://{id}"));
    }
    bed.run(SECOND);
    assert_eq!(bed.worker.leased(), 8);
    assert_eq!(bed.opened().len(), 4);
}

#[test]
fn a_refill_is_asked_for_when_no_more_than_the_cap_is_held() {
    let mut bed = Bed::new(settings());
    for id in 1..=20 {
        bed.add(id, "http://a");
    }
    bed.wake();
    bed.answer_all();
    assert_eq!(bed.worker.leased(), 4, "twice the cap");
    bed.respond(bed.opened()[0], 200);
    bed.answer_all();
    assert_eq!(bed.worker.leased(), 3);
    bed.respond(bed.opened()[0], 200);
    bed.answer_all();
    assert_eq!(bed.worker.leased(), 4);
}

#[test]
fn a_share_that_limits_a_claim_whose_reply_finds_room_again_is_refilled_at_once() {
    let mut bed = Bed::new(settings());
    for id in 1..=3 {
        bed.add(id, "http://a");
    }
    bed.wake();
    bed.answer_all();
    let keys = bed.opened();
    for id in 4..=20 {
        bed.add(id, "http://a");
    }
    // A claim that may take one is under way while two events end: the cap is held when it is answered.
    bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
    bed.wake();
    let claim = bed.pending.remove(0);
    assert!(matches!(&claim, Action::Claim(_, claim) if claim.shares[0].1 == 1), "{claim:?}");
    for key in keys {
        bed.respond(key, 200);
        bed.answer_all();
    }
    assert_eq!(bed.worker.leased(), 1);
    bed.answer(claim);
    bed.answer_all();
    assert_eq!(bed.worker.leased(), 4);
}

#[test]
fn with_nothing_left_to_start_a_backlog_is_claimed_whatever_room_there_is() {
    let limits = Limits { max_in_flight: 6, max_leased: 9, claim_batch: 8, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    for id in 1..=30 {
        bed.add(id, &format!("http://{id}"));
    }
    bed.wake();
    bed.answer_all();
    assert_eq!((bed.worker.leased(), bed.opened().len()), (9, 6), "room for none");
    let mut leased = Vec::new();
    for _ in 0..3 {
        bed.respond(bed.opened()[0], 200);
        bed.answer_all();
        leased.push(bed.worker.leased());
    }
    assert_eq!(leased, [8, 7, 8], "room for two is no half of a batch, until nothing is queued");
}

#[test]
fn what_falls_due_before_the_next_poll_is_claimed_then() {
    // At once would be for ever, should a store have nothing else to say.
    for (due, wait) in [(20 * MS, 20 * MS), (300 * MS, 250 * MS), (Duration::ZERO, MS / 10)] {
        let mut bed = Bed::new(settings());
        bed.run(3_100 * MS);
        let request = next_claim(&mut bed);
        let start = bed.now;
        bed.give(Input::Claimed { request, reply: Ok(empty(bed.db().late, Some(due))) });
        next_claim(&mut bed);
        assert_eq!(bed.now.since(start), wait, "due in {due:?}");
    }
}

#[test]
fn a_claim_that_found_something_and_left_something_due_is_followed_by_another_at_once() {
    for (due, wait) in [(Some(Duration::ZERO), Duration::ZERO), (None, 10 * MS)] {
        let mut bed = Bed::new(settings());
        bed.run(3_100 * MS);
        let request = next_claim(&mut bed);
        bed.pass(10 * MS);
        let start = bed.now;
        let failed = vec![(RowId(9), ClaimFailure::AttemptsSpent)];
        let reply = ClaimReply { failed, ..empty(bed.db().late, due) };
        bed.give(Input::Claimed { request, reply: Ok(reply) });
        if bed.pending.is_empty() {
            next_claim(&mut bed);
        }
        assert_eq!(bed.now.since(start), wait, "due in {due:?}");
    }
}

/// What it brings may be more than arrives within `R`.
#[test]
fn a_claim_that_is_not_answered_in_time_takes_less_the_next_time() {
    let timeout = settings().timing().store_timeout();
    let mut bed = Bed::new(
        WorkerSettings::parse(
            timing(30 * SECOND),
            Limits { claim_batch: 100, max_leased: 200, ..limits() },
            retry(),
            7,
        )
        .expect("sound"),
    );
    let next = |bed: &mut Bed| -> (Action, u32) {
        loop {
            bed.now = bed.now.max(bed.worker.next_wakeup().unwrap_or(bed.now));
            bed.wake();
            let at = bed.pending.iter().position(|action| matches!(action, Action::Claim(..)));
            let claim = at.map(|at| bed.pending.remove(at));
            bed.answer_all();
            if let Some(Action::Claim(request, claim)) = claim {
                let limit = claim.limit;
                return (Action::Claim(request, claim), limit);
            }
        }
    };
    let mut limits = Vec::new();
    for took in [timeout, timeout, timeout / 2 - MS, timeout / 2] {
        let (claim, limit) = next(&mut bed);
        limits.push(limit);
        bed.now = bed.now.after(took);
        let request = Bed::request_of(&claim);
        bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "too much".into() }) });
    }
    // One that fails at once was not too large.
    assert_eq!(limits, [100, 50, 25, 25]);
    // Nor does one that finds less than it might show that more would be answered.
    let mut id = 0;
    for (found, limit) in [(0, 12), (11, 12), (12, 12), (0, 16), (16, 16), (0, 21)] {
        for _ in 0..found {
            id += 1;
            bed.add(id, &format!("http://{id}"));
        }
        let (claim, now) = next(&mut bed);
        assert_eq!(now, limit);
        bed.answer(claim);
    }
    // However often it fails, it takes something.
    for _ in 0..10 {
        let (claim, limit) = next(&mut bed);
        assert!(limit > 0);
        bed.now = bed.now.after(timeout);
        let request = Bed::request_of(&claim);
        bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "too much".into() }) });
    }
}

/// Expired leases are ranked before they are locked: those that others keep locked have the seats of what is due.
#[test]
fn what_a_search_left_is_claimed_at_once_without_one() {
    for (left, took) in [(true, MS), (true, 3 * SECOND), (false, MS)] {
        let mut bed = Bed::new(settings());
        // Asleep: every claim is a search.
        bed.run(5 * SECOND);
        let (request, claim) = loop {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            bed.wake();
            let claim = bed
                .pending
                .iter()
                .position(|action| matches!(action, Action::Claim(_, claim) if claim.terms.expired));
            if let Some(Action::Claim(request, claim)) = claim.map(|at| bed.pending.remove(at)) {
                break (request, claim);
            }
            bed.answer_all();
        };
        assert_eq!((claim.terms.expired, claim.probation), (true, 1));
        bed.now = bed.now.after(took);
        let due = bed.db().early;
        let front = if left { Place { due, row: RowId(1) } } else { Place::behind(due) };
        let reply = ClaimReply { searched_expired: true, front: Some(front), ..empty(due, None) };
        bed.give(Input::Claimed { request, reply: Ok(reply) });
        let next = bed.pending.iter().find_map(|action| match action {
            Action::Claim(_, claim) => Some((claim.terms.expired, claim.probation)),
            _ => None,
        });
        assert_eq!(next, left.then_some((false, 0)), "left: {left}, after {took:?}");
    }
}
