//! The model check is complete within its bounds, finds nothing, and meets every condition that it is there for.

use std::collections::BTreeSet;

use sim::check::{Bounds, check};

#[test]
fn every_interleaving_of_two_workers_on_one_event_holds() {
    let base = Bounds { workers: 2, ticks: 6, crashes: 1, pauses: 0, losses: 1, late: 1 };
    let runs = [base, Bounds { ticks: 7, pauses: 1, losses: 0, ..base }];
    let mut states = 0;
    let mut never: Option<BTreeSet<&str>> = None;
    for bounds in runs {
        let report = check(bounds, 2);
        println!("{bounds:?}: {} states", report.states);
        assert!(report.failures.is_empty(), "{bounds:?}: {:#?}", report.failures);
        states += report.states;
        let missed: BTreeSet<&str> = report.never.into_iter().collect();
        never = Some(never.map_or(missed.clone(), |never| &never & &missed));
    }
    assert_eq!(never, Some(BTreeSet::new()), "conditions that were never met");
    assert!(states >= 1_000_000, "only {states} states");
}
