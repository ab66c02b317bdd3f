//! What is measured.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use sqlx::postgres::PgPool;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, sleep_until};

use crate::measure::{self, Figures};
use crate::receiver::{Arrivals, Receiver, now};

pub(crate) struct Scenario {
    pub(crate) name: String,
    workers: usize,
    work: Work,
}

enum Work {
    /// Everything is there at the start; with that many due events more for a destination that never answers. At most
    /// `cap` requests are open to one destination.
    Drain { events: u32, hanging: u32, cap: u32 },
    /// Events come one by one, for one destination or 1,000 in turn; at the start there are that many due
    /// events for another one that never answers.
    Trickle { per_second: u32, seconds: u32, many: bool, hanging: u32 },
    /// Nothing comes.
    Idle { seconds: u32 },
    /// That many requests are open at once, for six times as long as a lease.
    Open { requests: u32 },
    /// That many leases are held and renewed, while nothing is delivered.
    Held { leases: u32, seconds: u32 },
    /// There is always more, and somebody leaves a transaction open, or nobody.
    Endless { open: bool, seconds: u32 },
}

pub(crate) fn all(events: u32) -> Vec<Scenario> {
    let mut all = Vec::new();
    for workers in [1, 2, 4, 8] {
        let name = if workers == 1 { "drain, 1 worker".into() } else { format!("drain, {workers} workers") };
        all.push(Scenario { name, workers, work: Work::Drain { events, hanging: 0, cap: CAP } });
    }
    let alone = Work::Drain { events, hanging: 0, cap: 32 };
    all.push(Scenario { name: "drain, 32 requests a destination".into(), workers: 1, work: alone });
    let beside = Work::Drain { events, hanging: 5 * events, cap: 32 };
    all.push(Scenario { name: "the same beside a hung destination".into(), workers: 1, work: beside });
    let trickle = Work::Trickle { per_second: 200, seconds: 10, many: false, hanging: 0 };
    all.push(Scenario { name: "200 events/s, defaults".into(), workers: 1, work: trickle });
    for (name, hanging) in
        [("500 events/s for 1,000 destinations", 0), ("500 events/s for 1,000 beside a hung one", 100_000)]
    {
        let work = Work::Trickle { per_second: 500, seconds: 30, many: true, hanging };
        all.push(Scenario { name: name.into(), workers: 1, work });
    }
    all.push(Scenario { name: "idle, defaults".into(), workers: 1, work: Work::Idle { seconds: 20 } });
    let open = Work::Open { requests: 10_000 };
    all.push(Scenario { name: "10,000 requests open for 60 s".into(), workers: 1, work: open });
    let held = Work::Held { leases: 100_000, seconds: 60 };
    for (name, open) in [("10 minutes of full load", false), ("10 minutes beside an open transaction", true)]
    {
        let work = Work::Endless { open, seconds: 600 };
        all.push(Scenario { name: name.into(), workers: 1, work });
    }
    all.push(Scenario { name: "100,000 leases held".into(), workers: 1, work: held });
    all
}

/// Settings of the drains, tuned by trying a few; the rest is measured with the defaults.
const DRAIN: [(&str, &str); 4] = [
    ("LEASEHOLD_MAX_IN_FLIGHT", "32"),
    ("LEASEHOLD_CLAIM_BATCH", "500"),
    // Two cores are full with the database and the receiver: a second thread is woken and put aside all the time.
    ("TOKIO_WORKER_THREADS", "1"),
    // Enough for a batch that is being claimed, one that is sent and one that is settled.
    ("LEASEHOLD_MAX_LEASED", "1500"),
];

/// Requests to the one destination of the drains; twice as many leases may be held for it.
const CAP: u32 = 1_000;

const INSERT: &str = "
    insert into leasehold.outbox_events (event_id, event_type, destination_url, payload)
    select id, 'bench.event', $2, jsonb_build_object('id', id, 'pad', repeat('x', 448), 'type', 'bench.event')
    from unnest($1::text[]) as id";

/// Of the requests that stay open.
const OPEN: [(&str, &str); 5] = [
    ("LEASEHOLD_MAX_IN_FLIGHT", "10000"),
    ("LEASEHOLD_MAX_IN_FLIGHT_PER_DESTINATION", "10000"),
    ("LEASEHOLD_MAX_LEASED", "20000"),
    ("LEASEHOLD_LEASE", "10s"),
    ("LEASEHOLD_REQUEST_TIMEOUT", "2m"),
];

