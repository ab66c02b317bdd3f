//! The wire tier: many seeds without a violation, and proof that it can fail.
//!
//! Settings: `SIM_WIRE_SEEDS`, `SIM_PROFILE`.
#![allow(clippy::expect_used, reason = "a test")]

use sim::bugs::Bug;
use sim::schedule::Case;
use sim::search::{Plan, search};
use sim::{Options, Tier, generate, profile_of, run};
use sim_oracle::Invariant;

const OPTIONS: fn() -> Options = || Options { tier: Tier::Wire, ..Options::default() };

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok().map(|text| text.parse().ok().unwrap_or_else(|| panic!("{name}={text}")))
}

#[test]
fn no_seed_breaks_an_invariant() {
    let seeds = setting("SIM_WIRE_SEEDS").unwrap_or(2_000);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let profile = setting("SIM_PROFILE");
    let plan = Plan { seeds: 0..seeds, profile, options: OPTIONS(), threads, enough: 5 };
    let report = search(&plan, &|_| {});
    let found: Vec<String> = report.found.iter().map(sim::search::Found::line).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(report.searched * 10 >= report.seeds * 9, "{} seeds tested the promise", report.searched);
}

#[test]
fn schedules_that_once_failed_hold() {
    let text = include_str!("../corpus/wire/a-start-past-the-fence.json");
    let Case { bug, schedule, .. } = serde_json::from_str(text).expect("a case");
    let violation = run(&schedule, OPTIONS()).violation;
    assert!(violation.is_none(), "{violation:?}");
    // With the mistake back in its place it breaks the same promise.
    let bug = Bug::ALL.iter().copied().find(|known| Some(known.name()) == bug.as_deref());
    let again = run(&schedule, Options { bug, ..OPTIONS() }).violation.map(|found| found.invariant);
    assert_eq!(again, Some(Invariant::S3));
}

/// Mistakes of the store, the machine and the gateway, each by the invariant that is to find it.
#[test]
fn planted_bugs_are_found() {
    const SEEDS: u64 = 400;
    for bug in BUGS {
        let options = Options { bug: Some(*bug), ..OPTIONS() };
        let finds = |seed: &u64| {
            let violation = run(&generate(*seed, profile_of(*seed)), options).violation;
            violation.is_some_and(|violation| violation.invariant == bug.invariant())
        };
        let found = (0..SEEDS).find(finds);
        println!("{} found by seed {found:?}", bug.name());
        assert!(found.is_some(), "{} is not found within {SEEDS} seeds", bug.name());
    }
}

#[rustfmt::skip]
const BUGS: &[Bug] = &[
    Bug::GraceIgnored, Bug::ReclaimEarly, Bug::ClaimLateClock, Bug::LeaseFromEarlyClock,
    Bug::LeaseHalved, Bug::RenewFromEarlyClock, Bug::RenewHalved, Bug::RenewIgnoresToken,
    Bug::RenewIgnoresOwner, Bug::SettleUnguarded, Bug::SettleIgnoresToken, Bug::SettleRefusesExpired,
    Bug::TokenKept, Bug::AttemptsKept, Bug::ReleaseSpends, Bug::RetryDueNow,
    Bug::ClaimIgnoresDue, Bug::ClaimIgnoresSpent, Bug::DoubleClaim, Bug::ClaimTerminal,
    Bug::NeverReclaim, Bug::LostRow, Bug::SendTwice, Bug::AcceptedIsSuccess,
    Bug::HeartbeatOnce, Bug::HeartbeatLate, Bug::HeartbeatForgottenOnFailure, Bug::SettleDelayRestarts,
    Bug::UnknownClaimForgotten, Bug::ClaimStopsAfterFailure, Bug::SearchNever, Bug::SearchSeldom,
    Bug::LeasesUnlimited, Bug::RequestsUnlimited, Bug::DestinationUnlimited, Bug::DrainWaits,
    Bug::RetryBeyondLimit, Bug::FailBeforeLimit, Bug::RetryAfterIgnored, Bug::BackoffStuck,
    Bug::BackoffOffByOne, Bug::UndeliverableRetried,
];
