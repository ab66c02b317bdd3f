//! `leasehold run`: one worker, its signals and its exit code.

use std::future::Future;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{info, warn};

use super::admin::{self, Admin};
use super::store::Store;
use super::{EXIT_DONE, EXIT_DRAIN, retain, settings::Settings};
use crate::adapters::clock::BootClock;
use crate::adapters::http::{HttpGateway, IDLE_IN_ALL};
use crate::adapters::store::{Retain, StoreError};
use crate::adapters::telemetry::Telemetry;
use crate::adapters::telemetry::metrics::Metrics;
use crate::driver::Driver;
use crate::machine::{Ended, WorkerId};
use crate::ports::Outbox;

const SIGINT: u8 = 2;
const SIGTERM: u8 = 15;

/// File descriptors beside one a connection: database, listener, log, runtime.
const SPARE_DESCRIPTORS: u64 = 64;

/// Runs a worker until it is told to end, or until nothing is pending.
///
/// # Errors
/// When it can't start, or a task of it panicked.
pub async fn run(mut settings: Settings, until_empty: bool) -> anyhow::Result<ExitCode> {
    // From the beginning: a signal that comes while the schema is looked at ends it as well.
    let mut shutdown = pin!(shutdown()?);
    let mut entropy = [0; 16];
    getrandom::fill(&mut entropy).context("no entropy for the worker id")?;
    let suffix = &entropy[..8];
    let suffix: String = suffix.iter().map(|byte| format!("{byte:02x}")).collect();
    let id = WorkerId::new(format!("{}-{suffix}", settings.worker_name));
    settings.worker.seed = entropy[8..].iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte));
    settings.worker.until_empty = until_empty;
    if let Some(warning) = raise_descriptors(u64::from(settings.worker.limits().max_in_flight))? {
        warn!("{warning}");
    }

    let timing = *settings.worker.timing();
    let url = settings.database.as_ref().context("database_url is not set")?;
    let store_timeout = Some(timing.store_timeout());
    let max_payload = u64::from(settings.max_payload);
    let store = Store::open(url, store_timeout, max_payload, settings.prepared_statements, false).await?;
    let gateway = HttpGateway::new(settings.http.clone())?;
    if let Some(problem) = gateway.tls_problem() {
        warn!(problem, "https destinations can't be verified");
    }
    info!(
        worker = id.as_str(),
        lease_ms = timing.lease().as_millis() as u64,
        heartbeat_ms = timing.heartbeat().as_millis() as u64,
        "worker started"
    );
    // Beside the worker: dropped, they end.
    let mut beside = JoinSet::new();
    let mut metrics = None;
    if let Some(address) = settings.admin_addr {
        let listener = admin::listen(address).await?;
        info!(address = %listener.local_addr().unwrap_or(address), "serving health, metrics and status");
        let shown = metrics.insert(Metrics::default()).clone();
        beside.spawn(Admin::new(id.clone(), shown, store.clone()).serve(listener));
    }
    // A database that is not there yet is no reason to end: the machine tries again. A missing schema is.
    let checked = tokio::select! {
        checked = timeout(timing.store_timeout(), store.check_schema()) => checked,
        () = &mut shutdown => {
            info!(worker = id.as_str(), "worker ended before it began");
            return Ok(EXIT_DONE.into());
        }
    };
    match checked {
        Ok(Err(error @ StoreError::Schema { .. })) => return Err(error.into()),
        Ok(Err(error)) => warn!(%error, "the schema could not be looked at; starting all the same"),
        Ok(Ok(())) | Err(_) => {}
    }
    if settings.retain != Retain::Keep {
        beside.spawn(retain::retire(store.clone(), settings.retain, timing.store_timeout()));
    }
    let gateway = Arc::new(gateway);
    let ended = match store {
        Store::Postgres(outbox) => drive(outbox, gateway, id.clone(), settings, metrics, shutdown).await?,
        Store::Sqlite(outbox) => drive(outbox, gateway, id.clone(), settings, metrics, shutdown).await?,
    };
    drop(beside);
    info!(worker = id.as_str(), aborted = ended.aborted, unsettled = ended.unsettled, "worker ended");
    let in_time = ended == Ended { aborted: 0, unsettled: 0 };
    Ok(if in_time { EXIT_DONE } else { EXIT_DRAIN }.into())
}

async fn drive<O: Outbox>(
    outbox: Arc<O>,
    gateway: Arc<HttpGateway>,
    id: WorkerId,
    settings: Settings,
    metrics: Option<Metrics>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<Ended> {
    let observer = (Telemetry::new(id.clone()), metrics);
    let driver = Driver { outbox, gateway, clock: Arc::new(BootClock::new()?), observer };
    Ok(driver.run(id, settings.worker, shutdown).await?)
}

/// Resolves at the first SIGTERM or SIGINT; the second one ends the process at once.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    let (mut term, mut int) = signals()?;
    Ok(async move {
        next(&mut term, &mut int).await;
        tokio::spawn(async move {
            let number = next(&mut term, &mut int).await;
            std::process::exit((128 + number).into());
        });
    })
}

/// The number of the first SIGTERM or SIGINT from now on.
pub(super) async fn signalled() -> anyhow::Result<u8> {
    let (mut term, mut int) = signals()?;
    Ok(next(&mut term, &mut int).await)
}

fn signals() -> anyhow::Result<(Signal, Signal)> {
    Ok((
        signal(SignalKind::terminate()).context("listening for SIGTERM")?,
        signal(SignalKind::interrupt()).context("listening for SIGINT")?,
    ))
}

async fn next(term: &mut Signal, int: &mut Signal) -> u8 {
    tokio::select! {
        _ = term.recv() => SIGTERM,
        _ = int.recv() => SIGINT,
    }
}

/// Raises the soft limit of open files as far as it goes: while it connects, a request has several sockets.
/// Answers what to think over.
pub(super) fn raise_descriptors(in_flight: u64) -> anyhow::Result<Option<String>> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let needed = in_flight + SPARE_DESCRIPTORS;
    let wanted = needed + IDLE_IN_ALL as u64;
    let mut limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(wanted);
    if most < needed {
        bail!(
            "max_in_flight needs {needed} file descriptors, but the hard limit is {most}: lower max_in_flight or raise the \
             limit (ulimit -n)"
        );
    }
    let warning = (most < wanted).then(|| {
        format!(
            "the hard limit of open files ({most}) leaves no room for all connections that are kept ({wanted}): requests \
             may fail; lower max_in_flight or raise the limit (ulimit -n)"
        )
    });
    let Some(current) = limit.current.filter(|current| *current < most) else { return Ok(warning) };
    limit.current = Some(most);
    match setrlimit(Resource::Nofile, limit) {
        Err(error) if current < needed => {
            Err(error).with_context(|| format!("raising the limit of open files to {most}"))
        }
        _ => Ok(warning),
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Resource, getrlimit, setrlimit};

    use super::*;

    #[test]
    fn open_files_are_limited_by_the_hard_limit_alone() {
        let mut limit = getrlimit(Resource::Nofile);
        let most = limit.maximum.unwrap_or(256 + IDLE_IN_ALL as u64 + SPARE_DESCRIPTORS);
        limit.current = Some(most.min(400));
        setrlimit(Resource::Nofile, limit).unwrap();
        raise_descriptors(256).unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, Some(most));
        assert!(limit.maximum.is_none_or(|hard| raise_descriptors(hard).is_err()));
    }
}
