//! leasehold in the convention of a peer benchmark: DATABASE_URL, RECEIVER_URL, WEBHOOK_SECRET, N, MODE (drain or
//! latency), RATE, DURATION. Prints READY once the events are committed, DONE once all are settled.

use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use sqlx::postgres::{PgConnectOptions, PgPool};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, sleep_until};

/// Tuned by trying a few; every other setting is the default.
const SETTINGS: [(&str, &str); 5] = [
    ("LEASEHOLD_MAX_IN_FLIGHT", "32"),
    ("LEASEHOLD_MAX_IN_FLIGHT_PER_DESTINATION", "1000"),
    ("LEASEHOLD_CLAIM_BATCH", "500"),
    ("LEASEHOLD_MAX_LEASED", "1500"),
    ("TOKIO_WORKER_THREADS", "1"),
];

fn var(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())
}

fn worker(url: &str, arguments: &[&str], latency: bool) -> anyhow::Result<Child> {
    let program = std::env::current_exe()?.with_file_name("leasehold");
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("DATABASE_URL", url)
        .env("LEASEHOLD_SIGNING_SECRETS", var("WEBHOOK_SECRET", ""))
        .env("LEASEHOLD_ALLOW_DESTINATIONS", "127.0.0.0/8")
        .env("LEASEHOLD_ALLOW_HTTP", "true")
        .env("LEASEHOLD_LOG", var("LOG", "warn"))
        .stdout(Stdio::null())
        .kill_on_drop(true);
    // Latency is measured with the defaults.
    if !latency {
        for (name, value) in SETTINGS {
            command.env(name, var(name, value));
        }
    }
    command.spawn().context("leasehold lies beside this program: build both")
}

/// Events whose body the database prints as 512 bytes of JSON.
const INSERT: &str = r#"
    insert into leasehold.outbox_events (event_id, event_type, destination_url, payload)
    select id, 'bench.event', $3, jsonb_build_object('id', id, 'pad', repeat('x', 512 - 44 - length(id)), 'type', 'bench.event')
    from (select coalesce($2, 'evt_' || k) as id from generate_series(0, $1 - 1) as k) as event"#;

/// Whether any event is pending, as `run --until-empty` asks.
const PENDING: &str = include_str!("../../../src/adapters/postgres/pending.sql");

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("DATABASE_URL").context("DATABASE_URL")?;
    let target = std::env::var("RECEIVER_URL").context("RECEIVER_URL")?;
    let latency = var("MODE", "drain") == "latency";
    let mut migrate = worker(&url, &["migrate"], latency)?;
    ensure!(migrate.wait().await?.success(), "migrate failed");
    // A probe of the outbox must not read all of it.
    let pool =
        PgPool::connect_with(url.parse::<PgConnectOptions>()?.options([("enable_seqscan", "off")])).await?;
    // It waits for events as a dispatcher does, so that no figure counts how a process starts.
    let mut running = worker(&url, &["run"], latency)?;
    sleep(Duration::from_secs(1)).await;
    if latency {
        println!("READY");
        let (rate, seconds): (f64, f64) = (var("RATE", "200").parse()?, var("DURATION", "10").parse()?);
        let start = Instant::now();
        for k in 0..(rate * seconds) as u32 {
            sleep_until(start + Duration::from_secs_f64(f64::from(k) / rate)).await;
            let id = format!("evt_{k}_{}", SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros());
            sqlx::query(INSERT).bind(1_i32).bind(id).bind(&target).execute(&pool).await?;
        }
    } else {
        let events: i32 = var("N", "20000").parse()?;
        sqlx::query(INSERT).bind(events).bind(None::<String>).bind(&target).execute(&pool).await?;
        println!("READY");
    }
    while sqlx::query_scalar::<_, bool>(PENDING).fetch_one(&pool).await? {
        ensure!(running.try_wait()?.is_none(), "the worker ended");
        sleep(Duration::from_millis(10)).await;
    }
    println!("DONE");
    running.kill().await?;
    Ok(())
}
