//! Claims without an answer (P7).

use leasehold::machine::{DbClock, Row};

use super::*;

#[test]
fn an_unknown_claim_leaves_no_orphans() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    let request = Bed::request_of(&claim);
    bed.apply(claim);
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    assert!(bed.row(1).lease.is_some(), "the claim was applied");
    let orphan = bed.row(1).token;
    bed.run(MS);
    assert!(bed.seen.iter().any(|seen| matches!(seen, Observation::OrphanReleased { .. })));
    assert!(bed.row(1).token > orphan, "it was not claimed again");
    assert_eq!(bed.row(1).attempts, 0);
}

/// Nobody renews it, and a batch that is refused for good would keep it for as long as it is halved.
#[test]
fn an_orphan_is_given_back_before_anything_else_is_settled_and_by_itself() {
    let mut bed = Bed::new(settings());
    for id in 1..=4 {
        bed.add(id, &format!("http://{id}"));
    }
    bed.run(MS);
    let open = bed.opened();
    assert_eq!(open.len(), 4);
    bed.add(5, "http://5");
    let take = |bed: &mut Bed, wanted: fn(&Action) -> bool| loop {
        if let Some(at) = bed.pending.iter().position(wanted) {
            break bed.pending.remove(at);
        }
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
    };
    let (claims, settles) = (
        |action: &Action| matches!(action, Action::Claim(..)),
        |action: &Action| matches!(action, Action::Settle(..)),
    );
    let claim = take(&mut bed, claims);
    let request = Bed::request_of(&claim);
    bed.apply(claim);
    bed.respond(open[0], 200);
    let first = take(&mut bed, settles);
    open[1..].iter().for_each(|key| {
        bed.respond(*key, 200);
    });
    bed.answer(first);
    let batch = take(&mut bed, settles);
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    let look = take(&mut bed, |action| matches!(action, Action::Owned(..)));
    bed.answer(look);
    bed.give(Input::Settled {
        request: Bed::request_of(&batch),
        reply: Err(StoreFault::Permanent { error: "22003".into() }),
    });
    let mut settled = Vec::new();
    for skipped in [true, false] {
        let action = take(&mut bed, settles);
        let Action::Settle(_, settle) = &action else { panic!("a settle") };
        settled.push(settle.entries.iter().map(|(key, _)| key.row.0).collect::<Vec<_>>());
        let mut reply = bed.apply(action);
        if skipped && let Input::Settled { reply: Ok(reply), .. } = &mut reply {
            reply.answers.iter_mut().for_each(|(_, answer)| *answer = Answer::Skipped);
        }
        bed.give(reply);
    }
    assert_eq!(settled, [vec![5], vec![2]], "the orphan, and then the first half");
    let second_half = take(&mut bed, settles);
    bed.add(6, "http://6");
    while !bed.opened().iter().any(|key| key.row.0 == 6) {
        let claim = take(&mut bed, claims);
        bed.answer(claim);
    }
    let newest = bed.opened().into_iter().find(|key| key.row.0 == 6).expect("it is open");
    bed.respond(newest, 200);
    bed.now = bed.now.after(SECOND);
    bed.answer(second_half);
    let Action::Settle(_, settle) = take(&mut bed, settles) else { panic!("a settle") };
    let rows: Vec<i64> = settle.entries.iter().map(|(key, _)| key.row.0).collect();
    assert_eq!(rows, [5], "nor is it one of others when it was locked");
}

#[test]
fn a_claim_that_commits_late_is_released_as_well() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    let request = Bed::request_of(&claim);
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    let look = bed.pending.remove(0);
    assert!(matches!(look, Action::Owned(..)));
    bed.answer(look);
    bed.apply(claim);
    bed.run(6 * SECOND);
    assert!(bed.seen.iter().any(|seen| matches!(seen, Observation::OrphanReleased { .. })));
}

/// The next claim that is sent, unanswered.
fn next_claim_lost(bed: &mut Bed) -> Action {
    loop {
        if let Some(at) = bed.pending.iter().position(|action| matches!(action, Action::Claim(..))) {
            return bed.pending.remove(at);
        }
        if bed.pending.is_empty() {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            bed.wake();
        } else {
            let other = bed.pending.remove(0);
            bed.answer(other);
        }
    }
}

/// Commits that wait for a standby keep a session each, and the rows that they have locked; looks are answered.
#[test]
fn claims_that_have_no_answer_come_ever_more_seldom() {
    let mut bed = Bed::new(settings());
    let (timeout, lease) = (settings().timing().store_timeout(), settings().timing().lease());
    let poll = settings().limits().poll_interval;
    let mut pauses = Vec::new();
    bed.run(SECOND);
    for _ in 0..12 {
        let given_up = bed.now;
        let claim = next_claim_lost(&mut bed);
        pauses.push(bed.now.since(given_up));
        bed.run(timeout);
        bed.give(Input::Claimed { request: Bed::request_of(&claim), reply: Err(unknown()) });
        let look = bed.pending.remove(0);
        assert!(matches!(look, Action::Owned(..)));
        bed.answer(look);
        bed.give(Input::Hint);
    }
    let doubled = (1..).map(|claim| (poll * (1 << claim)).min(lease));
    assert!(pauses[1] <= poll, "the first one says little: {pauses:?}");
    assert!(pauses[2..].iter().copied().eq(doubled.take(10)), "{pauses:?}");
    let claim = next_claim_lost(&mut bed);
    bed.answer(claim);
    bed.add(1, "http://a");
    bed.run(2 * poll);
    assert_eq!(bed.opened().len(), 1, "nor does one that was answered");
}