/// Of the leases that are held: behind a few requests that never end.
const HELD: [(&str, &str); 6] = [
    ("LEASEHOLD_LEASE", "30s"),
    ("LEASEHOLD_MAX_IN_FLIGHT", "64"),
    ("LEASEHOLD_MAX_IN_FLIGHT_PER_DESTINATION", "50000"),
    ("LEASEHOLD_MAX_LEASED", "100000"),
    ("LEASEHOLD_CLAIM_BATCH", "1000"),
    ("LEASEHOLD_REQUEST_TIMEOUT", "10m"),
];

fn leasehold(url: &str, arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?.with_file_name("leasehold"));
    command
        .args(arguments)
        .env_remove("LEASEHOLD_TEST_POSTGRES") // no setting of the program's
        .env("DATABASE_URL", url)
        .env("LEASEHOLD_SIGNING_SECRETS", "whsec_YmVuY2htYXJrIHNlY3JldCBvZiAzMiBieXRlcyEh")
        .env("LEASEHOLD_ALLOW_DESTINATIONS", "127.0.0.0/8,localhost")
        .env("LEASEHOLD_ALLOW_HTTP", "true")
        .env("LEASEHOLD_LOG", "warn")
        .stdout(Stdio::null())
        .kill_on_drop(true);
    Ok(command)
}

/// A URL like `server`'s with another database.
fn with_database(server: &str, name: &str) -> anyhow::Result<String> {
    let path = server.find("://").and_then(|at| server[at + 3..].find('/').map(|slash| at + 3 + slash + 1));
    let path = path.context("LEASEHOLD_TEST_POSTGRES names no database")?;
    let rest = server[path..].find('?').map_or("", |query| &server[path + query..]);
    Ok(format!("{}{name}{rest}", &server[..path]))
}

async fn insert(pool: &PgPool, ids: Vec<String>, url: &str) -> anyhow::Result<()> {
    sqlx::query(INSERT).bind(ids).bind(url).execute(pool).await?;
    Ok(())
}

fn percentile(sorted: &[i64], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |micros| *micros as f64 / 1_000.0)
}

const LEASED: &str = "select count(*) from leasehold.outbox_events where lease_owner is not null";

