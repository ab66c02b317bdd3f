//! The simulator's command line. `cargo sim` runs it.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use sim::bugs::{Bug, Place};
use sim::check::Bounds;
use sim::schedule::Case;
use sim::search::{Found, Plan, Report, search};
use sim::shrink::shrink;
use sim::{Options, Profile, Schedule, Tier, trace};
use sim_oracle::{Change, Invariant, RowState, Sometimes};

#[derive(Parser)]
#[command(about = "Searches seeded schedules of faults for broken promises")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Search many seeds.
    Run {
        /// How many seeds.
        #[arg(long, default_value_t = 100_000)]
        seeds: u64,
        /// The first one.
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// One profile for all; otherwise each seed has its own.
        #[arg(long)]
        profile: Option<Profile>,
        /// Which simulator: des or wire.
        #[arg(long, default_value = "des")]
        tier: Tier,
        /// How many threads; all cores by default.
        #[arg(short, long)]
        jobs: Option<usize>,
        /// Stop after so many failures.
        #[arg(long, default_value_t = 20)]
        enough: usize,
        /// Plant a bug.
        #[arg(long)]
        bug: Option<String>,
    },
    /// Run one seed, or a schedule from a file.
    Replay {
        /// A seed or a file.
        what: String,
        /// The seed's profile, if it is not its own.
        #[arg(long)]
        profile: Option<Profile>,
        /// Which simulator: des or wire.
        #[arg(long, default_value = "des")]
        tier: Tier,
        /// Tell the story.
        #[arg(long)]
        trace: bool,
        /// Draw a timeline into this file.
        #[arg(long)]
        svg: Option<PathBuf>,
        /// Plant a bug.
        #[arg(long)]
        bug: Option<String>,
    },
    /// Shrink the schedule of a failing seed or file, and tell its story.
    Shrink {
        /// A seed or a file.
        what: String,
        /// The seed's profile, if it is not its own.
        #[arg(long)]
        profile: Option<Profile>,
        /// Which simulator: des or wire.
        #[arg(long, default_value = "des")]
        tier: Tier,
        /// Write the shrunk schedule here.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Draw its timeline into this file.
        #[arg(long)]
        svg: Option<PathBuf>,
        /// Plant a bug.
        #[arg(long)]
        bug: Option<String>,
    },
    /// Show that each planted bug is found.
    Bugs {
        /// Which simulator: des or wire.
        #[arg(long, default_value = "des")]
        tier: Tier,
        /// Only this one.
        #[arg(long)]
        id: Option<String>,
        /// Search so many seeds and count the hits, instead of stopping at the first one.
        #[arg(long)]
        seeds: Option<u64>,
    },
    /// Show which situations and changes of rows a search visits.
    Coverage {
        /// How many seeds.
        #[arg(long, default_value_t = 5_000)]
        seeds: u64,
    },
    /// Run seeds twice and compare the hashes of their traces.
    Determinism {
        /// Which simulator: des or wire.
        #[arg(long, default_value = "des")]
        tier: Tier,
        /// How many seeds.
        #[arg(long, default_value_t = 100)]
        seeds: u64,
        /// Print the hashes, to be compared with another process's or build's.
        #[arg(long)]
        print: bool,
        /// Print this seed's whole trace instead.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Visit every interleaving of some workers on one event, within bounds.
    Check {
        /// How many workers.
        #[arg(long, default_value_t = 2)]
        workers: usize,
        /// The length of a history, in quarters of the lease.
        #[arg(long, default_value_t = 7)]
        ticks: u64,
        /// Workers that die.
        #[arg(long, default_value_t = 1)]
        crashes: u8,
        /// Workers that stop for any time.
        #[arg(long, default_value_t = 0)]
        pauses: u8,
        /// Calls and replies that are lost.
        #[arg(long, default_value_t = 1)]
        losses: u8,
        /// Lost calls that may still be applied, at a time.
        #[arg(long, default_value_t = 1)]
        late: usize,
        /// Plant a bug of the worker machine.
        #[arg(long)]
        bug: Option<String>,
        /// Write a schedule that does what the first failing path does here.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Measure.
    Bench {
        /// How many seeds.
        #[arg(long, default_value_t = 20_000)]
        seeds: u64,
        /// How many in the wire tier.
        #[arg(long, default_value_t = 200)]
        wire_seeds: u64,
    },
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn load(what: &str, profile: Option<Profile>) -> Result<Schedule, String> {
    if let Ok(seed) = what.parse() {
        return Ok(sim::generate(seed, profile.unwrap_or_else(|| sim::profile_of(seed))));
    }
    let text = std::fs::read_to_string(what).map_err(|error| format!("{what}: {error}"))?;
    let case: Case = serde_json::from_str(&text).map_err(|error| format!("{what}: {error}"))?;
    let refused =
        case.schedule.settings.iter().find_map(|settings| settings.worker(case.schedule.seed).err());
    refused.map_or(Ok(case.schedule), |error| Err(format!("{what}: {error}")))
}

fn bug_named(name: Option<String>) -> Result<Option<Bug>, String> {
    let Some(name) = name else { return Ok(None) };
    let found = Bug::ALL.iter().copied().find(|bug| bug.name().eq_ignore_ascii_case(&name));
    found.map(Some).ok_or_else(|| format!("no planted bug is called {name:?}; `cargo sim bugs` lists them"))
}

/// A search with a progress bar on a terminal.
fn watched(plan: &Plan) -> Report {
    let all = plan.seeds.end - plan.seeds.start;
    let bar = std::io::stderr().is_terminal() && all > 5_000;
    let report = search(plan, &|done| {
        if bar && done % 1_024 < 32 {
            let part = (done.min(all) * 40 / all) as usize;
            eprint!("\r[{:<40}] {done} of {all} seeds", "#".repeat(part));
            let _ = std::io::stderr().flush();
        }
    });
    if bar {
        eprintln!();
    }
    report
}

fn summary(report: &Report) -> String {
    let per = |count: u64| count as f64 / report.seeds.max(1) as f64;
    format!(
        "{} seeds, {} of them tested the promise; a seed has {:.0} events, {:.0} facts, {:.1} simulated s\n{}",
        report.seeds,
        report.searched,
        per(report.steps),
        per(report.stats.facts),
        per(report.simulated) / 1e6,
        report.stats
    )
}

fn tell(schedule: &Schedule, options: Options, trace: bool, svg: Option<&Path>) -> Result<bool, String> {
    let outcome = sim::run(schedule, Options { keep: true, ..options });
    if trace {
        print!("{}", sim::story::story(schedule, &outcome.facts));
    }
    if let Some(path) = svg {
        let drawing = sim::timeline::timeline(schedule, &outcome.facts, outcome.violation.as_ref());
        std::fs::write(path, drawing).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let (seed, profile, hash, tier) = (schedule.seed, schedule.profile, outcome.hash, options.tier);
    match outcome.violation {
        Some(violation) => {
            println!("{}", Found { seed, profile, tier, violation, hash }.line());
            Ok(false)
        }
        None => {
            println!("ok seed={seed} profile={profile} trace={hash:016x}");
            Ok(true)
        }
    }
}

fn bugs(only: Option<Bug>, seeds: Option<u64>, tier: Tier) -> bool {
    let mut good = true;
    println!(
        "{:<28} {:<8} {:<18} {:>7} {:>7}  also broken first",
        "bug", "place", "invariant", "seed", "budget"
    );
    let wanted = |bug: &Bug| only.is_none_or(|only| only == *bug);
    for bug in Bug::ALL.iter().copied().filter(wanted) {
        let options = Options { bug: Some(bug), tier, ..Options::default() };
        let mut others: Vec<Invariant> = Vec::new();
        let (mut first, mut hits) = (None, 0);
        for seed in 0..seeds.unwrap_or(bug.budget()) {
            let schedule = sim::generate(seed, sim::profile_of(seed));
            match sim::run(&schedule, options).violation.map(|violation| violation.invariant) {
                Some(found) if found == bug.invariant() => {
                    first = first.or(Some(seed));
                    hits += 1;
                    if seeds.is_none() {
                        break;
                    }
                }
                Some(other) if !others.contains(&other) => others.push(other),
                _ => {}
            }
        }
        good &= first.is_some();
        let seed = first.map_or("UNFOUND".into(), |seed| seed.to_string());
        let rate =
            seeds.map_or(String::new(), |seeds| format!(" {:.2} %", f64::from(hits) * 100.0 / seeds as f64));
        let others: Vec<&str> = others.iter().map(|other| other.name()).collect();
        let place = match bug.place() {
            Place::Machine(_) => "machine",
            Place::Store => "store",
            Place::Driver => "driver",
        };
        let (name, invariant) = (bug.name(), bug.invariant().name());
        println!(
            "{name:<28} {place:<8} {invariant:<18} {seed:>7} {:>7}  {}{rate}",
            bug.budget(),
            others.join(", ")
        );
    }
    good
}

fn coverage(seeds: u64) -> bool {
    let options = Options::default();
    let report =
        watched(&Plan { seeds: 0..seeds, profile: None, options, threads: cores(), enough: usize::MAX });
    for what in Sometimes::ALL {
        println!("{:>10}  {what}", report.stats.sometimes[*what as usize]);
    }
    print!("\n{:<28}", "");
    RowState::ALL.iter().for_each(|state| print!("{:>12}", state.name()));
    println!();
    for change in Change::ALL {
        print!("{:<28}", change.name());
        for state in RowState::ALL {
            let count = report.stats.matrix[*state as usize][*change as usize];
            match (count, sim_oracle::reachable(*state, *change)) {
                (0, false) => print!("{:>12}", "-"),
                (0, true) => print!("{:>12}", "NEVER"),
                (count, _) => print!("{count:>12}"),
            }
        }
        println!();
    }
    let missing = report.stats.unvisited();
    println!("\n{}\nnever visited: {missing:?}", summary(&report));
    missing.is_empty()
}

fn determinism(seeds: u64, print: bool, tier: Tier) -> bool {
    let mut same = true;
    for seed in 0..seeds {
        let (hash, again) = (trace::hash_of(seed, tier), trace::hash_of(seed, tier));
        if hash != again {
            same = false;
            let difference =
                trace::first_difference(&trace::text_of(seed, tier), &trace::text_of(seed, tier));
            println!("seed {seed} has two traces, {hash:016x} and {again:016x}; they differ in {difference}");
        }
        if print {
            println!("{seed} {hash:016x}");
        }
    }
    println!("{seeds} seeds: {}", if same { "the same traces twice" } else { "NOT DETERMINISTIC" });
    same
}

#[allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a measurement of real time")]
fn bench(seeds: u64, wire_seeds: u64) -> bool {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    println!("machine: {} ({} cores), one thread", model.unwrap_or("unknown"), cores());
    let options = Options::default();
    let began = std::time::Instant::now();
    let report =
        search(&Plan { seeds: 0..seeds, profile: None, options, threads: 1, enough: usize::MAX }, &|_| {});
    let took = began.elapsed().as_secs_f64();
    println!(
        "DES: {:.0} seeds/s, {:.2} M events/s, {:.2} M facts/s judged, {:.0} x real time",
        seeds as f64 / took,
        report.steps as f64 / took / 1e6,
        report.stats.facts as f64 / took / 1e6,
        report.simulated as f64 / 1e6 / took
    );
    println!("{}", summary(&report));
    let options = Options { tier: Tier::Wire, ..options };
    let began = std::time::Instant::now();
    let seeds = 0..wire_seeds;
    let wire = search(&Plan { seeds, profile: None, options, threads: 1, enough: usize::MAX }, &|_| {});
    let took = began.elapsed().as_secs_f64();
    let simulated = wire.simulated as f64 / 1e6;
    println!(
        "wire: {:.1} seeds/s of {:.1} simulated s, {:.1} of 60 simulated s, {:.0} x real time",
        wire_seeds as f64 / took,
        simulated / wire_seeds.max(1) as f64,
        simulated / 60.0 / took,
        simulated / took
    );
    report.found.is_empty() && wire.found.is_empty()
}

fn check(bounds: Bounds, out: Option<&Path>) -> Result<bool, String> {
    let report = sim::check::check(bounds, cores());
    println!("{} states; never met: {:?}", report.states, report.never);
    for (failed, path) in &report.failures {
        println!("FAIL {failed}: {path:?}");
    }
    let Some((_, path)) = report.failures.first() else { return Ok(true) };
    let Some((schedule, violation)) = sim::check::replay(bounds, path) else {
        println!("no schedule of the event heap does what this path does");
        return Ok(false);
    };
    println!("the event heap finds it too: {violation}");
    if let Some(out) = out {
        let bug = bounds.bug.and_then(Bug::of_machine).map(|bug| bug.name().to_owned());
        save(out, &Case { found: violation.to_string(), bug, schedule })?;
    }
    Ok(false)
}

fn save(path: &Path, case: &Case) -> Result<(), String> {
    let text = serde_json::to_string_pretty(case).map_err(|error| error.to_string())?;
    std::fs::write(path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))
}

fn execute(command: Command) -> Result<bool, String> {
    let options = Options::default();
    match command {
        Command::Run { seeds, from, profile, tier, jobs, enough, bug } => {
            let options = Options { tier, bug: bug_named(bug)?, ..options };
            let threads = jobs.unwrap_or_else(cores);
            let report = watched(&Plan { seeds: from..from + seeds, profile, options, threads, enough });
            for found in report.found.iter().take(enough) {
                println!("{}", found.line());
            }
            println!("{} failures; {}", report.found.len(), summary(&report));
            Ok(report.found.is_empty())
        }
        Command::Replay { what, profile, tier, trace, svg, bug } => {
            let options = Options { tier, bug: bug_named(bug)?, ..options };
            tell(&load(&what, profile)?, options, trace, svg.as_deref())
        }
        Command::Shrink { what, profile, tier, out, svg, bug } => {
            let options = Options { tier, bug: bug_named(bug)?, ..options };
            let schedule = load(&what, profile)?;
            let Some(violation) = sim::run(&schedule, options).violation else {
                return Err(format!("{what} breaks nothing"));
            };
            let shrunk = shrink(&schedule, violation.invariant, options, 4_000);
            let small = &shrunk.schedule;
            tell(small, options, true, svg.as_deref())?;
            println!(
                "{} runs: {} faults, {} events, {} workers, of {}, {}, {}",
                shrunk.runs,
                small.faults.len(),
                small.events.len(),
                small.slots.len(),
                schedule.faults.len(),
                schedule.events.len(),
                schedule.slots.len()
            );
            if let Some(path) = out {
                let bug = options.bug.map(|bug| bug.name().to_owned());
                save(&path, &Case { found: violation.to_string(), bug, schedule: small.clone() })?;
            }
            Ok(true)
        }
        Command::Bugs { tier, id, seeds } => Ok(bugs(bug_named(id)?, seeds, tier)),
        Command::Coverage { seeds } => Ok(coverage(seeds)),
        Command::Determinism { tier, seed: Some(seed), .. } => {
            print!("{}", trace::text_of(seed, tier));
            Ok(true)
        }
        Command::Determinism { tier, seeds, print, seed: None } => Ok(determinism(seeds, print, tier)),
        Command::Check { workers, ticks, crashes, pauses, losses, late, bug, out } => {
            let bug = match bug_named(bug)?.map(Bug::place) {
                None => None,
                Some(Place::Machine(planted)) => Some(planted),
                Some(_) => return Err("only the worker machine is checked with a bug".into()),
            };
            check(Bounds { workers, ticks, crashes, pauses, losses, late, bug }, out.as_deref())
        }
        Command::Bench { seeds, wire_seeds } => Ok(bench(seeds, wire_seeds)),
    }
}

fn main() -> ExitCode {
    // A machine's panic is a finding, reported with its seed; its own message would only be in the way.
    std::panic::set_hook(Box::new(|_| {}));
    match execute(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
