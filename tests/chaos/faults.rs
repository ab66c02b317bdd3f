//! The faults, and how each is done to the bed.

use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use sqlx::{Connection, Executor};
use tokio::time::sleep;

use crate::bed::{Bed, LEASE, STORE_TIMEOUT, micros_now};
use crate::common::MS;
use crate::proxy::Weather;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL of one worker.
    Kill,
    /// SIGSTOP for longer than the lease, then SIGCONT.
    Pause,
    /// SIGSTOP and SIGCONT in quick turns: a worker that hardly gets the processor.
    Starve,
    /// SIGTERM, and a new process after it.
    Restart,
    /// A worker that can open no more files, with its database connections cut.
    Descriptors,
    /// Immediate shutdown of the server.
    Crash,
    /// A worker is cut off, its server crashes and comes back, and only then the worker's packets pass again.
    CutOverCrash,
    /// A worker is stopped, and the server crashes and comes back in the meantime.
    PauseOverCrash,
    /// A worker is killed while commits hang.
    KillAmidHungCommits,
    /// `pg_terminate_backend` on every session, thrice.
    Terminate,
    /// Every write is refused.
    ReadOnly,
    /// A long transaction holds rows, leased ones among them.
    HoldRows,
    /// `LOCK TABLE` for longer than a statement may take.
    LockTable,
    /// Commits wait for a standby that isn't there, and come late.
    HangCommits,
    /// The network between workers and database.
    Database(Weather),
    /// The network between workers and one destination.
    Destination(Weather),
    /// The pooler is killed.
    PoolerCrash,
    /// The primary crashes and its standby is promoted; asynchronously, confirmed commits are lost.
    Failover,
}

/// A fault as it was done, by the wall clock.
#[derive(Clone, Debug)]
pub(crate) struct Disturbance {
    pub(crate) fault: Fault,
    /// The worker, if it was done to one alone.
    pub(crate) worker: Option<String>,
    /// The destination, if it was done to one.
    pub(crate) destination: Option<usize>,
    pub(crate) begin: i64,
    pub(crate) end: i64,
}

impl Fault {
    /// Whether the database is away for whomever it is done to, so that work has to resume when it is back.
    pub(crate) fn is_outage(self) -> bool {
        match self {
            Self::Crash
            | Self::CutOverCrash
            | Self::PauseOverCrash
            | Self::KillAmidHungCommits
            | Self::Terminate
            | Self::ReadOnly
            | Self::LockTable
            | Self::HangCommits
            | Self::PoolerCrash
            | Self::Failover => true,
            Self::Database(weather) => !weather.passes_all(),
            _ => false,
        }
    }

    /// Whether a lease may run out for it. Sessions that end are replaced long before.
    pub(crate) fn touches_leases(self) -> bool {
        !matches!(self, Self::Destination(_) | Self::Terminate)
    }

    /// Whether a request may be repeated for it: it was broken off, or its answer did not arrive, or was not settled.
    pub(crate) fn may_repeat(self) -> bool {
        self != Self::Terminate
    }

    /// Whether two requests for one event may be open at once for it (rule P12), or seem so: a receiver that is cut off
    /// learns late that the worker has closed the connection.
    pub(crate) fn may_overlap(self, commits_were_lost: bool) -> bool {
        match self {
            Self::Pause | Self::PauseOverCrash => true,
            Self::Destination(weather) => {
                matches!(weather, Weather::Cut | Weather::NoQuestions | Weather::Slow(_) | Weather::Lossy)
            }
            Self::Failover => commits_were_lost,
            _ => false,
        }
    }

    /// Whether it stops a worker, which ends its requests as soon as it goes on.
    pub(crate) fn stops(self) -> bool {
        matches!(self, Self::Pause | Self::PauseOverCrash)
    }
}

