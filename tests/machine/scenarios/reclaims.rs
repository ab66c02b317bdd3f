//! What ran out (P2, P10, P11).

use super::*;

#[test]
fn expired_leases_wait_one_lease_after_an_outage() {
    let mut bed = Bed::new(settings());
    bed.run(10 * SECOND);
    let (down, mut failed) = (bed.now, 0);
    while bed.now.since(down) < 11 * SECOND {
        bed.now = bed.worker.next_wakeup().expect("it polls").max(bed.now);
        bed.wake();
        while let Some(action) = bed.pending.pop() {
            let request = Bed::request_of(&action);
            let searches = matches!(&action, Action::Claim(_, claim) if claim.terms.expired);
            assert!(
                !searches || failed == 0,
                "whichever claim finds the store back, it takes no expired lease"
            );
            failed += 1;
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

/// A renewal that waits for a row which somebody keeps locked goes without an answer for as long, beside others.
#[test]
fn a_call_without_an_answer_beside_one_with_an_answer_is_no_outage() {
    let raw = RawTiming {
        lease: 30 * SECOND,
        heartbeat: Some(2 * SECOND),
        store_timeout: Some(5 * SECOND),
        fence_margin: None,
        reclaim_grace: None,
    };
    let timing = Timing::parse(raw).expect("sound");
    let embargo = |others: bool| {
        let mut bed = Bed::new(WorkerSettings::parse(timing, limits(), retry(), 7).expect("sound settings"));
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
        bed.answer_all();
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