async fn until_held(pool: &PgPool, leases: u32) -> anyhow::Result<()> {
    while sqlx::query_scalar::<_, i64>(LEASED).fetch_one(pool).await? < i64::from(leases) {
        sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

/// Says how many of the heartbeats were HOT and how little any lease had left.
async fn watch_held(pool: &PgPool, leases: u32, seconds: u32) -> anyhow::Result<()> {
    let updates = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'outbox_events'";
    let left = "select extract(epoch from min(lease_until) - clock_timestamp())::float8
        from leasehold.outbox_events where lease_owner is not null";
    let mut least = f64::INFINITY;
    for _ in 0..seconds / 5 {
        sleep(Duration::from_secs(5)).await;
        least = least.min(sqlx::query_scalar(left).fetch_one(pool).await?);
    }
    let held: i64 = sqlx::query_scalar(LEASED).fetch_one(pool).await?;
    ensure!(held == i64::from(leases), "{held} of {leases} leases are held");
    sleep(Duration::from_secs(1)).await;
    // From the start: sessions publish what they did up to ten seconds later. Each event was claimed once, which is not HOT.
    let (all, hot): (i64, i64) = sqlx::query_as(updates).fetch_one(pool).await?;
    let heartbeats = all - i64::from(leases);
    eprintln!(
        "{heartbeats} heartbeats, {:.1} % HOT; at least {least:.1} s left of a lease",
        100.0 * hot as f64 / heartbeats as f64
    );
    Ok(())
}

/// Says how many deliveries a second came in each minute, and how large the queue is after it, with its indexes.
async fn watch_endless(
    pool: &PgPool,
    ok: &str,
    receiver: &Receiver,
    open: bool,
    seconds: u32,
) -> anyhow::Result<()> {
    const BACKLOG: u64 = 20_000;
    let mut other = pool.begin().await?;
    if open {
        sqlx::raw_sql(
            "set transaction isolation level repeatable read; select count(*) from leasehold.outbox_events",
        )
        .execute(&mut *other)
        .await?;
    }
    let (mut inserted, mut delivered) = (0, 0);
    for minute in 1..=seconds / 60 {
        let (start, before) = (Instant::now(), delivered);
        while start.elapsed() < Duration::from_secs(60) {
            delivered += receiver.take().requests;
            if inserted < delivered + BACKLOG {
                let ids = (inserted..inserted + BACKLOG / 4).map(|k| format!("event_{k}")).collect();
                insert(pool, ids, ok).await?;
                inserted += BACKLOG / 4;
            }
            sleep(Duration::from_millis(100)).await;
        }
        let rate = (delivered - before) as f64 / start.elapsed().as_secs_f64();
        let size = "select pg_total_relation_size('leasehold.outbox_events')";
        let size: i64 = sqlx::query_scalar(size).fetch_one(pool).await?;
        eprintln!("minute {minute}: {rate:.0} deliveries/s, {} MiB", size >> 20);
    }
    other.rollback().await?;
    Ok(())
}

async fn kill(workers: &mut Vec<Child>) -> anyhow::Result<()> {
    for mut worker in workers.drain(..) {
        worker.kill().await?;
    }
    Ok(())
}

impl Scenario {
    /// Whether it takes much longer than the others.
    pub(crate) fn is_long(&self) -> bool {
        matches!(self.work, Work::Endless { .. })
    }

    pub(crate) async fn run(&self, server: &str, receiver: &Receiver) -> anyhow::Result<Figures> {
        let admin = PgPool::connect(server).await?;
        for sql in [
            "drop database if exists leasehold_bench (force)",
            "create database leasehold_bench",
            "checkpoint",
        ] {
            sqlx::raw_sql(sql).execute(&admin).await?;
        }
        admin.close().await;
        let url = with_database(server, "leasehold_bench")?;
        let migrated = leasehold(&url, &["migrate"])?.status().await?;
        ensure!(migrated.success(), "migrate failed");
        let pool = PgPool::connect(&url).await?;
        let ok = format!("http://{}/ok", receiver.address);
        if let Work::Drain { hanging, .. } | Work::Trickle { hanging, .. } = self.work {
            // The destination that hangs comes first.
            let ids = (0..hanging).map(|k| format!("hung_{k}")).collect();
            insert(&pool, ids, &format!("http://localhost:{}/hang", receiver.address.port())).await?;
        }
        if let Work::Drain { events, .. } = self.work {
            insert(&pool, (0..events).map(|k| format!("event_{k}")).collect(), &ok).await?;
            sqlx::raw_sql("analyze leasehold.outbox_events").execute(&pool).await?;
        }
        if let Work::Open { requests: events } | Work::Held { leases: events, .. } = self.work {
            let path = if let Work::Open { .. } = self.work { "minute" } else { "hang" };
            let ids = (0..events).map(|k| format!("event_{k}")).collect();
            insert(&pool, ids, &format!("http://{}/{path}", receiver.address)).await?;
        }
        receiver.take();

        let postmaster = measure::postmaster(&pool).await?;
        let mut workers: Vec<Child> = Vec::new();
        for _ in 0..self.workers {
            let mut worker = leasehold(&url, &["run"])?;
            match self.work {
                Work::Drain { cap, .. } => {
                    worker.envs(DRAIN).env("LEASEHOLD_MAX_IN_FLIGHT_PER_DESTINATION", cap.to_string());
                    if cap < CAP {
                        // Or one destination could take all of it.
                        worker.env("LEASEHOLD_MAX_IN_FLIGHT", (8 * cap).to_string());
                    }
                    &mut worker
                }
                Work::Open { .. } => worker.envs(OPEN),
                Work::Held { .. } => worker.envs(HELD),
                Work::Endless { .. } => {
                    worker.envs(DRAIN).env("LEASEHOLD_MAX_IN_FLIGHT_PER_DESTINATION", CAP.to_string())
                }
                _ => &mut worker,
            };
            workers.push(worker.spawn().context("leasehold lies beside this program: build both")?);
        }
        let ids: Vec<u32> = workers.iter().filter_map(Child::id).collect();
        match self.work {
            Work::Drain { .. } | Work::Open { .. } | Work::Endless { .. } => {}
            // They sleep by then.
            Work::Trickle { .. } | Work::Idle { .. } => sleep(Duration::from_secs(3)).await,
            Work::Held { leases, .. } => until_held(&pool, leases).await?,
        }
        let before = (
            measure::workers_cpu(&ids),
            measure::postgres_cpu(postmaster),
            measure::transactions(&pool).await?,
        );
        let (start, began) = (Instant::now(), now());
        let arrivals = self.work(&pool, &ok, receiver).await?;
        let seconds = start.elapsed().as_secs_f64();
        let worker_cpu = measure::workers_cpu(&ids) - before.0;
        let postgres_cpu = measure::postgres_cpu(postmaster) - before.1;
        let memory_mib = ids.iter().map(|id| measure::memory(*id)).fold(0.0, f64::max);
        let by_second = matches!(self.work, Work::Idle { .. } | Work::Held { .. } | Work::Endless { .. });
        if !by_second {
            // Their looks for more would count as statements of what is done.
            kill(&mut workers).await?;
        }
        // The statistics of a session are published as it ends, or a second after it fell idle.
        sleep(Duration::from_millis(1_500)).await;
        let statements = measure::transactions(&pool).await? - before.2;
        kill(&mut workers).await?;
        pool.close().await;

        if by_second {
            // By the second, not by the delivery.
            return Ok(Figures {
                per_second: 0.0,
                p50_ms: f64::NAN,
                p99_ms: f64::NAN,
                worker_cpu: worker_cpu / seconds,
                postgres_cpu: postgres_cpu / seconds,
                memory_mib,
                statements: statements / (seconds + 1.5),
            });
        }
        let delivered = arrivals.first.len() as f64;
        let last = arrivals.first.values().max().copied().unwrap_or(began);
        let mut latencies: Vec<i64> = match self.work {
            Work::Trickle { .. } => {
                let sent = |id: &str| id.rsplit('_').next().and_then(|micros| micros.parse::<i64>().ok());
                arrivals.first.iter().filter_map(|(id, at)| Some(at - sent(id)?)).collect()
            }
            _ => Vec::new(),
        };
        latencies.sort_unstable();
        Ok(Figures {
            per_second: delivered / ((last - began) as f64 / 1e6),
            p50_ms: percentile(&latencies, 50),
            p99_ms: percentile(&latencies, 99),
            worker_cpu: worker_cpu * 1_000.0 / delivered,
            postgres_cpu: postgres_cpu * 1_000.0 / delivered,
            memory_mib,
            statements: statements / delivered,
        })
    }

    /// Waits until everything that can be delivered is, and settled.
    async fn work(&self, pool: &PgPool, ok: &str, receiver: &Receiver) -> anyhow::Result<Arrivals> {
        let events = match self.work {
            Work::Drain { events, .. } => events,
            Work::Trickle { per_second, seconds, many, .. } => {
                let start = Instant::now();
                for k in 0..per_second * seconds {
                    sleep_until(start + Duration::from_secs(1) * k / per_second).await;
                    let url = if many { format!("http://{}/ok", receiver.destination(k)) } else { ok.into() };
                    insert(pool, vec![format!("event_{k}_{}", now())], &url).await?;
                }
                per_second * seconds
            }
            Work::Idle { seconds } => {
                sleep(Duration::from_secs(u64::from(seconds))).await;
                return Ok(receiver.take());
            }
            Work::Open { requests } => requests,
            Work::Endless { open, seconds } => {
                watch_endless(pool, ok, receiver, open, seconds).await?;
                return Ok(receiver.take());
            }
            Work::Held { leases, seconds } => {
                watch_held(pool, leases, seconds).await?;
                return Ok(receiver.take());
            }
        };
        let until = Instant::now() + Duration::from_secs(300);
        let delivered = "select count(*) from leasehold.outbox_events where delivery_status = 'delivered'";
        let mut arrivals = Arrivals::default();
        loop {
            let more = receiver.take();
            arrivals.requests += more.requests;
            for (id, at) in more.first {
                arrivals.first.entry(id).or_insert(at);
            }
            // To count reads the whole table: not before the last one has come.
            if arrivals.first.len() >= events as usize
                && sqlx::query_scalar::<_, i64>(delivered).fetch_one(pool).await? >= i64::from(events)
            {
                ensure!(
                    arrivals.requests == u64::from(events),
                    "{} requests for {events} events",
                    arrivals.requests
                );
                let reclaims: i64 =
                    sqlx::query_scalar("select coalesce(sum(reclaims), 0) from leasehold.outbox_events")
                        .fetch_one(pool)
                        .await?;
                ensure!(reclaims == 0, "{reclaims} reclaims");
                return Ok(arrivals);
            }
            ensure!(
                Instant::now() < until,
                "{} of {events} events came in five minutes",
                arrivals.first.len()
            );
            sleep(if let Work::Open { .. } = self.work {
                Duration::from_secs(1)
            } else {
                Duration::from_millis(20)
            })
            .await;
        }
    }
}