impl Bed {
    /// Does one fault to its end.
    pub(crate) async fn inflict(&mut self, fault: Fault) {
        let begin = micros_now();
        let slot = 1 + self.rng.below(self.slots.len() as u64 - 1) as usize;
        let (mut worker, mut destination) = (Some(self.slots[slot].name()), None);
        match fault {
            Fault::Kill => {
                self.slots[slot].worker.child.kill().await.expect("SIGKILL");
                self.disturbed(Disturbance { fault, worker, destination, begin, end: micros_now() });
                let pause = self.rng.between(0, 800);
                sleep(pause).await;
                return self.replace(slot);
            }
            Fault::Pause => {
                self.slots[slot].worker.signal(Signal::STOP);
                let time = LEASE + self.rng.between(500, 2_000);
                sleep(time).await;
                self.slots[slot].worker.signal(Signal::CONT);
            }
            Fault::Starve => {
                for _ in 0..15 {
                    self.slots[slot].worker.signal(Signal::STOP);
                    sleep(150 * MS).await;
                    self.slots[slot].worker.signal(Signal::CONT);
                    sleep(30 * MS).await;
                }
            }
            Fault::Restart => {
                // Before it says so, nobody listens to signals.
                self.slots[slot].worker.logs("worker started").await;
                self.slots[slot].worker.signal(Signal::TERM);
                let code = self.slots[slot].worker.end().await;
                assert_eq!(code, Some(0), "a drain in time:\n{}", self.slots[slot].worker.log());
                self.disturbed(Disturbance { fault, worker, destination, begin, end: micros_now() });
                return self.replace(slot);
            }
            Fault::Descriptors => {
                let pid = self.slots[slot].worker.child.id().expect("it runs");
                let old = open_files(pid);
                let few = Rlimit { current: Some(8), maximum: old.maximum };
                let pid = Pid::from_raw(pid.cast_signed());
                prlimit(pid, Resource::Nofile, few).expect("an own child's limit");
                self.slots[slot].databases.iter().for_each(|proxy| proxy.set(Weather::Refuse));
                sleep(50 * MS).await;
                self.slots[slot].databases.iter().for_each(|proxy| proxy.set(Weather::Fair));
                let time = self.rng.between(500, 4_000);
                sleep(time).await;
                prlimit(pid, Resource::Nofile, old).expect("the old limit");
            }
            Fault::Crash => {
                worker = None;
                self.server.crash().await;
                let time = self.rng.between(0, 2_500);
                sleep(time).await;
                self.server.start().await;
            }
            Fault::CutOverCrash => {
                worker = None;
                self.slots[slot].databases.iter().for_each(|proxy| proxy.set(Weather::Cut));
                self.server.crash().await;
                self.server.start().await;
                let time = self.rng.short_or_long();
                sleep(time).await;
                self.slots[slot].databases.iter().for_each(|proxy| proxy.set(Weather::Fair));
            }
            Fault::PauseOverCrash => {
                worker = None;
                self.slots[slot].worker.signal(Signal::STOP);
                self.server.crash().await;
                self.server.start().await;
                sleep(LEASE).await;
                self.slots[slot].worker.signal(Signal::CONT);
            }
            Fault::KillAmidHungCommits => {
                worker = None;
                self.server.set("alter system set synchronous_standby_names = 'absent'").await;
                sleep(STORE_TIMEOUT).await;
                self.slots[slot].worker.child.kill().await.expect("SIGKILL");
                self.replace(slot);
                let time = self.rng.between(0, 1_500);
                sleep(time).await;
                self.server.set("alter system reset synchronous_standby_names").await;
            }
            Fault::Terminate => {
                worker = None;
                for _ in 0..3 {
                    self.server
                        .run(
                            "select pg_terminate_backend(pid) from pg_stat_activity
                              where pid <> pg_backend_pid() and backend_type = 'client backend'",
                        )
                        .await;
                    sleep(100 * MS).await;
                }
            }
            Fault::ReadOnly => {
                worker = None;
                self.server.set("alter system set default_transaction_read_only = on").await;
                let time = self.rng.between(500, 4_000);
                sleep(time).await;
                self.server.set("alter system reset default_transaction_read_only").await;
            }
            Fault::HoldRows => {
                worker = None;
                self.hold(
                    "select from leasehold.outbox_events where delivery_status = 'pending'
                     order by lease_owner is null, id limit 60 for update",
                )
                .await;
            }
            Fault::LockTable => {
                worker = None;
                self.hold("lock table leasehold.outbox_events").await;
            }
            Fault::HangCommits => {
                worker = None;
                self.server.set("alter system set synchronous_standby_names = 'absent'").await;
                let time = self.rng.between(500, 4_500);
                sleep(time).await;
                self.server.set("alter system reset synchronous_standby_names").await;
            }
            Fault::Database(weather) => {
                let all = self.rng.below(3) == 0;
                let slots = if all { 0..self.slots.len() } else { slot..slot + 1 };
                if all {
                    worker = None;
                }
                let proxies: Vec<_> =
                    self.slots[slots].iter().flat_map(|slot| slot.databases.clone()).collect();
                proxies.iter().for_each(|proxy| proxy.set(weather));
                let time = self.rng.short_or_long();
                sleep(time).await;
                proxies.iter().for_each(|proxy| proxy.set(Weather::Fair));
            }
            Fault::Destination(weather) => {
                let proxy = self.rng.below(self.destinations.len() as u64) as usize;
                (worker, destination) = (None, Some(proxy));
                self.destinations[proxy].set(weather);
                let time = self.rng.short_or_long();
                sleep(time).await;
                self.destinations[proxy].set(Weather::Fair);
            }
            Fault::PoolerCrash => {
                worker = None;
                let time = self.rng.between(0, 2_000);
                let pooler = self.pooler.as_mut().expect("there is one");
                pooler.crash().await;
                sleep(time).await;
                pooler.restart().await;
            }
            Fault::Failover => {
                worker = None;
                self.fail_over().await;
            }
        }
        self.disturbed(Disturbance { fault, worker, destination, begin, end: micros_now() });
    }

    /// Runs a statement that locks, and keeps its transaction open.
    async fn hold(&mut self, sql: &'static str) {
        let mut connection = self.server.admin().await;
        let mut transaction = connection.begin().await.expect("a transaction");
        transaction.execute(sql).await.expect(sql);
        let time = self.rng.between(500, 5_000);
        sleep(time).await;
        transaction.commit().await.expect("a commit");
    }

    async fn fail_over(&mut self) {
        let mut standby = self.standby.take().expect("there is one");
        // The standby hears of no more commits: they go on and are confirmed, or hang, if replication is synchronous.
        self.replication.as_ref().expect("there is one").set(Weather::Cut);
        sleep(Duration::from_millis(700)).await;
        self.server.crash().await;
        standby.promote().await;
        std::mem::swap(&mut self.server, &mut standby);
    }
}

/// The limit of open files of a process.
fn open_files(pid: u32) -> Rlimit {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("a process");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    let mut numbers = line.split_whitespace().skip(3).map(|number| number.parse().ok());
    Rlimit { current: numbers.next().flatten(), maximum: numbers.next().flatten() }
}

/// The draws of a seed.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// A time well below the lease, or one beyond it.
    fn short_or_long(&mut self) -> Duration {
        if self.below(2) == 0 { self.between(300, 1_000) } else { LEASE + self.between(100, 1_200) }
    }

    /// A time within two bounds in milliseconds.
    pub(crate) fn between(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.below(most - least + 1))
    }
}
