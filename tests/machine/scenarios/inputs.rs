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
fn texts_for_logs_and_last_error_name_what_they_are_about() {
    let key = LeaseKey { row: RowId(7), token: Token(42) };
    assert_eq!(key.to_string(), "7#42");
    assert_eq!(unknown().to_string(), "outcome unknown: timed out");
    assert_eq!(StoreFault::NotApplied { error: "57014".into() }.to_string(), "not applied: 57014");
    assert_eq!(StoreFault::Permanent { error: "23514".into() }.to_string(), "refused for good: 23514");
    assert!(ClaimFailure::AttemptsSpent.last_error().starts_with("attempts spent"));
    assert!(ClaimFailure::ReclaimsSpent.last_error().starts_with("reclaim limit"));
}
