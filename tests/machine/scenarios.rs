//! One rule each, told as a story.

use std::time::Duration;

use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimAnswer, ClaimFailure, ClaimReply, ClaimRequest, ClaimTerms,
    EmbargoCause, HeartbeatEnd, Incarnation, Input, LeaseKey, Limits, Observation, Place, RenewReply,
    RequestId, RetryAfter, RetryPolicy, RowId, SettleKind, SettleReply, Status, StoreFault, Token, WorkerId,
    WorkerSettings,
};

use crate::bed::{Bed, MS, SECOND, aborts, limits, retry, settings, timing};

fn unknown() -> StoreFault {
    StoreFault::Unknown { error: "timed out".into() }
}

/// A bed with one event whose request is open.
fn one_open() -> (Bed, LeaseKey) {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.run(MS);
    let key = bed.opened()[0];
    (bed, key)
}

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
fn without_a_renewal_the_request_is_aborted_at_the_fence_and_given_back() {
    let (mut bed, key) = one_open();
    bed.pass(27 * SECOND);
    assert!(bed.seen.contains(&Observation::Fenced { key, open: true }));
    assert!(bed.opened().contains(&key), "open until the abort is confirmed");
    let before = bed.now;
    bed.confirm_abort(key);
    let release = bed.pending.iter().any(|action| matches!(action, Action::Settle(..)));
    assert!(release, "given back once the abort is confirmed");
    assert_eq!(bed.now, before);
}

#[test]
fn the_deadline_counts_from_the_send_not_from_the_reply() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let sent = bed.now;
    bed.now = bed.now.after(4 * SECOND);
    bed.answer_all();
    let start_before = sent.after(27 * SECOND);
    assert_eq!(bed.opened().len(), 1);
    bed.now = start_before;
    let actions = bed.wake();
    assert_eq!(aborts(&actions).len(), 1, "fenced 27 s after the claim was sent");
}

#[test]
fn a_claim_answered_past_its_own_fence_starts_nothing() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    let reply = bed.apply(claim);
    bed.now = bed.now.after(27 * SECOND);
    bed.give(reply);
    assert!(bed.opened().is_empty());
}

#[test]
fn a_stopped_process_checks_its_fences_before_anything_else() {
    let (mut bed, key) = one_open();
    bed.add(2, "http://b");
    bed.now = bed.now.after(3_600 * SECOND);
    let actions = bed.give(Input::Hint);
    assert_eq!(aborts(&actions), [key]);
}

#[test]
fn an_outcome_that_crosses_its_abort_is_kept() {
    let (mut bed, key) = one_open();
    bed.pass(27 * SECOND);
    bed.pending.clear();
    bed.respond(key, 200);
    let kept = bed.pending.iter().any(|action| match action {
        Action::Settle(_, settle) => {
            matches!(settle.entries[0].1, leasehold::machine::Settle::Delivered { .. })
        }
        _ => false,
    });
    assert!(kept);
}

#[test]
fn a_refused_renewal_aborts_at_once() {
    let (mut bed, key) = one_open();
    bed.row_mut(1).token.0 += 1;
    bed.run(8 * SECOND);
    assert!(bed.seen.contains(&Observation::HeartbeatEnded { key, why: HeartbeatEnd::Lost }));
    assert!(bed.worker.open() == 1, "until its socket is closed");
    bed.confirm_abort(key);
    assert_eq!(bed.worker.leased(), 0);
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
fn an_unknown_claim_leaves_no_orphans() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    let request = Bed::request_of(&claim);
    bed.apply(claim);
    bed.give(Input::Claimed { request, reply: Err(unknown()) });
    assert!(bed.row(1).lease.is_some(), "the claim was applied");
    bed.run(MS);
    assert!(bed.seen.iter().any(|seen| matches!(seen, Observation::OrphanReleased { .. })));
    assert!(bed.row(1).lease.is_none());
    assert_eq!(bed.row(1).attempts, 0);
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
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        bed.wake();
        if let Some(at) = bed.pending.iter().position(|action| matches!(action, Action::Claim(..))) {
            return bed.pending.remove(at);
        }
        bed.answer_all();
    }
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