/// Lies somewhere on its way, long after the worker gave it up and all its looks found nothing.
#[test]
fn a_claim_that_arrives_later_than_anybody_waits_takes_nothing() {
    let (timeout, grace) = (settings().timing().store_timeout(), settings().timing().reclaim_grace());
    for (late, takes) in [(timeout + grace, true), (timeout + grace + MS, false)] {
        let mut bed = Bed::new(settings());
        bed.run(SECOND);
        let claim = next_claim_lost(&mut bed);
        let request = Bed::request_of(&claim);
        let sent = bed.now;
        bed.run(timeout);
        bed.give(Input::Claimed { request, reply: Err(unknown()) });
        bed.run(late - bed.now.since(sent));
        bed.pending.clear();
        bed.add(1, "http://a");
        bed.apply(claim);
        assert_eq!(bed.row(1).lease.is_some(), takes, "{late:?} after it was sent");
    }
}

/// It can't say until when it is valid, since no reply has told it the database's time yet.
#[test]
fn what_the_very_first_claim_may_take_at_any_time_is_looked_for_ever_after() {
    let mut bed = Bed::new(settings());
    bed.wake();
    let claim = bed.pending.remove(0);
    let request = Bed::request_of(&claim);
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    bed.run(300 * SECOND);
    bed.add(1, "http://a");
    bed.apply(claim);
    assert!(bed.row(1).lease.is_some(), "it was applied");
    let lease = bed.row(1).token;
    bed.run(settings().timing().lease());
    let released =
        |seen: &Observation| matches!(seen, Observation::OrphanReleased { key } if key.token == lease);
    assert!(bed.seen.iter().any(released));
    assert_eq!(bed.row(1).reclaims, 0, "before it ran out");
}

/// However late it is applied and commits, there is a look before what it took has run out.
#[test]
fn looks_for_what_the_very_first_claim_took_come_as_often_as_its_lease_asks_for() {
    let mut bed = Bed::new(settings());
    bed.wake();
    let request = Bed::request_of(&bed.pending.remove(0));
    let start = bed.now;
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    let mut looks = Vec::new();
    while bed.now.since(start) < 55 * SECOND {
        if bed.pending.iter().any(|action| matches!(action, Action::Owned(..))) {
            looks.push(bed.now.since(start).as_secs());
        }
        bed.answer_all();
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
    }
    assert_eq!(looks, [0, 5, 7, 12, 17, 22, 30, 35, 40, 45, 50]);
}

/// Where this worker's clock was ahead as it said until when it is.
#[test]
fn a_claim_is_looked_for_as_long_as_it_is_valid_by_the_databases_clock() {
    let (timeout, grace) = (settings().timing().store_timeout(), settings().timing().reclaim_grace());
    let mut bed = Bed::new(settings());
    bed.db_ahead = 60 * SECOND;
    bed.run(SECOND);
    let ahead = std::mem::take(&mut bed.db_ahead);
    let claim = next_claim_lost(&mut bed);
    let valid = ahead + timeout + grace;
    let sent = bed.now;
    bed.run(timeout);
    bed.give(Input::Claimed { request: Bed::request_of(&claim), reply: Err(unknown()) });
    bed.run(valid - timeout);
    bed.add(1, "http://a");
    bed.apply(claim);
    let key = LeaseKey { row: RowId(1), token: bed.row(1).token };
    assert!(bed.row(1).lease.is_some(), "it was applied {:?} after it was sent", bed.now.since(sent));
    bed.run(settings().timing().lease());
    assert!(bed.seen.contains(&Observation::OrphanReleased { key }));
    assert_eq!(bed.row(1).reclaims, 0, "before it ran out");
    let mut looks = 0;
    let end = bed.now.after(60 * SECOND);
    while bed.now < end {
        looks += bed.pending.iter().filter(|action| matches!(action, Action::Owned(..))).count();
        bed.answer_all();
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
    }
    assert_eq!(looks, 0, "and no longer");
}

#[test]
fn a_claim_that_came_void_is_made_again_at_once() {
    for searches in [false, true] {
        let mut bed = Bed::new(settings());
        bed.add(1, "http://a");
        let db = bed.db();
        bed.row_mut(1).claim(db, &WorkerId::new("dies"), &TERMS);
        bed.run(40 * MS);
        let awaited =
            |action: &Action| matches!(action, Action::Claim(_, claim) if claim.terms.expired == searches);
        loop {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            if bed.wake().iter().any(awaited) {
                break;
            }
            bed.answer_all();
        }
        bed.db_ahead = 60 * SECOND;
        bed.add(2, "http://a");
        bed.answer_all();
        let opened: Vec<RowId> = bed.opened().iter().map(|key| key.row).collect();
        // What fell due as the clock was set forward, and what ran out.
        assert_eq!(opened, if searches { vec![RowId(1), RowId(2)] } else { vec![RowId(2)] });
    }
}

