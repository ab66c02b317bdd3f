//! Many seeds, over all cores. Each seed runs in one thread; only the search is parallel.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sim_oracle::{Invariant, Stats, Violation};

use crate::schedule::{Profile, Schedule};
use crate::world::{Options, Outcome, Tier, World};
use crate::{generate, profile_of};

/// Runs a schedule.
///
/// # Panics
/// If the schedule's settings are not accepted by the machine.
pub fn run(schedule: &Schedule, options: Options) -> Outcome {
    match options.tier {
        Tier::Des => World::new(schedule, options).run(),
        Tier::Wire => crate::wire::run(schedule, options),
    }
}

/// Plays a run. A panic of the machine or the driver is a violation like any other, at what time it may be; what happened
/// before it is kept.
pub(crate) fn caught(play: impl FnOnce()) -> Option<Violation> {
    let panic = catch_unwind(AssertUnwindSafe(play)).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    Some(Violation { invariant: Invariant::Panic, text: text.unwrap_or_default(), at: 0 })
}

/// A seed that breaks an invariant.
#[derive(Clone, Debug)]
pub struct Found {
    /// The seed.
    pub seed: u64,
    /// Its profile.
    pub profile: Profile,
    /// Which simulator ran it.
    pub tier: Tier,
    /// What it breaks.
    pub violation: Violation,
    /// The hash of its trace.
    pub hash: u64,
}

impl Found {
    /// One line, and the command that replays it.
    pub fn line(&self) -> String {
        let Self { seed, profile, tier, violation, hash } = self;
        let tier = tier.name();
        let Violation { invariant, text, at } = violation;
        let at = *at as f64 / 1e6;
        format!(
            "FAIL {invariant} seed={seed} profile={profile} tier={tier} trace={hash:016x} at t={at:.6}s: {text}\n     replay: \
             cargo sim replay {seed} --profile {profile} --tier {tier} --trace"
        )
    }
}

/// What a search showed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Seeds run.
    pub seeds: u64,
    /// Seeds that tested the promise: not all of their leases were excused.
    pub searched: u64,
    /// Events of the heap.
    pub steps: u64,
    /// Simulated microseconds.
    pub simulated: u64,
    /// Counts over all seeds.
    pub stats: Stats,
    /// What was found, by seed.
    pub found: Vec<Found>,
}

impl Report {
    fn add(&mut self, seed: u64, profile: Profile, tier: Tier, outcome: Outcome) {
        self.seeds += 1;
        self.searched += u64::from(outcome.stats.searched());
        self.steps += outcome.steps;
        self.simulated += outcome.ended_at;
        self.stats.merge(&outcome.stats);
        if let Some(violation) = outcome.violation {
            self.found.push(Found { seed, profile, tier, violation, hash: outcome.hash });
        }
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.searched += other.searched;
        self.steps += other.steps;
        self.simulated += other.simulated;
        self.stats.merge(&other.stats);
        self.found.extend(other.found);
        self.found.sort_by_key(|found| found.seed);
    }
}

/// What to search.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which seeds.
    pub seeds: Range<u64>,
    /// One profile for all, or each seed's own.
    pub profile: Option<Profile>,
    /// How they run.
    pub options: Options,
    /// Over how many threads.
    pub threads: usize,
    /// Stop once so many were found.
    pub enough: usize,
}

/// Searches. `progress` is told now and then how many seeds were begun.
pub fn search(plan: &Plan, progress: &(dyn Fn(u64) + Sync)) -> Report {
    const BLOCK: u64 = 32;
    let next = AtomicU64::new(plan.seeds.start);
    let stop = AtomicBool::new(false);
    let report = Mutex::new(Report::default());
    let work = || {
        loop {
            let from = next.fetch_add(BLOCK, Ordering::Relaxed);
            if from >= plan.seeds.end || stop.load(Ordering::Relaxed) {
                return;
            }
            let mut mine = Report::default();
            for seed in from..(from + BLOCK).min(plan.seeds.end) {
                let profile = plan.profile.unwrap_or_else(|| profile_of(seed));
                mine.add(seed, profile, plan.options.tier, run(&generate(seed, profile), plan.options));
            }
            let mut report = report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            report.merge(mine);
            if report.found.len() >= plan.enough {
                stop.store(true, Ordering::Relaxed);
            }
            drop(report);
            progress(from - plan.seeds.start + BLOCK);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..plan.threads.max(1) {
            scope.spawn(work);
        }
        work();
    });
    report.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}