#[test]
fn a_row_locked_twice_is_renewed_alone_and_holds_up_nobody() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.add(2, "http://b");
    bed.run(MS);
    let mut alone = None;
    for _ in 0..2_000 {
        let Some(at) = bed.worker.next_wakeup() else { break };
        bed.now = bed.now.max(at);
        bed.wake();
        while let Some(action) = (!bed.pending.is_empty()).then(|| bed.pending.remove(0)) {
            if matches!(&action, Action::Renew(_, renew) if renew.wait) {
                alone.get_or_insert(action);
                continue;
            }
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
    assert!(matches!(&alone, Action::Renew(_, renew) if renew.keys.len() == 1 && renew.keys[0].row.0 == 1));
    bed.answer(alone);
    bed.run(60 * SECOND);
    assert_eq!(bed.opened().len(), 2, "both are still held");
}

#[test]
fn a_database_clock_that_ran_ahead_fences_everything() {
    let (mut bed, key) = one_open();
    bed.db_ahead = 4 * SECOND;
    let actions = bed.wake();
    assert!(aborts(&actions).is_empty());
    bed.pass(300 * MS);
    bed.answer_all();
    assert!(bed.seen.iter().any(|seen| matches!(seen, Observation::ClockRanAhead { .. })));
    assert!(bed.seen.contains(&Observation::Fenced { key, open: true }));
}

#[test]
fn a_clock_step_within_the_margin_changes_nothing() {
    let (mut bed, key) = one_open();
    bed.db_ahead = 2 * SECOND;
    bed.run(20 * SECOND);
    assert_eq!(bed.opened(), [key]);
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
    let (mut bed, key) = unrenewed_for(14_900 * MS);
    assert_eq!(starts(&bed.respond(key, 200)), 1, "H + R have not passed yet");
    let (mut bed, key) = unrenewed_for(15_100 * MS);
    assert_eq!(starts(&bed.respond(key, 200)), 0);
    bed.answer_all();
    assert_eq!(bed.opened().len(), 2, "the queued event starts once renewals are answered");
}

#[test]
fn a_renewed_deadline_counts_from_the_renewals_send() {
    let (mut bed, key) = one_open();
    bed.pass(8 * SECOND);
    let at = bed
        .pending
        .iter()
        .position(|action| matches!(action, Action::Renew(..)))
        .expect("it fell due at 7.5 s");
    let renew = bed.pending.remove(at);
    bed.now = bed.now.after(4 * SECOND);
    bed.answer(renew);
    bed.pending.clear();
    // Sent 7.5 s after the claim: fenced 27 s later, not 27 s after the reply.
    bed.pass(22_400 * MS);
    assert!(!bed.seen.iter().any(|seen| matches!(seen, Observation::Fenced { .. })));
    bed.pass(200 * MS);
    assert!(bed.seen.contains(&Observation::Fenced { key, open: true }));
}

#[test]
fn expired_leases_wait_one_lease_after_an_outage() {
    let mut bed = Bed::new(settings());
    bed.run(10 * SECOND);
    let down = bed.now;
    while bed.now.since(down) < 11 * SECOND {
        bed.now = bed.worker.next_wakeup().expect("it polls").max(bed.now);
        bed.wake();
        while let Some(action) = bed.pending.pop() {
            let request = Bed::request_of(&action);
            bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "down".into() }) });
        }
    }
    let back = bed.now;
    let mut searched_at = None;
    while searched_at.is_none() {
        bed.now = bed.worker.next_wakeup().expect("it polls").max(bed.now);
        bed.wake();
        while let Some(action) = bed.pending.pop() {
            if matches!(&action, Action::Claim(_, claim) if claim.terms.expired) {
                searched_at = Some(bed.now);
            }
            bed.answer(action);
        }
    }
    assert!(bed.seen.contains(&Observation::Embargo(EmbargoCause::Outage)));
    let waited = searched_at.map(|at| at.since(back)).expect("a search");
    assert!(waited >= 30 * SECOND && waited < 31 * SECOND, "waited {waited:?}");
}

