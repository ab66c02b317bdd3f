//! The commands, each from its settings to its exit code.

use std::fmt;
use std::future::Future;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::time::timeout;

use super::enqueue::{EnqueueError, EnqueueLine, EnqueueRules, from_flags, from_ndjson};
use super::settings::{Origin, Settings};
use super::store::{COMMAND_TIMEOUT, Store};
use super::{Command, EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EnqueueArgs, Invocation, run, telemetry};
use crate::adapters::store::{NewEvent, Status, StoreError};

/// How often `status --watch` looks.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How long counts of the outbox are waited for: all of it is read.
pub(crate) const STATUS_TIMEOUT: Duration = Duration::from_secs(300);

/// Nobody reads standard output any more, as with `| head -1`: no mistake, but no reason to go on.
#[derive(Debug)]
struct NoReader;

impl fmt::Display for NoReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for NoReader {}

/// Writes a line to standard output. Not by `println!`, which panics where it can't.
pub(crate) fn print(line: impl fmt::Display) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => NoReader.into(),
        _ => anyhow::Error::new(error).context("writing to standard output"),
    })
}

/// Writes a line to standard error. Not by `eprintln!`, for the same reason; nowhere else could it be said.
pub fn complain(line: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Does what was asked for.
///
/// # Errors
/// What went wrong at work: exit code 1.
pub async fn execute(invocation: &Invocation) -> anyhow::Result<ExitCode> {
    match dispatch(invocation).await {
        Err(error) if error.is::<NoReader>() => Ok(EXIT_DONE.into()),
        ended => ended,
    }
}

async fn dispatch(invocation: &Invocation) -> anyhow::Result<ExitCode> {
    let settings = match invocation.settings() {
        Some(Ok(settings)) => Some(settings),
        Some(Err(error)) => {
            complain(error);
            return Ok(EXIT_USAGE.into());
        }
        None => None,
    };
    match (&invocation.command, settings) {
        (Command::Demo { postgres, plain }, _) => {
            // Dropped, it takes its processes and its folder along.
            until_signalled(async {
                let held = crate::demo::run(*postgres, *plain).await?;
                Ok(if held { EXIT_DONE } else { EXIT_FAILED }.into())
            })
            .await
        }
        (_, None) => bail!("this command needs settings"),
        (Command::Run { until_empty }, Some(settings)) => {
            let log = telemetry::init(&settings.log).map_err(anyhow::Error::from_boxed);
            let _written_at_the_end = log.context("starting the log")?;
            run::run(settings, *until_empty).await
        }
        (Command::Migrate, Some(settings)) => {
            open(&settings, true).await?.migrate().await?;
            print("the outbox is set up")?;
            Ok(EXIT_DONE.into())
        }
        (Command::Enqueue(args), Some(settings)) => enqueue(args, &settings).await,
        (Command::Status { json, watch }, Some(settings)) => {
            until_signalled(status(&settings, *json, *watch)).await
        }
        (Command::Check, Some(settings)) => check(&settings).await,
    }
}

/// The first process of a container ends by no signal that it doesn't listen to.
async fn until_signalled(
    command: impl Future<Output = anyhow::Result<ExitCode>>,
) -> anyhow::Result<ExitCode> {
    tokio::select! {
        ended = command => ended,
        signal = run::signalled() => Ok((128 + signal?).into()),
    }
}

async fn open(settings: &Settings, create: bool) -> anyhow::Result<Store> {
    let url = settings.database.as_ref().context("database_url is not set")?;
    let max_payload = u64::from(settings.max_payload);
    Ok(Store::open(url, None, max_payload, settings.prepared_statements, create).await?)
}

async fn enqueue(args: &EnqueueArgs, settings: &Settings) -> anyhow::Result<ExitCode> {
    let rules = EnqueueRules { max_attempts: settings.max_attempts, max_payload: settings.max_payload };
    let lines: Vec<EnqueueLine> = match from_flags(args, rules) {
        Ok(Some(line)) => vec![line],
        // Wrong flags are bad usage, and a wrong line is a failure at work.
        Err(error) => {
            complain(format_args!("leasehold: {error}"));
            return Ok(EXIT_USAGE.into());
        }
        Ok(None) => {
            if io::stdin().is_terminal() {
                complain("reading one JSON object a line from standard input");
            }
            from_ndjson(io::stdin().lock(), rules).collect::<Result<_, _>>()?
        }
    };
    let (numbers, events): (Vec<_>, Vec<_>) =
        lines.into_iter().map(|event| (event.line, NewEvent::from(event))).unzip();
    let ids = open(settings, false).await?.enqueue(&events).await.map_err(|error| match error {
        StoreError::Refused { place, problem } => {
            EnqueueError { line: numbers.get(place).copied().flatten(), problem }.into()
        }
        error => anyhow::Error::new(error),
    })?;
    for id in ids {
        print(id).context("printing the ids; the events are in the outbox")?;
    }
    Ok(EXIT_DONE.into())
}

impl From<EnqueueLine> for NewEvent {
    fn from(line: EnqueueLine) -> Self {
        Self {
            event_id: line.event_id,
            event_type: line.event_type,
            destination_url: line.destination_url,
            payload: line.payload,
            max_attempts: Some(line.max_attempts),
            next_attempt_at: line.next_attempt_at.map(|time| time.as_micros()),
        }
    }
}

async fn status(settings: &Settings, json: bool, watch: bool) -> anyhow::Result<ExitCode> {
    let store = open(settings, false).await?;
    loop {
        let status = timeout(STATUS_TIMEOUT, store.status(STATUS_TIMEOUT)).await;
        let status =
            status.with_context(|| format!("the database gave no status within {STATUS_TIMEOUT:?}"))??;
        if json {
            print(status_json(&status))?;
        } else {
            print(status_text(&status))?;
        }
        if !watch {
            return Ok(EXIT_DONE.into());
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

pub(super) fn status_json(status: &Status) -> serde_json::Value {
    serde_json::json!({
        "pending": status.pending,
        "due": status.due,
        "retrying": status.retrying,
        "leased": status.leased,
        "delivered": status.delivered,
        "failed": status.failed,
        "oldest_due_age_seconds": status.oldest_due_age_seconds,
    })
}

fn status_text(status: &Status) -> String {
    let age = status.oldest_due_age_seconds.map_or_else(|| "-".to_owned(), |age| format!("{age:.1} s"));
    format!(
        "pending {} (due {}, leased {}, retrying {})  delivered {}  failed {}  oldest due {age}",
        status.pending, status.due, status.leased, status.retrying, status.delivered, status.failed
    )
}

/// Says what the settings mean, what to think over, and whether the database fits.
async fn check(settings: &Settings) -> anyhow::Result<ExitCode> {
    for (name, value, origin) in &settings.shown {
        let origin = match origin {
            Origin::Default => "",
            Origin::File => "  (file)",
            Origin::Environment => "  (environment)",
            Origin::Flag => "  (flag)",
        };
        print(format_args!("{name:<30} {value}{origin}"))?;
    }
    print("")?;
    let timing = settings.worker.timing();
    print(format_args!(
        "a held lease is renewed at the latest every {:?}; a request without renewal is aborted {:?} after it; a dead \
         worker's events are taken over after {:?}",
        timing.heartbeat(),
        timing.lease().saturating_sub(timing.fence_margin()),
        timing.lease().saturating_add(timing.reclaim_grace())
    ))?;
    for warning in warnings(settings) {
        print(format_args!("warning: {warning}"))?;
    }
    if let Some(warning) = run::raise_descriptors(u64::from(settings.worker.limits().max_in_flight))? {
        print(format_args!("warning: {warning}"))?;
    }
    let store = open(settings, false).await?;
    print(format_args!("database: {}", answer(store.describe()).await??))?;
    answer(store.check_schema()).await??;
    print("schema: up to date")?;
    answer(store.rehearse()).await?.map_err(|fault| anyhow!("a worker could not claim: {fault}"))?;
    print("a worker can claim")?;
    if let Some(lacks) = answer(store.lacks_to_retire(settings.retain)).await?? {
        print(format_args!(
            "warning: delivered events stay in the outbox against what retain says: the worker's role lacks {lacks}"
        ))?;
    }
    Ok(EXIT_DONE.into())
}

/// What a database answers in time.
async fn answer<T>(call: impl Future<Output = T>) -> anyhow::Result<T> {
    let answer = timeout(COMMAND_TIMEOUT, call).await;
    answer.with_context(|| format!("the database did not answer within {COMMAND_TIMEOUT:?}"))
}

fn warnings(settings: &Settings) -> Vec<String> {
    let (timing, limits) = (settings.worker.timing(), settings.worker.limits());
    let mut warnings = Vec::new();
    let patience = limits.drain_timeout.saturating_sub(timing.store_timeout() * 2);
    if settings.http.request_timeout > patience {
        warnings.push(format!(
            "request_timeout ({:?}) is longer than drain_timeout less twice store_timeout ({patience:?}): a drain may \
             have to abort requests",
            settings.http.request_timeout
        ));
    }
    if limits.max_in_flight_per_destination >= limits.max_in_flight {
        warnings.push(format!(
            "max_in_flight_per_destination ({}) is no less than max_in_flight ({}): one destination that hangs takes every \
             request, and all others wait for it",
            limits.max_in_flight_per_destination, limits.max_in_flight
        ));
    }
    if settings.http.allow_http {
        warnings.push("allow_http is on: payloads and signatures travel in the clear".to_owned());
    }
    if settings.http.secrets.iter().any(crate::adapters::http::Secret::is_weak) {
        warnings
            .push("a signing secret is shorter than the 24 bytes that Standard Webhooks asks for".to_owned());
    }
    if let Some(problem) = crate::adapters::http::platform_problem() {
        warnings.push(format!(
            "https destinations can't be verified, so that nothing can be sent there: {problem}"
        ));
    }
    warnings
}
