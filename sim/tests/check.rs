//! The model check is complete within its bounds, finds nothing, and meets every condition that it is there for.

use std::collections::BTreeSet;

use leasehold::machine::Planted;
use sim::check::{Bounds, check, replay};
use sim::{Options, run};
use sim_oracle::Invariant;

#[test]
fn every_interleaving_of_two_workers_on_one_event_holds() {
    let base = Bounds { workers: 2, ticks: 6, crashes: 1, pauses: 0, losses: 1, late: 1, bug: None };
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

#[test]
fn a_path_to_a_planted_bug_breaks_a_promise_in_the_event_heap_too() {
    // Of the paths that are equally short, some let a lease run out while its request is open, some after it.
    for (bug, expected) in [
        (Planted::UnknownClaimForgotten, [Invariant::S2].as_slice()),
        (Planted::HeartbeatForgottenOnFailure, &[Invariant::S2, Invariant::S3]),
    ] {
        let bounds =
            Bounds { workers: 2, ticks: 9, crashes: 0, pauses: 0, losses: 1, late: 0, bug: Some(bug) };
        // One thread: with several, which of them comes first is a matter of luck.
        let report = check(bounds, 1);
        let (failed, path) = report.failures.first().unwrap_or_else(|| panic!("{bug:?} was not found"));
        let (schedule, violation) =
            replay(bounds, path).unwrap_or_else(|| panic!("{failed}: no schedule does {path:?}"));
        assert!(expected.contains(&violation.invariant), "{violation}");
        // It is the mistake that breaks it, not the schedule.
        let sound = run(&schedule, Options::default()).violation;
        assert_eq!(sound.map(|violation| violation.to_string()), None);
    }
}