#[test]
fn a_new_incarnation_starts_an_embargo_but_fresh_events_go_on() {
    let mut bed = Bed::new(settings());
    bed.run(5 * SECOND);
    bed.incarnation = 2;
    bed.run(SECOND);
    assert!(bed.seen.contains(&Observation::Embargo(EmbargoCause::NewIncarnation)));
    bed.add(1, "http://a");
    bed.run(SECOND);
    assert_eq!(bed.opened().len(), 1);
}

#[test]
fn process_start_is_no_embargo() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    let other = WorkerId::new("dead");
    let terms = leasehold::machine::ClaimTerms {
        lease: 30 * SECOND,
        grace: 3 * SECOND,
        expired: true,
        reclaim_limit: 0,
        retry_budget: 0,
        valid_until: None,
    };
    let db = bed.db();
    bed.row_mut(1).claim(db, &other, &terms);
    bed.now = bed.now.after(34 * SECOND);
    bed.run(SECOND);
    assert_eq!(bed.opened().len(), 1, "taken over");
    assert_eq!(bed.row(1).reclaims, 1);
}

#[test]
fn only_one_event_on_probation_is_held() {
    let mut bed = Bed::new(settings());
    for id in 1..=3 {
        bed.add(id, "http://a");
        bed.row_mut(id).reclaims = 3;
    }
    bed.add(4, "http://a");
    bed.run(SECOND);
    let open = bed.opened();
    assert_eq!(open.iter().filter(|key| key.row.0 <= 3).count(), 1);
    assert!(open.iter().any(|key| key.row.0 == 4), "innocents go on");
}

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

/// The claims that are sent within `duration`, and when.
fn claims_within(bed: &mut Bed, duration: Duration) -> Vec<(Duration, ClaimRequest)> {
    let (start, until) = (bed.now, bed.now.after(duration));
    let mut claims = Vec::new();
    while let Some(at) = bed.worker.next_wakeup().filter(|at| *at < until) {
        bed.now = bed.now.max(at);
        for action in bed.wake() {
            if let Action::Claim(_, claim) = action {
                claims.push((bed.now.since(start), claim));
            }
        }
        bed.answer_all();
    }
    claims
}

#[test]
fn a_worker_polls_eagerly_for_a_second_and_then_says_that_it_sleeps() {
    let (mut bed, key) = one_open();
    bed.respond(key, 204);
    bed.answer_all();
    let claims = claims_within(&mut bed, 3 * SECOND);
    let (awake, asleep): (Vec<_>, Vec<_>) = claims.iter().partition(|(_, claim)| !claim.asleep);
    assert!(awake.len() > 900, "{} polls", awake.len());
    assert!(awake.iter().all(|(at, _)| *at < SECOND));
    assert!(asleep.first().is_some_and(|(at, _)| *at < SECOND + 2 * MS), "it looks once more as it says so");
    assert!((8..=9).contains(&asleep.len()), "then every poll interval: {asleep:?}");
    // An event ends the sleep.
    bed.add(2, "http://a");
    bed.give(Input::Hint);
    bed.answer_all();
    let next = claims_within(&mut bed, SECOND / 10);
    assert!(next.len() > 50 && next.iter().all(|(_, claim)| !claim.asleep), "{next:?}");
}

/// When the claims within `duration` start at the beginning of the queue.
fn rescans_within(bed: &mut Bed, duration: Duration) -> Vec<Duration> {
    let claims = claims_within(bed, duration).into_iter();
    claims.filter(|(_, claim)| claim.from.is_none()).map(|(at, _)| at).collect()
}

#[test]
fn claims_start_a_second_before_the_last_one_and_every_other_second_at_the_beginning() {
    let mut bed = Bed::new(settings());
    let start = bed.db().early;
    let mut last = start;
    let mut rescans = Vec::new();
    for (at, claim) in claims_within(&mut bed, 5 * SECOND) {
        match claim.from {
            None => rescans.push(at),
            Some(from) => assert_eq!(from, Place::ahead_of(last.before(SECOND)), "at {at:?}"),
        }
        last = start.after(at);
    }
    assert_eq!(rescans.len(), 3, "{rescans:?}");
    assert!(rescans.windows(2).all(|two| two[1] - two[0] >= 2 * SECOND), "{rescans:?}");
}

