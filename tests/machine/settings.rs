//! Timings and limits that must be refused, and what the refusal says.

use std::time::Duration;

use leasehold::machine::{Limits, RawTiming, RetryPolicy, Timing, TimingError, WorkerSettings};

use crate::bed::{MS, SECOND, limits, retry, timing};

fn raw(lease: Duration) -> RawTiming {
    RawTiming { lease, heartbeat: None, store_timeout: None, fence_margin: None, reclaim_grace: None }
}

#[test]
fn defaults_come_from_the_lease() {
    let thirty = timing(30 * SECOND);
    assert_eq!(thirty.heartbeat(), 10 * SECOND);
    assert_eq!(thirty.store_timeout(), 5 * SECOND);
    assert_eq!(thirty.fence_margin(), 3 * SECOND);
    assert_eq!(thirty.reclaim_grace(), 3 * SECOND);
    assert_eq!(timing(6 * SECOND).store_timeout(), SECOND);
    assert_eq!(timing(120 * SECOND).store_timeout(), 5 * SECOND, "at most 5 s");
}

#[test]
fn the_rule_is_named_with_its_values() {
    let errors =
        Timing::parse(RawTiming { heartbeat: Some(25 * SECOND), ..raw(30 * SECOND) }).expect_err("too slow");
    let [error] = errors[..] else { panic!("{errors:?}") };
    assert_eq!(
        error.to_string(),
        "heartbeat + 2 * store_timeout + fence_margin must be at most lease, but 25s + 2 * 5s + 3s = 38s is more than \
         30s: lengthen the lease or shorten one of the others"
    );
}

#[test]
fn the_rule_holds_at_its_edge() {
    let edge = RawTiming {
        heartbeat: Some(500 * MS),
        store_timeout: Some(200 * MS),
        fence_margin: Some(100 * MS),
        ..raw(SECOND)
    };
    assert!(Timing::parse(edge).is_ok());
    let beyond = RawTiming { fence_margin: Some(101 * MS), ..edge };
    assert!(matches!(Timing::parse(beyond).expect_err("beyond")[..], [TimingError::Rule { .. }]));
}

#[test]
fn each_bound_is_kept() {
    let refused = |raw| Timing::parse(raw).expect_err("out of bounds");
    assert!(matches!(refused(raw(999 * MS))[..], [TimingError::Lease(_)]));
    let heartbeat = RawTiming { heartbeat: Some(99 * MS), ..raw(SECOND) };
    assert!(matches!(refused(heartbeat)[..], [TimingError::Heartbeat(_)]));
    let zero = RawTiming { store_timeout: Some(Duration::ZERO), ..raw(SECOND) };
    assert!(matches!(refused(zero)[..], [TimingError::StoreTimeout(_)]));
    let long = RawTiming { store_timeout: Some(6 * SECOND), ..raw(60 * SECOND) };
    assert!(matches!(refused(long)[..], [TimingError::StoreTimeout(_)]));
    let margin = RawTiming { fence_margin: Some(Duration::ZERO), ..raw(SECOND) };
    assert!(matches!(refused(margin)[..], [TimingError::FenceMargin(_)]));
    let grace = RawTiming { reclaim_grace: Some(2 * SECOND), ..raw(SECOND) };
    assert!(matches!(refused(grace)[..], [TimingError::ReclaimGrace { .. }]));
}

#[test]
fn every_broken_timing_is_reported_at_once() {
    let broken = RawTiming {
        lease: 48 * 3_600 * SECOND,
        heartbeat: Some(MS),
        store_timeout: Some(6 * SECOND),
        fence_margin: Some(Duration::ZERO),
        reclaim_grace: Some(50 * 3_600 * SECOND),
    };
    let errors = Timing::parse(broken).expect_err("many mistakes");
    assert_eq!(
        errors,
        [
            TimingError::Lease(broken.lease),
            TimingError::Heartbeat(MS),
            TimingError::StoreTimeout(6 * SECOND),
            TimingError::FenceMargin(Duration::ZERO),
            TimingError::ReclaimGrace { reclaim_grace: 50 * 3_600 * SECOND, lease: broken.lease },
        ]
    );
}

#[test]
fn every_broken_limit_is_reported_at_once() {
    let broken =
        Limits { max_in_flight: 0, claim_batch: 0, reclaim_limit: 2, drain_timeout: SECOND, ..limits() };
    let policy = RetryPolicy { jitter_bps: 10_001, initial: 2 * SECOND, max: SECOND, ..retry() };
    let errors = WorkerSettings::parse(timing(30 * SECOND), broken, policy, 0).expect_err("many mistakes");
    let named: Vec<&str> = errors.iter().map(|error| error.setting()).collect();
    assert_eq!(
        named,
        [
            "max_in_flight",
            "claim_batch",
            "retry_initial",
            "drain_timeout",
            "retry_jitter_bps",
            "reclaim_limit"
        ]
    );
    assert_eq!(errors[5].to_string(), "reclaim_limit is 2; allowed is 0 (off) or more than 3");
}

#[test]
fn what_stands_on_a_bound_is_accepted() {
    assert!(Timing::parse(raw(Duration::from_secs(86_400))).is_ok());
    let grace = RawTiming { reclaim_grace: Some(30 * SECOND), ..raw(30 * SECOND) };
    assert!(Timing::parse(grace).is_ok());
    let least = RawTiming {
        heartbeat: Some(100 * MS),
        store_timeout: Some(MS),
        fence_margin: Some(MS),
        ..raw(SECOND)
    };
    assert!(Timing::parse(least).is_ok());
    let parse = |limits| WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 0);
    assert!(parse(Limits { max_leased: 1_000_000, ..limits() }).is_ok());
    // Longer than twice `R`, which is 5 s.
    assert!(parse(Limits { drain_timeout: 10 * SECOND + MS, ..limits() }).is_ok());
    let errors = parse(Limits { drain_timeout: 10 * SECOND, ..limits() }).expect_err("not longer");
    assert_eq!(errors.iter().map(|error| error.setting()).collect::<Vec<_>>(), ["drain_timeout"]);
    let parse = |retry| WorkerSettings::parse(timing(30 * SECOND), limits(), retry, 0);
    let ten_years = Duration::from_secs(10 * 365 * 86_400);
    let most = RetryPolicy { jitter_bps: 10_000, max: ten_years, retry_after_max: Duration::ZERO, ..retry() };
    assert!(parse(most.clone()).is_ok());
    let errors = parse(RetryPolicy { max: ten_years + MS, ..most }).expect_err("too long");
    assert_eq!(errors.iter().map(|error| error.setting()).collect::<Vec<_>>(), ["retry_max"]);
}
