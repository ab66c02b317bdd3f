//! Real faults on real parts: the binary, Postgres servers that are crashed and failed over, and networks that are cut,
//! under a seeded plan; then a verdict from what receivers and table recorded.
//!
//! `CHAOS_SECONDS` and `CHAOS_EVENTS` make a soak of the story `everything_at_once`, `CHAOS_SEED` another plan of each.

mod bed;
#[path = "../common/mod.rs"]
mod common;
mod faults;
mod ground;
mod hostile;
mod judge;
mod limits;
#[path = "../../src/demo/postgres_binaries.rs"]
mod postgres_binaries;
mod proxy;
mod rooms;
mod server;

use std::time::Duration;

use bed::{Database, Story, play};
use faults::Fault::{self, *};
use judge::Verdict;
use proxy::Weather::*;
use tokio::sync::Mutex;

/// One story at a time: each needs the machine to itself.
static ALONE: Mutex<()> = Mutex::const_new(());

fn from_environment<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok().map(|value| value.parse().ok().expect("a number"))
}

async fn story(name: &str, seed: u64, database: Database, seconds: u64, faults: &[Fault]) -> Verdict {
    let _alone = ALONE.lock().await;
    let seed = from_environment("CHAOS_SEED").unwrap_or(seed);
    let events = 100 * seconds as u32;
    let story = Story {
        seed,
        database,
        workers: 3,
        events,
        span: Duration::from_secs(seconds),
        faults: faults.to_vec(),
    };
    let verdict = play(story).await;
    verdict.hold(name);
    verdict
}

/// Sessions that end cost nothing: no lease runs out and nothing is sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_end_are_replaced() {
    let verdict = story("sessions", 8, Database::Single, 6, &[Terminate]).await;
    assert_eq!((verdict.takeovers, verdict.duplicates, verdict.broken_off), (0, 0, 0));
}

const SLOW: proxy::Weather = Slow(Duration::from_millis(60));

const WORKERS: &[Fault] = &[Kill, Pause, Kill, Restart, Pause, Starve, Descriptors];

const DATABASE: &[Fault] = &[
    Crash,
    Terminate,
    ReadOnly,
    HoldRows,
    LockTable,
    HangCommits,
    CutOverCrash,
    PauseOverCrash,
    KillAmidHungCommits,
];

const NETWORK: &[Fault] = &[
    Database(Cut),
    Database(NoAnswers),
    Database(NoQuestions),
    Database(SLOW),
    Database(Lossy),
    Database(Refuse),
    Database(Garbage),
    Destination(Cut),
    Destination(NoAnswers),
    Destination(Refuse),
    Destination(Garbage),
    Destination(SLOW),
    Destination(Lossy),
];

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_killed_stopped_and_restarted() {
    let verdict = story("workers", 1, Database::Single, 22, WORKERS).await;
    assert!(verdict.takeovers > 0, "nothing was taken over: the kills showed nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_crashes_hangs_and_refuses() {
    story("database", 2, Database::Single, 22, DATABASE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_cut() {
    story("network", 3, Database::Single, 28, NETWORK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_promoted_that_lacks_confirmed_commits() {
    let pair = Database::Pair { synchronous: false };
    let verdict = story("asynchronous failover", 4, pair, 10, &[Failover]).await;
    assert!(verdict.forgotten > 0, "no confirmed commit was lost: the failover showed nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_standby_is_promoted() {
    story("synchronous failover", 5, Database::Pair { synchronous: true }, 10, &[Failover]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_a_pooler_in_transaction_mode() {
    const FAULTS: &[Fault] = &[PoolerCrash, Kill, Crash, Terminate, Database(Cut), HangCommits];
    story("pooler", 6, Database::Pooled, 18, FAULTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_at_once() {
    let _alone = ALONE.lock().await;
    let seconds: u64 = from_environment("CHAOS_SECONDS").unwrap_or(35);
    let events = from_environment("CHAOS_EVENTS").unwrap_or(100 * seconds as u32);
    let seed = from_environment("CHAOS_SEED").unwrap_or(7);
    let span = Duration::from_secs(seconds);
    let verdict = play(Story {
        seed,
        database: Database::Single,
        workers: 4,
        events,
        span,
        faults: [WORKERS, DATABASE, NETWORK].concat(),
    })
    .await;
    verdict.hold("everything");
    // What a worker needs it has after the first half.
    let (before, after) = (verdict.memory.most(0..2), verdict.memory.most(3..4));
    assert!(after <= before + before / 10 + 4_096, "memory grew from {before} to {after} KiB");
}