#[test]
fn what_commits_within_a_second_is_found_at_once_and_later_by_the_next_rescan() {
    for (late, within) in [(SECOND, 2 * MS), (SECOND + MS, 2 * SECOND + 2 * MS)] {
        let mut bed = Bed::new(settings());
        bed.run(500 * MS);
        bed.add(1, "http://a");
        bed.row_mut(1).next_attempt_at = bed.db().early.before(late);
        bed.run(within / 2);
        let early = bed.opened().len();
        bed.run(within);
        assert_eq!(bed.opened().len(), 1, "{late:?} late");
        assert_eq!(early, usize::from(late == SECOND), "{late:?} late");
    }
}

#[test]
fn scans_from_the_beginning_take_a_tenth_of_the_time() {
    let mut bed = Bed::new(settings());
    bed.wake();
    bed.pass(500 * MS);
    bed.answer_all();
    assert!(rescans_within(&mut bed, 4_900 * MS).is_empty());
    assert_eq!(rescans_within(&mut bed, 400 * MS).len(), 1);
}

/// How many seconds ahead of the front claims start within `duration`; `None` is the beginning.
fn ages_within(bed: &mut Bed, duration: Duration) -> Vec<Option<u64>> {
    let start = bed.db().early;
    let claims = claims_within(bed, duration).into_iter();
    let ages = claims.map(|(at, claim)| claim.from.map(|from| start.after(at).since(from.due).as_secs()));
    ages.filter(|age| *age > Some(10) || age.is_none()).collect()
}

#[test]
fn a_scan_that_takes_long_makes_the_next_start_a_minute_ago_and_then_ever_farther() {
    let mut bed = Bed::new(settings());
    bed.wake();
    bed.pass(1_300 * MS);
    bed.answer_all();
    let ages = ages_within(&mut bed, 40 * SECOND);
    let farther = (0..11).map(|turn| Some(64 << turn)).chain([None, None]);
    assert_eq!(ages[..13], farther.collect::<Vec<_>>());
    // And back again, as far as it takes long.
    fail_slowly(&mut bed);
    assert_eq!(ages_within(&mut bed, 7 * SECOND)[..2], [Some(64), Some(128)]);
    fail_slowly(&mut bed);
    assert_eq!(ages_within(&mut bed, 7 * SECOND)[..2], [Some(128), Some(256)]);
}

/// The next claim from ahead of the front has no answer for 4 s.
fn fail_slowly(bed: &mut Bed) {
    let request = loop {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        let mut actions = bed.wake().into_iter();
        match actions.find(|action| matches!(action, Action::Claim(_, claim) if is_rescan(bed, claim))) {
            Some(action) => break Bed::request_of(&action),
            None => bed.answer_all(),
        }
    };
    bed.pending.clear();
    bed.now = bed.now.after(4 * SECOND);
    bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "57014".into() }) });
    bed.answer_all();
}

#[test]
fn a_store_that_is_slow_in_itself_keeps_no_claim_from_the_beginning() {
    // With the longer interval every claim starts ahead of the front.
    for poll_interval in [250 * MS, 60 * SECOND] {
        let limits = Limits { poll_interval, ..limits() };
        let settings =
            WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
        let mut bed = Bed::new(settings);
        let mut ages = Vec::new();
        for _ in 0..400 {
            if bed.pending.is_empty() {
                bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
                bed.wake();
                continue;
            }
            let action = bed.pending.remove(0);
            if let Action::Claim(_, claim) = &action {
                ages.push(claim.from.map(|from| bed.db().early.since(from.due).as_secs()));
                bed.now = bed.now.after(1_500 * MS);
            }
            bed.answer(action);
        }
        ages.retain(|age| *age > Some(10) || age.is_none());
        assert!(ages[0].is_none() && ages[1] == Some(64), "{ages:?}");
        assert!(ages[2..].contains(&None), "{ages:?}");
    }
}

/// A minute ahead of the front at least.
fn is_rescan(bed: &Bed, claim: &ClaimRequest) -> bool {
    claim.from.is_none_or(|from| from.due < bed.db().early.before(60 * SECOND))
}

