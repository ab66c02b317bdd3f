//! `leasehold demo`: the promise, watched. Receivers that misbehave, three workers as real processes, one of them
//! killed in the middle, and a verdict from what the receivers and the table recorded.

mod postgres;
mod postgres_binaries;
mod receivers;
mod verdict;
mod view;

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use self::receivers::{Manner, Record};
use self::verdict::{Takeover, Verdict};
use self::view::View;
use crate::adapters::http::{Secret, Signer};
use crate::adapters::store::NewEvent;
use crate::cli::commands::{STATUS_TIMEOUT, print};
use crate::cli::settings::DatabaseUrl;
use crate::cli::store::Store;
use crate::machine::{LeaseKey, WorkerId};

const LEASE: Duration = Duration::from_secs(3);
const SLOW: Duration = Duration::from_secs(5);
const WORKERS: usize = 3;
const CRASH_AFTER: Duration = Duration::from_millis(2_500);
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// The receivers and how many events each gets.
const CAST: [(Manner, usize); 4] =
    [(Manner::Quick, 90), (Manner::Slow(SLOW), 24), (Manner::Flaky, 30), (Manner::Hanging, 6)];

/// Runs the demo. `plain` forces plain lines on a terminal.
///
/// # Errors
/// When something that the demo needs can't be had, with what to do about it.
pub async fn run(on_postgres: bool, plain: bool) -> anyhow::Result<bool> {
    let folder =
        tempfile::Builder::new().prefix("leasehold-demo-").tempdir().context("no temporary folder")?;
    let server = if on_postgres { Some(postgres::start(folder.path()).await?) } else { None };
    let url = server.as_ref().map_or_else(
        || format!("sqlite://{}", folder.path().join("outbox.db").display()),
        |server| server.url().to_owned(),
    );
    let kind = if on_postgres { "a private Postgres" } else { "an embedded SQLite file, synced to disk" };
    print("leasehold demo")?;
    print(format_args!("  outbox      {kind} (production runs on Postgres)"))?;
    print(format_args!("  lease       {LEASE:?}; the slow receiver takes {SLOW:?}"))?;
    print(format_args!(
        "  workers     {WORKERS} processes; one is killed with SIGKILL after {CRASH_AFTER:?}"
    ))?;
    print("")?;
    let verdict = play(&url, folder.path(), View::new(plain)).await?;
    print(&verdict)?;
    if let Some(server) = server {
        server.stop().await;
    }
    if !verdict.held() {
        let kept = folder.keep();
        print(format_args!("the workers' logs are kept in {}", kept.display()))?;
    }
    Ok(verdict.held())
}

async fn play(url: &str, folder: &Path, mut view: View) -> anyhow::Result<Verdict> {
    let mut entropy = [0; 32];
    getrandom::fill(&mut entropy).context("no entropy for a signing secret")?;
    let secret = format!("whsec_{}", STANDARD.encode(entropy));
    let own: Secret = secret.parse().context("the demo's own secret")?;
    let signer = Arc::new(Signer::new(&[own]).context("the demo's own secret")?);

    let address = DatabaseUrl::parse(url).context("the demo's own database")?;
    let store = Store::open(&address, None, 1 << 20, true, true).await?;
    store.migrate().await?;
    let record = Record::default();
    let mut events = Vec::new();
    for (manner, count) in CAST {
        let address = receivers::start(manner, record.clone(), Arc::clone(&signer)).await?;
        events.extend((0..count).map(|number| (manner, number, address)));
    }
    // Mixed, so that every claim meets every receiver.
    events.sort_by_key(|(manner, number, _)| (*number, *manner));
    let new: Vec<NewEvent> = events
        .iter()
        .enumerate()
        .map(|(index, (manner, _, address))| NewEvent {
            event_id: Some(format!("demo-{:04}", index + 1)),
            event_type: format!("demo.{}", manner.name()),
            destination_url: format!("http://{address}/{}", manner.name()),
            payload: format!("{{\"number\":{},\"receiver\":\"{}\"}}", index + 1, manner.name()),
            max_attempts: None,
            next_attempt_at: None,
        })
        .collect();
    store.enqueue(&new).await?;
    view.say(&format!("{} events committed to the outbox", new.len()))?;

    let mut workers = Vec::new();
    for number in 1..=WORKERS {
        workers.push(start_worker(number, url, &secret, folder)?);
    }
    let takeover = watch(&mut view, &mut workers, &store, &record, folder, new.len()).await?;
    let status = store.status(STATUS_TIMEOUT).await?;
    let verdict = Verdict::compute(new.len(), &record.state(), status, takeover, LEASE);
    view.finish()?;
    Ok(verdict)
}

