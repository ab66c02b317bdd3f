//! Where claims and searches start.

use super::*;

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
    for (late, within) in [(SECOND, 10 * MS), (SECOND + 5 * MS, 2 * SECOND + 2 * MS)] {
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

#[test]
fn a_scan_that_takes_a_quarter_of_the_timeout_is_no_long_one() {
    for (took, next) in [(1_250 * MS, None), (1_251 * MS, Some(64))] {
        let mut bed = Bed::new(settings());
        bed.wake();
        bed.pass(took);
        bed.answer_all();
        assert_eq!(ages_within(&mut bed, 15 * SECOND)[0], next, "after {took:?}");
    }
}

/// The next claim from ahead of the front has no answer for 4 s.
fn fail_slowly(bed: &mut Bed) {
    let request = loop {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        let mut actions = bed.wake().into_iter();
        match actions.find(|action| matches!(action, Action::Claim(_, claim) if is_rescan(bed, claim))) {
            Some(action) => break Bed::request_of(&action),
            None => drop(bed.answer_all()),
        }
    };
    bed.pending.clear();
    bed.now = bed.now.after(4 * SECOND);
    bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "57014".into() }) });
    bed.answer_all();
}

/// How many seconds ahead of the front the first claims start that do, where those from the front take `near` and those
/// from ahead of it `far`.
fn ages_of(poll_interval: Duration, near: Duration, far: Duration) -> Vec<Option<u64>> {
    let limits = Limits { poll_interval, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    let mut ages = Vec::new();
    while ages.len() < 5 {
        if bed.pending.is_empty() {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            bed.wake();
            continue;
        }
        let action = bed.pending.remove(0);
        if let Action::Claim(_, claim) = &action {
            let age = claim.from.map(|from| bed.db().early.since(from.due).as_secs());
            let ahead = age.is_none_or(|age| age > 10);
            ages.extend(ahead.then_some(age));
            bed.now = bed.now.after(if ahead { far } else { near });
        }
        bed.answer(action);
    }
    ages
}

#[test]
fn a_store_that_is_slow_in_itself_keeps_no_claim_from_the_beginning() {
    let slow = 1_500 * MS;
    assert_eq!(ages_of(250 * MS, slow, slow), [None, Some(64), Some(128), Some(256), Some(512)]);
    // Every claim starts ahead of the front: the first one that does so by a minute shows what is usual.
    assert_eq!(ages_of(60 * SECOND, slow, slow), [None, Some(64), Some(64), Some(128), Some(256)]);
    // Not slow in itself.
    assert_eq!(ages_of(250 * MS, Duration::ZERO, slow), [None, Some(64), Some(64), Some(64), Some(64)]);
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
                None => drop(bed.answer_all()),
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

/// When claims start at the beginning after a hint that comes `after` that long since one such claim began, which takes
/// 10 ms. The worker sleeps.
fn rescans_after_a_hint(after: Duration) -> Vec<Duration> {
    let mut bed = Bed::new(settings());
    bed.run(3 * SECOND);
    while !bed.wake().iter().any(|action| matches!(action, Action::Claim(_, claim) if claim.from.is_none())) {
        bed.answer_all();
        bed.now = bed.worker.next_wakeup().expect("it polls");
    }
    let early = after.min(10 * MS);
    bed.pass(early);
    if early == after {
        bed.give(Input::Hint);
    }
    bed.pass(10 * MS - early);
    bed.answer_all();
    if early < after {
        bed.pass(after - early);
        bed.give(Input::Hint);
        bed.answer_all();
    }
    rescans_within(&mut bed, 240 * MS)
}

#[test]
fn a_hint_while_a_claim_is_under_way_or_soon_after_one_leads_to_the_beginning_before_the_next_poll() {
    assert_eq!(rescans_after_a_hint(5 * MS), [100 * MS], "while the claim was under way");
    assert_eq!(rescans_after_a_hint(40 * MS), [70 * MS], "after it");
}

#[test]
fn a_hint_whose_claim_failed_is_followed_by_the_next_claim() {
    let mut bed = Bed::new(settings());
    bed.run(3 * SECOND);
    let claim = bed.give(Input::Hint).remove(0);
    let request = Bed::request_of(&claim);
    bed.pending.clear();
    bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "08006".into() }) });
    assert_eq!(rescans_within(&mut bed, 300 * MS), [250 * MS]);
}

#[test]
fn a_hint_makes_a_worker_that_waits_for_an_empty_outbox_claim_once() {
    let mut settings = settings();
    settings.until_empty = true;
    let mut bed = Bed::new(settings);
    bed.add(1, "http://a");
    bed.row_mut(1).next_attempt_at = bed.db().early.after(60 * SECOND);
    bed.run(3 * SECOND);
    let claim = bed.give(Input::Hint).remove(0);
    bed.pending.clear();
    assert_eq!(bed.answer(claim), [], "it claims again at once");
    assert!(claims_within(&mut bed, 240 * MS).is_empty());
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
    // The next one that looks at every lease begins ten seconds after it, and the next search in five.
    assert_eq!(search(&mut bed, SECOND).leases_from, None);
    let mut last = bed.db().early.before(SECOND);
    for number in 1..=4 {
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
fn searches_take_a_fiftieth_of_the_time_but_are_never_more_than_twice_the_grace_apart() {
    let mut bed = Bed::new(settings());
    search(&mut bed, Duration::ZERO);
    let mut took = Duration::ZERO;
    for (takes, pause) in
        [(30, 1_500), (40, 1_500), (119, 2_000), (121, 5_950), (4_000, 6_000), (0, 6_000), (0, 1_500)]
    {
        let began = bed.now.before(took);
        took = takes * MS;
        search(&mut bed, took);
        assert_eq!(bed.now.before(took).since(began), pause * MS, "before the one that takes {took:?}");
    }
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