#[test]
fn a_scan_that_failed_is_made_again_soon_and_then_ever_later() {
    let timeout = timing(30 * SECOND).store_timeout();
    let mut bed = Bed::new(settings());
    bed.run(1_990 * MS);
    let mut waits = Vec::new();
    for _ in 0..6 {
        let start = bed.now;
        let request = loop {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            let action = bed
                .wake()
                .into_iter()
                .find(|action| matches!(action, Action::Claim(_, claim) if is_rescan(&bed, claim)));
            match action {
                Some(action) => break Bed::request_of(&action),
                None => bed.answer_all(),
            }
        };
        waits.push(bed.now.since(start).as_secs());
        bed.pending.clear();
        bed.now = bed.now.after(timeout);
        let reply = Err(StoreFault::NotApplied { error: String::new() });
        bed.give(Input::Claimed { request, reply });
        bed.answer_all();
    }
    assert_eq!(waits, [0, 5, 10, 20, 40, 50]);
}

#[test]
fn a_hint_a_new_server_and_a_clock_set_back_lead_to_the_beginning() {
    let mut bed = Bed::new(settings());
    bed.run(500 * MS);
    assert!(rescans_within(&mut bed, 50 * MS).is_empty());
    bed.give(Input::Hint);
    let claim = bed.pending.iter().find_map(|action| match action {
        Action::Claim(_, claim) => Some(claim.clone()),
        _ => None,
    });
    assert_eq!(claim.expect("a hint makes it claim").from, None);
    bed.answer_all();
    assert!(rescans_within(&mut bed, 50 * MS).is_empty());
    bed.incarnation += 1;
    assert_eq!(rescans_within(&mut bed, 50 * MS).len(), 1);
    let mut ahead = Bed::new(settings());
    ahead.db_ahead = 100 * SECOND;
    ahead.run(500 * MS);
    ahead.db_ahead = Duration::ZERO;
    let before = ahead.db().early;
    let claims = claims_within(&mut ahead, 50 * MS);
    assert!(claims[1..].iter().all(|(_, claim)| claim.from < Some(Place::behind(before))), "{claims:?}");
}

/// The next search for expired leases, which takes that long.
fn search(bed: &mut Bed, took: Duration) -> ClaimRequest {
    loop {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        let search = bed.wake().into_iter().find_map(|action| match action {
            Action::Claim(_, claim) if claim.terms.expired => Some(claim),
            _ => None,
        });
        if let Some(search) = search {
            bed.now = bed.now.after(took);
            bed.answer_all();
            return search;
        }
        bed.answer_all();
    }
}

#[test]
fn a_search_looks_at_every_lease_while_that_takes_a_tenth_of_the_time_and_else_starts_a_second_back() {
    let mut bed = Bed::new(settings());
    let interval = limits().poll_interval.max(timing(30 * SECOND).reclaim_grace() / 2);
    for _ in 0..5 {
        assert_eq!(search(&mut bed, interval / 12).leases_from, None);
    }
    assert_eq!(search(&mut bed, interval / 2).leases_from, None);
    let mut last = bed.db().early.before(interval / 2);
    for number in 1..=5 {
        assert_eq!(
            search(&mut bed, Duration::ZERO).leases_from,
            Some(Token::of(last.before(SECOND))),
            "{number}"
        );
        last = bed.db().early;
    }
    assert_eq!(search(&mut bed, Duration::ZERO).leases_from, None);
}

#[test]
fn a_search_starts_at_the_oldest_lease_that_the_last_one_saw() {
    let (mut bed, key) = one_open();
    let hour = Duration::from_secs(3600);
    while search(&mut bed, SECOND).leases_from.is_some() {}
    assert_eq!(search(&mut bed, Duration::ZERO).leases_from, Some(key.token));
    bed.row_mut(1).token = Token::of(bed.db().early.after(hour));
    search(&mut bed, Duration::ZERO);
    let before = bed.db().early.before(SECOND);
    assert_eq!(search(&mut bed, Duration::ZERO).leases_from, Some(Token::of(before)));
}

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
    for key in open {
        bed.respond(key, 200);
    }
    bed.answer_all();
    let ended = bed.worker.ended().expect("drained");
    assert_eq!((ended.aborted, ended.unsettled), (0, 0));
    assert!(bed.worker.next_wakeup().is_none());
}