fn log_path(folder: &Path, number: usize) -> std::path::PathBuf {
    folder.join(format!("worker-{number}.log"))
}

fn start_worker(number: usize, url: &str, secret: &str, folder: &Path) -> anyhow::Result<Child> {
    let log = File::create(log_path(folder, number)).context("no log file for a worker")?;
    let program = std::env::current_exe().context("where this program lies")?;
    let settings = [
        ("WORKER_NAME", format!("demo-{number}")),
        ("LEASE", format!("{}s", LEASE.as_secs())),
        ("MAX_IN_FLIGHT", "16".into()),
        ("MAX_IN_FLIGHT_PER_DESTINATION", "4".into()),
        ("CLAIM_BATCH", "16".into()),
        ("POLL_INTERVAL", "100ms".into()),
        ("REQUEST_TIMEOUT", "7s".into()),
        ("RETRY_INITIAL", "500ms".into()),
        ("ALLOW_DESTINATIONS", "127.0.0.0/8".into()),
        ("ALLOW_HTTP", "true".into()),
        ("SIGNING_SECRETS", secret.into()),
        ("LOG_FORMAT", "json".into()),
    ];
    // Nothing of the environment or the working folder may leak in.
    Command::new(program)
        .args(["run", "--until-empty"])
        .env_clear()
        .env("DATABASE_URL", url)
        .envs(settings.map(|(name, value)| (format!("LEASEHOLD_{name}"), value)))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("a second handle of a log file")?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .context("a worker could not be started")
}

/// The worker's id, from the first line of its log that names it.
async fn worker_id(folder: &Path, number: usize) -> anyhow::Result<WorkerId> {
    let path = log_path(folder, number);
    for _ in 0..200 {
        let log = tokio::fs::read_to_string(&path).await.unwrap_or_default();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let id = lines.filter_map(|line| Some(line.get("worker")?.as_str()?.to_owned())).next();
        if let Some(id) = id {
            return Ok(WorkerId::new(id));
        }
        sleep(Duration::from_millis(50)).await;
    }
    bail!("worker {number} did not start: {}", tokio::fs::read_to_string(&path).await.unwrap_or_default())
}

/// Watches until every event is terminal, and kills one worker on the way.
async fn watch(
    view: &mut View,
    workers: &mut [Child],
    store: &Store,
    record: &Record,
    folder: &Path,
    events: usize,
) -> anyhow::Result<Takeover> {
    let victim = WORKERS / 2;
    let victim_id = worker_id(folder, victim + 1).await?;
    let start = Instant::now();
    let mut orphans: Option<Vec<LeaseKey>> = None;
    loop {
        let status = store.status(STATUS_TIMEOUT).await?;
        view.show(start.elapsed(), &record.state(), &status, events)?;
        if status.pending == 0 {
            break;
        }
        if start.elapsed() > GIVE_UP_AFTER {
            view.say("gave up waiting")?;
            break;
        }
        if orphans.is_none() && start.elapsed() >= CRASH_AFTER {
            workers[victim].start_kill().context("the worker could not be killed")?;
            workers[victim].wait().await.context("waiting for the killed worker")?;
            let held =
                store.leases_of(victim_id.clone()).await.map_err(|fault| anyhow::anyhow!("{fault}"))?;
            view.say(&format!("worker {} killed (SIGKILL) while it held {} events", victim + 1, held.len()))?;
            orphans = Some(held);
        }
        sleep(Duration::from_millis(100)).await;
    }
    for (number, worker) in workers.iter_mut().enumerate().filter(|(number, _)| *number != victim) {
        match tokio::time::timeout(Duration::from_secs(10), worker.wait()).await {
            Ok(Ok(status)) if status.success() => {}
            other => view.say(&format!("worker {} ended badly: {other:?}", number + 1))?,
        }
    }
    let orphans = orphans.unwrap_or_default();
    let state = record.state();
    let taken = orphans.iter().filter(|key| {
        let id = format!("demo-{:04}", key.row.0);
        state.requests.get(&id).is_some_and(|seen| {
            seen.iter().any(|seen| seen.token > key.token.0 && seen.status.is_some_and(|status| status < 300))
        })
    });
    Ok(Takeover { orphans: orphans.len(), taken_over: taken.count() })
}
