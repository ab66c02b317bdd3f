//! The event-heap tier as a test: the corpus, a search of clean seeds, planted bugs.
//!
//! Settings: `SIM_SEED` runs one seed, `SIM_SEEDS` sets how many are searched, `SIM_PROFILE` gives all of them one
//! profile, `SIM_TRACE=1` tells the story of a failure.

use std::collections::BTreeSet;

use sim::bugs::Bug;
use sim::schedule::Case;
use sim::search::{Plan, Report, search};
use sim::{Options, Profile, Schedule, generate, profile_of, run};
use sim_oracle::{Checks, Invariant};

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not allowed")))
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn tell(schedule: &Schedule, options: Options) {
    if std::env::var_os("SIM_TRACE").is_some() {
        let outcome = run(schedule, Options { keep: true, ..options });
        println!("{}", sim::story::story(schedule, &outcome.facts));
    }
}

fn fail_on(report: &Report) {
    for found in report.found.iter().take(5) {
        println!("{}", found.line());
        tell(&generate(found.seed, found.profile), Options::default());
    }
    assert!(report.found.is_empty(), "{} seeds break a promise", report.found.len());
}

#[test]
fn schedules_that_once_failed_hold() {
    let mut replayed = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Case { found, bug, schedule } =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let outcome = run(&schedule, Options::default());
        if let Some(violation) = outcome.violation {
            tell(&schedule, Options::default());
            panic!("{}: {violation}", path.display());
        }
        // With the mistake back in its place it breaks the same promise: the file has not rotted.
        if let Some(name) = bug {
            let bug = Bug::ALL.iter().copied().find(|bug| bug.name() == name);
            let again =
                run(&schedule, Options { bug, ..Options::default() }).violation.map(|found| found.invariant);
            assert!(
                again.is_some_and(|again| found.starts_with(again.name())),
                "{}: {again:?}",
                path.display()
            );
        }
        replayed += 1;
    }
    assert!(replayed > 0, "the corpus is empty");
}

#[test]
fn no_seed_breaks_a_promise_and_everything_is_visited() {
    let profile: Option<Profile> = setting("SIM_PROFILE");
    let only: Option<u64> = setting("SIM_SEED");
    let count = setting("SIM_SEEDS").unwrap_or(20_000);
    let seeds = only.map_or(0..count, |seed| seed..seed + 1);
    let plan = Plan { seeds, profile, options: Options::default(), threads: threads(), enough: 20 };
    let report = search(&plan, &|_| {});
    println!("{}\n{} of {} seeds tested the promise", report.stats, report.searched, report.seeds);
    fail_on(&report);
    if only.is_none() && profile.is_none() && count >= 10_000 {
        assert_eq!(report.stats.unvisited(), Vec::<String>::new(), "never visited");
        assert!(report.searched * 10 >= report.seeds * 9, "faults excuse too much");
    }
}

/// The first seed that breaks the bug's invariant, and what other invariants were broken before it.
fn hunt(bug: Bug, checks: Checks, seeds: u64) -> (Option<u64>, BTreeSet<Invariant>) {
    let options = Options { bug: Some(bug), checks, ..Options::default() };
    let mut others = BTreeSet::new();
    for seed in 0..seeds {
        if let Some(violation) = run(&generate(seed, profile_of(seed)), options).violation {
            if violation.invariant == bug.invariant() {
                return (Some(seed), others);
            }
            others.insert(violation.invariant);
        }
    }
    (None, others)
}

#[test]
fn every_planted_bug_is_found_by_its_invariant() {
    assert!(Bug::ALL.len() >= 30);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let firsts = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                while let Some(bug) = Bug::ALL.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    let (first, others) = hunt(*bug, Checks::ALL, bug.budget());
                    println!("{:<28} {:<18} {first:?} {others:?}", bug.name(), bug.invariant().name());
                    firsts.lock().unwrap().push((first, bug.name()));
                }
            });
        }
    });
    let mut firsts = firsts.into_inner().unwrap();
    firsts.sort();
    let unfound: Vec<_> = firsts.iter().filter(|(first, _)| first.is_none()).map(|(_, name)| name).collect();
    assert!(unfound.is_empty(), "not found: {unfound:?}");
    let at = |part: usize| firsts[firsts.len() * part / 100].0;
    println!("median {:?}, nine of ten {:?}, worst {:?}", at(50), at(90), firsts.last());
    assert!(at(50) <= Some(10), "half are found within {:?} seeds", at(50));
    assert!(at(90) <= Some(200), "nine of ten are found within {:?} seeds", at(90));
}

#[test]
fn no_invariant_is_decoration() {
    for invariant in Invariant::ALL.iter().copied().filter(|invariant| *invariant != Invariant::Panic) {
        let mine = Bug::ALL.iter().copied().filter(|bug| bug.invariant() == invariant);
        // In ten times as many seeds as it is found in with it.
        let witness = mine.into_iter().find(|bug| {
            let Some(first) = hunt(*bug, Checks::ALL, bug.budget()).0 else { return false };
            let (found, others) = hunt(*bug, Checks::ALL.without(invariant), 10 * (first + 1));
            found.is_none() && others.is_empty()
        });
        println!("without {invariant}, {witness:?} goes unfound");
        assert!(witness.is_some(), "every planted bug is found without {invariant} as well");
    }
}

#[test]
fn a_failure_shrinks_to_its_cause() {
    let bug = Some(Bug::HeartbeatOnce);
    let options = Options { bug, ..Options::default() };
    let found = (0..5_000).find_map(|seed| {
        let schedule = generate(seed, profile_of(seed));
        let violation = run(&schedule, options).violation?;
        (violation.invariant == Invariant::S2).then_some(schedule)
    });
    let shrunk = sim::shrink::shrink(&found.unwrap(), Invariant::S2, options, 4_000);
    let Schedule { faults, events, slots, .. } = &shrunk.schedule;
    println!("{} faults, {} events, {} workers", faults.len(), events.len(), slots.len());
    assert!(faults.len() <= 3 && events.len() <= 2 && slots.len() <= 2);
    let text = serde_json::to_string(&shrunk.schedule).unwrap();
    assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), shrunk.schedule);
    let outcome = run(&shrunk.schedule, Options { keep: true, ..options });
    let drawing = sim::timeline::timeline(&shrunk.schedule, &outcome.facts, outcome.violation.as_ref());
    assert!(drawing.starts_with("<svg") && drawing.contains("stroke=\"red\""));
}

#[test]
fn a_panic_is_a_finding_with_a_story() {
    let mut schedule = generate(0, Profile::Calm);
    let mut late = schedule.slots[0].clone();
    // Settings that there are not.
    (late.settings, late.starts) = (99, 10_000_000);
    schedule.slots.push(late);
    schedule.events[0].at = 20_000_000;
    let outcome = run(&schedule, Options { keep: true, ..Options::default() });
    let violation = outcome.violation.unwrap();
    assert_eq!((violation.invariant, violation.at), (Invariant::Panic, 10_000_000));
    assert!(violation.text.contains("99"), "{violation}");
    assert!(sim::story::story(&schedule, &outcome.facts).contains("starts in slot 0"));
}