#[test]
fn a_drain_aborts_2r_before_its_timeout_and_delays_what_it_aborted() {
    let (mut bed, key) = one_open();
    bed.give(Input::Shutdown);
    bed.run(17_999 * MS);
    assert!(!bed.seen.iter().any(|seen| matches!(seen, Observation::HeartbeatEnded { .. })));
    bed.now = bed.now.after(2 * MS);
    let actions = bed.wake();
    assert_eq!(aborts(&actions), [key]);
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
    bed.pass(28 * SECOND);
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

#[test]
fn an_own_older_lease_is_gone_before_the_new_one_starts() {
    let (mut bed, old) = one_open();
    // A failover lost the claim; the row is free again and this worker claims it once more.
    *bed.row_mut(1) = leasehold::machine::Row::new(20, bed.db().early);
    bed.now = bed.now.after(SECOND);
    bed.give(Input::Hint);
    let claim = bed.pending.remove(0);
    let actions = bed.answer(claim);
    assert_eq!(aborts(&actions), [old], "the older lease is lost");
    assert_eq!(bed.opened(), [old], "nothing new yet");
    bed.confirm_abort(old);
    let open = bed.opened();
    assert!(open.len() == 1 && open[0] != old);
}

#[test]
fn impossible_inputs_are_refused_and_change_nothing() {
    let (mut bed, key) = one_open();
    let nobody = LeaseKey { row: leasehold::machine::RowId(99), token: key.token };
    let request = leasehold::machine::RequestId(4_711);
    let before = bed.worker.next_wakeup();
    for input in [
        Input::Attempted { key: nobody, result: AttemptResult::Errored { error: String::new() } },
        Input::Aborted { key: nobody },
        Input::Claimed { request, reply: Err(unknown()) },
        Input::Renewed { request, reply: Err(unknown()) },
        Input::Settled { request, reply: Ok(SettleReply { db_now: bed.db().late, answers: vec![] }) },
        Input::Owned { request, reply: Err(unknown()) },
    ] {
        bed.seen.clear();
        assert!(bed.give(input).is_empty());
        assert!(matches!(bed.seen[..], [Observation::Unexpected { .. }]), "{:?}", bed.seen);
    }
    assert_eq!(bed.worker.next_wakeup(), before);
}

#[test]
fn the_watch_is_never_longer_than_half_the_margin() {
    let limits = Limits { poll_interval: Duration::from_secs(3_600), ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    bed.add(1, "http://a");
    bed.run(3 * SECOND);
    assert_eq!(bed.worker.next_wakeup().map(|at| at.since(bed.now)), Some(1_500 * MS));
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
    assert!(statements >= 300, "four rounds of a hundred statements, less the first: {statements}");
    let least = bed.rows.values().filter_map(|(row, _)| row.lease.as_ref()).map(|lease| lease.until).min();
    assert!(
        least.is_some_and(|until| until.since(bed.db().late) > 15 * SECOND),
        "no lease came close to its end"
    );
}

#[test]
fn an_embargo_is_not_extended_before_a_search_was_made() {
    let mut bed = Bed::new(settings());
    bed.run(5 * SECOND);
    bed.incarnation = 2;
    bed.run(20 * SECOND);
    bed.incarnation = 3;
    bed.run(5 * SECOND);
    let embargoes = bed.seen.iter().filter(|seen| matches!(seen, Observation::Embargo(_))).count();
    assert_eq!(embargoes, 1);
    // 25 s of 30 s have passed: an orphan is found soon after the rest.
    bed.add(1, "http://a");
    let terms = leasehold::machine::ClaimTerms {
        lease: SECOND,
        grace: SECOND,
        expired: false,
        reclaim_limit: 0,
        retry_budget: 0,
        valid_until: None,
    };
    let db = bed.db();
    bed.row_mut(1).claim(db, &WorkerId::new("dead"), &terms);
    bed.run(4 * SECOND);
    assert!(bed.opened().is_empty(), "the embargo holds");
    bed.run(3 * SECOND);
    assert_eq!(bed.opened().len(), 1, "and is over");
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

/// The next claim's request, the ones before it answered.
fn next_claim(bed: &mut Bed) -> RequestId {
    loop {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        let claim = bed.wake().into_iter().find(|action| matches!(action, Action::Claim(..)));
        if let Some(claim) = claim {
            bed.pending.clear();
            return Bed::request_of(&claim);
        }
        bed.answer_all();
    }
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
fn what_falls_due_before_the_next_poll_is_claimed_then() {
    for (due, wait) in [(20 * MS, 20 * MS), (300 * MS, 250 * MS), (Duration::ZERO, 250 * MS)] {
        let mut bed = Bed::new(settings());
        bed.run(3_100 * MS);
        let request = next_claim(&mut bed);
        let reply = ClaimReply {
            db_now: bed.db().late,
            incarnation: Incarnation::new("1"),
            searched_expired: false,
            grants: Vec::new(),
            failed: Vec::new(),
            front: None,
            leases_front: None,
            next_due_in: Some(due),
            any_pending: None,
        };
        let start = bed.now;
        bed.give(Input::Claimed { request, reply: Ok(reply) });
        next_claim(&mut bed);
        assert_eq!(bed.now.since(start), wait, "due in {due:?}");
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
fn a_drain_ends_only_after_a_last_look() {
    let mut bed = Bed::new(settings());
    bed.run(MS);
    bed.pending.clear();
    let actions = bed.give(Input::Shutdown);
    let look = actions.iter().find(|action| matches!(action, Action::Owned(..))).expect("a look").clone();
    bed.pending.clear();
    bed.now = bed.now.after(SECOND);
    bed.wake();
    assert!(bed.worker.ended().is_none());
    bed.give(Input::Owned { request: Bed::request_of(&look), reply: Err(unknown()) });
    assert!(bed.worker.ended().is_none(), "nor after one that failed");
    bed.run(SECOND);
    assert!(bed.worker.ended().is_some());
}

#[test]
fn more_than_a_statement_of_ripe_leases_is_renewed_in_one_go() {
    let limits =
        Limits { max_leased: 2_000, claim_batch: 2_000, max_in_flight_per_destination: 1_000, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    for id in 1..=1_000 {
        bed.add(id, "http://a");
    }
    bed.run(SECOND);
    // Confirmed later: more than half of H old when the run begins, but not three quarters.
    for id in 1_001..=1_200 {
        bed.add(id, "http://a");
    }
    let (start, mut renewals) = (bed.now, Vec::new());
    while bed.now.since(start) < 8 * SECOND {
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

#[test]
fn texts_for_logs_and_last_error_name_what_they_are_about() {
    let key = LeaseKey { row: RowId(7), token: Token(42) };
    assert_eq!(key.to_string(), "7#42");
    assert_eq!(unknown().to_string(), "outcome unknown: timed out");
    assert_eq!(StoreFault::NotApplied { error: "57014".into() }.to_string(), "not applied: 57014");
    assert_eq!(StoreFault::Permanent { error: "23514".into() }.to_string(), "refused for good: 23514");
    assert!(ClaimFailure::AttemptsSpent.last_error().starts_with("attempts spent"));
    assert!(ClaimFailure::ReclaimsSpent.last_error().starts_with("reclaim limit"));
}

/// Of a claim that takes whatever is due or has run out.
const TERMS: ClaimTerms = ClaimTerms {
    lease: SECOND,
    grace: Duration::ZERO,
    expired: true,
    reclaim_limit: 0,
    retry_budget: 0,
    valid_until: None,
};

#[test]
fn without_a_reclaim_limit_no_event_fails_for_running_out() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    for reclaims in 0..200 {
        let db = bed.db();
        let answer = bed.row_mut(1).claim(db, &WorkerId::new("dies"), &TERMS);
        assert!(matches!(answer, ClaimAnswer::Granted { .. }), "{answer:?} after {reclaims}");
        assert_eq!(bed.row(1).reclaims, reclaims);
        bed.now = bed.now.after(2 * SECOND);
    }
}

#[test]
fn a_token_rises_whatever_the_clock_shows() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    let (db, ahead) = (bed.db(), Token::of(bed.db().late).0 + 3_600_000);
    bed.row_mut(1).token = Token(ahead);
    bed.row_mut(1).claim(db, &WorkerId::new("w"), &TERMS);
    assert_eq!(bed.row(1).token, Token(ahead + 1));
}
