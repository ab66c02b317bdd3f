//! What ran out (P2, P10, P11).

use super::*;

/// Lets a worker be whose claims all fail. Whichever finds the store back, it must take no expired lease.
fn fail(bed: &mut Bed, duration: Duration) {
    let (mut failed, until) = (false, bed.now.after(duration));
    while bed.now < until {
        bed.now = bed.worker.next_wakeup().expect("it polls").clamp(bed.now, until);
        bed.wake();
        while let Some(action) = bed.pending.pop() {
            assert!(!failed || !is_search(&action), "it searches while claims fail");
            failed = true;
            let request = Bed::request_of(&action);
            bed.give(Input::Claimed { request, reply: Err(StoreFault::NotApplied { error: "down".into() }) });
        }
    }
}

/// Lets a worker be, and says whether it searched for expired leases.
fn searches(bed: &mut Bed, duration: Duration) -> bool {
    let (mut searched, until) = (false, bed.now.after(duration));
    while bed.now < until {
        bed.now = bed.worker.next_wakeup().expect("it polls").clamp(bed.now, until);
        bed.wake();
        searched |= bed.pending.iter().any(is_search);
        bed.answer_all();
    }
    searched
}

fn is_search(action: &Action) -> bool {
    matches!(action, Action::Claim(_, claim) if claim.terms.expired)
}

fn embargoes(bed: &Bed) -> usize {
    bed.seen.iter().filter(|seen| matches!(seen, Observation::Embargo(_))).count()
}

/// With less time between renewals than one may take.
fn renewed_often() -> Timing {
    let raw = RawTiming {
        lease: 30 * SECOND,
        heartbeat: Some(2 * SECOND),
        store_timeout: Some(5 * SECOND),
        fence_margin: None,
        reclaim_grace: None,
    };
    Timing::parse(raw).expect("sound")
}

#[test]
fn expired_leases_wait_one_lease_after_an_outage() {
    let mut bed = Bed::new(settings());
    bed.run(10 * SECOND);
    fail(&mut bed, 11 * SECOND);
    assert!(!searches(&mut bed, 30 * SECOND), "the holders' turn");
    assert!(bed.seen.contains(&Observation::Embargo(EmbargoCause::Outage)));
    assert!(searches(&mut bed, SECOND), "and then it searches");
}

/// What was sent before the store went away may be answered after it did.
#[test]
fn a_reply_to_a_call_from_before_an_outage_does_not_end_it() {
    let mut bed =
        Bed::new(WorkerSettings::parse(renewed_often(), limits(), retry(), 7).expect("sound settings"));
    bed.add(1, "http://a");
    bed.run(SECOND);
    let is_renewal = |action: &Action| matches!(action, Action::Renew(..));
    while !bed.pending.iter().any(is_renewal) {
        bed.answer_all();
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it renews"));
        bed.wake();
    }
    let at = bed.pending.iter().position(is_renewal).expect("it renews");
    let renewal = bed.pending.remove(at);
    bed.answer_all();
    fail(&mut bed, 3 * SECOND / 2);
    bed.answer(renewal);
    fail(&mut bed, SECOND);
    bed.run(SECOND / 2);
    assert_eq!(embargoes(&bed), 1, "the store was away for more than H in all");
}

/// A renewal that waits for a row which somebody keeps locked goes without an answer for as long, beside others.
#[test]
fn a_call_without_an_answer_beside_one_with_an_answer_is_no_outage() {
    let embargo = |others: bool| {
        let mut bed =
            Bed::new(WorkerSettings::parse(renewed_often(), limits(), retry(), 7).expect("sound settings"));
        bed.add(1, "http://a");
        bed.run(SECOND);
        let claim = loop {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
            bed.wake();
            let claim = bed.pending.iter().position(|action| matches!(action, Action::Claim(..)));
            if let Some(claim) = claim.map(|at| bed.pending.remove(at)) {
                break claim;
            }
            bed.answer_all();
        };
        let given_up = bed.now.after(5 * SECOND);
        while bed.now < given_up {
            bed.now = given_up.min(bed.worker.next_wakeup().expect("it renews").max(bed.now));
            bed.wake();
            if others {
                bed.answer_all();
            }
        }
        bed.give(Input::Claimed { request: Bed::request_of(&claim), reply: Err(unknown()) });
        for action in std::mem::take(&mut bed.pending) {
            let request = Bed::request_of(&action);
            if matches!(action, Action::Renew(..)) && !others {
                bed.give(Input::Renewed { request, reply: Err(unknown()) });
            } else {
                bed.answer(action);
            }
        }
        bed.run(SECOND);
        bed.seen.contains(&Observation::Embargo(EmbargoCause::Outage))
    };
    assert!(!embargo(true), "its renewals were answered");
    assert!(embargo(false), "nothing was");
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
fn a_new_incarnation_begins_the_embargo_anew() {
    let mut bed = Bed::new(settings());
    bed.run(5 * SECOND);
    bed.incarnation = 2;
    bed.run(20 * SECOND);
    bed.incarnation = 3;
    bed.run(5 * SECOND);
    assert_eq!(embargoes(&bed), 2);
}

/// The claim that met the other server made no search.
#[test]
fn the_next_search_comes_as_the_embargo_after_a_new_incarnation_ends() {
    let seldom = Limits { poll_interval: 100 * SECOND, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), seldom, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    bed.run(5 * SECOND);
    bed.incarnation = 2;
    while embargoes(&bed) == 0 {
        bed.run(SECOND);
    }
    assert!(!searches(&mut bed, 28 * SECOND), "the holders' turn");
    assert!(searches(&mut bed, 3 * SECOND));
}

/// No search was made between them, and none may be made at once.
#[test]
fn an_embargo_that_ends_in_an_outage_is_followed_by_another() {
    let mut bed = Bed::new(settings());
    bed.run(5 * SECOND);
    fail(&mut bed, 11 * SECOND);
    bed.run(20 * SECOND);
    fail(&mut bed, 11 * SECOND);
    assert!(!searches(&mut bed, 29 * SECOND), "the holders' turn");
    assert_eq!(embargoes(&bed), 2);
    assert!(searches(&mut bed, 3 * SECOND));
}

/// One failed call in a long interval is as long an outage as any.
#[test]
fn an_outage_lasts_until_the_call_that_finds_the_store_back() {
    let long = Limits { poll_interval: 15 * SECOND, ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), long, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    bed.run(5 * SECOND);
    let one_poll = bed.worker.next_wakeup().expect("it polls").since(bed.now).saturating_add(MS);
    fail(&mut bed, one_poll);
    bed.run(20 * SECOND);
    assert_eq!(embargoes(&bed), 1);
}

/// Or calls that are lost now and then would keep orphans waiting for ever.
#[test]
fn another_outage_does_not_extend_an_embargo() {
    let mut bed = Bed::new(settings());
    bed.run(5 * SECOND);
    fail(&mut bed, 11 * SECOND);
    bed.run(10 * SECOND);
    fail(&mut bed, 11 * SECOND);
    bed.run(4 * SECOND);
    assert_eq!(embargoes(&bed), 1);
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
