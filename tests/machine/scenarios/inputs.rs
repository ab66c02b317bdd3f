//! Inputs that make no sense, and texts.

use super::*;

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
fn a_reply_to_something_else_leaves_what_is_under_way() {
    let (mut bed, key) = one_open();
    let request = RequestId(4_711);
    let is_alone = |action: &Action| matches!(action, Action::Renew(_, renew) if renew.wait);
    let is_batch = |action: &Action| matches!(action, Action::Renew(_, renew) if !renew.wait);
    for awaited in [is_batch as fn(&Action) -> bool, is_alone] {
        while !bed.pending.iter().any(awaited) {
            bed.now = bed.now.max(bed.worker.next_wakeup().expect("it renews"));
            bed.wake();
            while let Some(at) = bed.pending.iter().position(|action| !awaited(action)) {
                let action = bed.pending.remove(at);
                if let Action::Renew(request, _) = action {
                    let reply = RenewReply { db_now: bed.db().late, answers: vec![(key, Answer::Skipped)] };
                    bed.give(Input::Renewed { request, reply: Ok(reply) });
                } else {
                    bed.answer(action);
                }
            }
        }
        bed.seen.clear();
        bed.give(Input::Renewed { request, reply: Err(unknown()) });
        assert!(matches!(bed.seen[..], [Observation::Unexpected { .. }]), "{:?}", bed.seen);
        bed.seen.clear();
        bed.answer_all();
        assert_eq!(bed.seen, [], "what was under way still is");
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
    assert!(ClaimFailure::AtBound.last_error().starts_with("lease_token or reclaims is at its bound"));
}
