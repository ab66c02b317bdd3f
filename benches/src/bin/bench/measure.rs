//! What one run cost: CPU and memory from /proc, statements from Postgres.

use std::fs;

use sqlx::postgres::PgPool;

/// Clock ticks a second in /proc, on every Linux there is.
const TICKS: f64 = 100.0;

/// The figures of one run, or the medians of several. What a scenario doesn't measure is `NaN`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Seconds for 1,000 deliveries.
    pub(crate) worker_cpu: f64,
    pub(crate) postgres_cpu: f64,
    /// The largest worker.
    pub(crate) memory_mib: f64,
    pub(crate) statements: f64,
}

pub(crate) fn medians(runs: &[Figures]) -> Figures {
    let of = |field: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Figures {
        per_second: of(|run| run.per_second),
        p50_ms: of(|run| run.p50_ms),
        p99_ms: of(|run| run.p99_ms),
        worker_cpu: of(|run| run.worker_cpu),
        postgres_cpu: of(|run| run.postgres_cpu),
        memory_mib: of(|run| run.memory_mib),
        statements: of(|run| run.statements),
    }
}

/// Seconds of CPU of a process, and of its children that ended if `whole`.
fn cpu(process: u32, whole: bool) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let fields: Vec<f64> = stat
        .rsplit_once(')')?
        .1
        .split_whitespace()
        .skip(1)
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    let ticks =
        fields.get(10)? + fields.get(11)? + if whole { fields.get(12)? + fields.get(13)? } else { 0.0 };
    Some(ticks / TICKS)
}

/// Seconds of CPU of the workers.
pub(crate) fn workers_cpu(workers: &[u32]) -> f64 {
    workers.iter().filter_map(|worker| cpu(*worker, false)).sum()
}

/// The most memory that a process ever had, in MiB.
pub(crate) fn memory(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1_024.0
}

/// Seconds of CPU of the server: the postmaster, what it has running, and what ended.
pub(crate) fn postgres_cpu(postmaster: u32) -> f64 {
    let parent = |process: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let children = ids.filter(|id| parent(*id) == Some(postmaster)).filter_map(|id| cpu(id, false));
    children.sum::<f64>() + cpu(postmaster, true).unwrap_or(0.0)
}

/// The postmaster of a server on this machine.
pub(crate) async fn postmaster(pool: &PgPool) -> anyhow::Result<u32> {
    let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(pool).await?;
    let stat = fs::read_to_string(format!("/proc/{backend}/stat"))?;
    let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
    Ok(parent.unwrap_or_default().parse()?)
}

/// Transactions of the database so far; each call of a worker is one.
pub(crate) async fn transactions(pool: &PgPool) -> anyhow::Result<f64> {
    let sql = "select (xact_commit + xact_rollback)::float8 from pg_stat_database where datname = current_database()";
    Ok(sqlx::query_scalar(sql).fetch_one(pool).await?)
}
