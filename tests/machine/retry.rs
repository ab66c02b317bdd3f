//! Retry semantics against tables and bounds.

use std::collections::BTreeSet;
use std::time::Duration;

use leasehold::machine::{AttemptResult, DbTime, Judged, RetryAfter, RetryPolicy, RowId, Verdict};
use proptest::prelude::*;

use crate::bed::{SECOND, retry};

fn judged(number: u32) -> Judged {
    Judged { row: RowId(1), number, max_attempts: 20, db_now: DbTime::from_micros(1_000_000_000) }
}

fn responded(status: u16, retry_after: Option<RetryAfter>) -> AttemptResult {
    AttemptResult::Responded { status, retry_after }
}

#[test]
fn backoff_doubles_up_to_the_maximum() {
    let seconds = (1..=12).map(|number| retry().backoff(0, RowId(1), number).as_secs()).collect::<Vec<_>>();
    assert_eq!(seconds, [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]);
    assert_eq!(retry().backoff(0, RowId(1), u32::MAX).as_secs(), 3600);
}

#[test]
fn jitter_reaches_both_of_its_ends() {
    let policy = RetryPolicy { jitter_bps: 1, initial: 10 * SECOND, ..retry() };
    let delays: BTreeSet<u128> = (0..1_000).map(|row| policy.backoff(7, RowId(row), 1).as_millis()).collect();
    assert_eq!(delays, BTreeSet::from([9_999, 10_000, 10_001]));
}

#[test]
fn seconds_are_rounded_down() {
    let seconds = [-1, 0, 1_999_999].map(|micros| DbTime::from_micros(micros).as_secs());
    assert_eq!(seconds, [-1, 0, 1]);
}

#[test]
fn every_2xx_is_delivered_and_nothing_else_is() {
    for status in 100..=999 {
        let verdict = retry().judge(0, judged(1), responded(status, None));
        let delivered = matches!(verdict, Verdict::Delivered { .. });
        assert_eq!(delivered, (200..=299).contains(&status), "status {status}");
    }
}

#[test]
fn the_last_attempt_fails_by_row_limit_and_by_budget() {
    let failed = |policy: &RetryPolicy, number| {
        matches!(policy.judge(0, judged(number), responded(500, None)), Verdict::Failed { tried: true, .. })
    };
    assert!(!failed(&retry(), 19));
    assert!(failed(&retry(), 20));
    let budget = RetryPolicy { budget: 2, ..retry() };
    assert!(!failed(&budget, 2));
    assert!(failed(&budget, 3));
}

#[test]
fn fail_statuses_fail_at_once() {
    let policy = RetryPolicy { fail_statuses: [410].into(), ..retry() };
    assert!(matches!(policy.judge(0, judged(1), responded(410, None)), Verdict::Failed { tried: true, .. }));
    assert!(matches!(policy.judge(0, judged(1), responded(404, None)), Verdict::Retry { .. }));
}

#[test]
fn undeliverable_fails_at_once_without_a_try() {
    let result = AttemptResult::Undeliverable { error: "no".into() };
    assert_eq!(
        retry().judge(0, judged(1), result),
        Verdict::Failed { error: "no".into(), status: None, tried: false }
    );
}

#[test]
fn retry_after_is_a_lower_bound_on_429_and_503_up_to_its_cap() {
    let delay = |status, after| match retry().judge(0, judged(1), responded(status, Some(after))) {
        Verdict::Retry { delay, .. } => delay,
        other => panic!("not a retry: {other:?}"),
    };
    let hundred = RetryAfter::Delay(100 * SECOND);
    assert_eq!(delay(429, hundred), 100 * SECOND);
    assert_eq!(delay(503, hundred), 100 * SECOND);
    assert_eq!(delay(500, hundred), 5 * SECOND, "not honoured elsewhere");
    assert_eq!(delay(429, RetryAfter::Delay(SECOND)), 5 * SECOND, "a lower bound only");
    assert_eq!(delay(429, RetryAfter::Delay(Duration::MAX)), 86_400 * SECOND, "capped");
    assert_eq!(delay(429, RetryAfter::Date(DbTime::from_micros(1_060_000_000))), 60 * SECOND);
    assert_eq!(delay(429, RetryAfter::Date(DbTime::from_micros(0))), 5 * SECOND, "a date in the past");
}

proptest! {
    #[test]
    fn jitter_stays_in_bounds_and_repeats(seed: u64, row: i64, number in 1..=64_u32, bps in 0..=10_000_u16) {
        let policy = RetryPolicy { jitter_bps: bps, ..retry() };
        let delay = policy.backoff(seed, RowId(row), number);
        prop_assert_eq!(delay, policy.backoff(seed, RowId(row), number));
        let base = retry().backoff(seed, RowId(row), number).as_micros() as f64;
        let spread = f64::from(bps) / 10_000.0;
        let micros = delay.as_micros() as f64;
        prop_assert!(micros >= 1.0 && delay <= policy.max);
        prop_assert!(micros >= (base * (1.0 - spread)).floor().max(1.0) - 1.0);
        prop_assert!(micros <= base * (1.0 + spread) + 1.0);
    }
}

#[test]
fn jitter_spreads_over_both_sides() {
    let policy = RetryPolicy { jitter_bps: 2_000, ..retry() };
    let delays = (0..200).map(|row| policy.backoff(1, RowId(row), 1)).collect::<Vec<_>>();
    assert!(delays.iter().any(|delay| *delay < Duration::from_millis(4_200)));
    assert!(delays.iter().any(|delay| *delay > Duration::from_millis(5_800)));
}