#[test]
fn a_claim_that_begins_as_late_as_it_is_valid_is_not_void() {
    for (beyond, again) in [(Duration::ZERO, false), (Duration::from_micros(1), true)] {
        let mut bed = Bed::new(settings());
        bed.run(3 * SECOND);
        let claim = next_claim_lost(&mut bed);
        let Action::Claim(request, ClaimRequest { terms: ClaimTerms { valid_until: Some(until), .. }, .. }) =
            claim
        else {
            panic!("it knows the clock: {claim:?}")
        };
        bed.give(Input::Claimed { request, reply: Ok(empty(until.after(beyond), None)) });
        let claims = bed.pending.iter().filter(|action| matches!(action, Action::Claim(..))).count();
        assert_eq!(claims == 1, again, "{beyond:?} beyond");
    }
}

/// A store that stands still may begin a claim in time and grant its leases after every look.
#[test]
fn a_claim_that_has_its_locks_later_than_it_is_valid_is_void() {
    let until = DbTime::from_micros(9_000_000);
    let terms = ClaimTerms { valid_until: Some(until), ..TERMS };
    let early = until.before(SECOND);
    let beyond = until.after(Duration::from_micros(1));
    // The last by a clock that is set back meanwhile.
    for (early, late, takes) in [(early, until, true), (early, beyond, false), (beyond, until, false)] {
        let mut row = Row::new(3, DbTime::default());
        let before = row.clone();
        let answer = row.claim(DbClock { early, late }, &WorkerId::new("w"), &terms);
        assert_eq!(matches!(answer, ClaimAnswer::Granted { .. }), takes, "{answer:?}");
        assert_eq!(row == before, !takes);
    }
}

#[test]
fn while_a_look_fails_nothing_is_claimed() {
    let mut bed = Bed::new(settings());
    let request = next_claim(&mut bed);
    let mut actions = bed.give(Input::Claimed { request, reply: Err(unknown()) });
    for _ in 0..10 {
        let look = loop {
            assert!(!actions.iter().any(|action| matches!(action, Action::Claim(..))), "{actions:?}");
            if let Some(look) = actions.iter().find(|action| matches!(action, Action::Owned(..))) {
                break Bed::request_of(look);
            }
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it looks again"));
            actions = bed.wake();
        };
        bed.pending.clear();
        actions = bed.give(Input::Owned { request: look, reply: Err(unknown()) });
    }
}

#[test]
fn looks_for_what_an_unknown_claim_left_come_while_it_can_be_given_back_and_once_it_may_no_longer_begin() {
    let seconds = |at: f64| Duration::from_secs_f64(at);
    for (grace, looks) in [
        // At once, again since that fails, after `R`, four and two tries before its leases may run out, after `L`; and every
        // `R` until they are four tries from that if it had its locks after `2G + R`.
        (3.0, vec![0.0, 0.01, 5.0, 7.0, 12.0, 17.0, 22.0, 30.0]),
        (12.5, vec![0.0, 0.01, 5.0, 7.0, 12.0, 17.0, 22.0, 27.0, 30.0, 32.0, 37.0]),
        (13.0, vec![0.0, 0.01, 5.0, 7.0, 12.0, 17.0, 22.0, 27.0, 30.0, 32.0, 37.0, 42.0]),
    ] {
        let raw = RawTiming {
            lease: 30 * SECOND,
            heartbeat: None,
            store_timeout: None,
            fence_margin: None,
            reclaim_grace: Some(seconds(grace)),
        };
        let timing = Timing::parse(raw).expect("sound timing");
        let settings = WorkerSettings::parse(timing, limits(), retry(), 7).expect("sound settings");
        let mut bed = Bed::new(settings);
        bed.run(SECOND);
        let request = next_claim(&mut bed);
        let start = bed.now;
        bed.give(Input::Claimed { request, reply: Err(unknown()) });
        let mut seen = Vec::new();
        while bed.now.since(start) < 70 * SECOND {
            while !bed.pending.is_empty() {
                let action = bed.pending.remove(0);
                match action {
                    // The first one fails, which leaves the others as they are.
                    Action::Owned(request, _) if seen.is_empty() => {
                        bed.give(Input::Owned { request, reply: Err(unknown()) });
                    }
                    _ => drop(bed.answer(action.clone())),
                }
                if matches!(action, Action::Owned(..)) {
                    seen.push(bed.now.since(start));
                }
            }
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            bed.wake();
        }
        assert_eq!(seen, looks.into_iter().map(seconds).collect::<Vec<_>>(), "G = {grace} s");
    }
}
