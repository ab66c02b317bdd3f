//! A database of a test's own, and workers on it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Instant;

use sqlx::{Connection, Executor, PgConnection, PgPool};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::sleep;

pub(crate) use crate::common::{MS, Receiver, SECRET};
use crate::common::{PATIENCE, Seen, Worker, leasehold, start_worker};

/// A database, migrated, and the settings that every worker on it gets.
pub(crate) struct Bed {
    pub(crate) url: String,
    pub(crate) pool: PgPool,
    pub(crate) folder: tempfile::TempDir,
    settings: BTreeMap<String, String>,
}

impl Bed {
    /// A fresh database with migrations applied by the binary.
    pub(crate) async fn new() -> Self {
        let bed = Self::unmigrated().await;
        let output = bed.leasehold(&["migrate"], None).await;
        assert!(output.status.success(), "migrate: {}", text(&output));
        bed
    }

    pub(crate) async fn unmigrated() -> Self {
        let server = std::env::var("LEASEHOLD_TEST_POSTGRES").expect(
            "LEASEHOLD_TEST_POSTGRES names no Postgres server for tests: run them through `.ci/postgres`, or set it",
        );
        let mut suffix = [0; 8];
        getrandom::fill(&mut suffix).expect("entropy");
        let name = format!("leasehold_process_{:016x}", u64::from_le_bytes(suffix));
        let mut admin = PgConnection::connect(&server).await.expect("the test server answers");
        admin
            .execute(sqlx::AssertSqlSafe(format!("create database {name}")))
            .await
            .expect("a database of its own");
        let mut url = url::Url::parse(&server).expect("a URL");
        url.set_path(&name);
        let pool = PgPool::connect(url.as_str()).await.expect("the new database answers");
        let settings = [
            ("SIGNING_SECRETS", SECRET),
            ("ALLOW_DESTINATIONS", "127.0.0.0/8"),
            ("ALLOW_HTTP", "true"),
            ("POLL_INTERVAL", "50ms"),
            ("RETRY_JITTER_BPS", "0"),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Self { url: url.into(), pool, folder: tempfile::tempdir().expect("a folder"), settings }
    }

    pub(crate) fn set(mut self, settings: &[(&str, &str)]) -> Self {
        for (name, value) in settings {
            self.settings.insert((*name).to_owned(), (*value).to_owned());
        }
        self
    }

    pub(crate) fn unset(&mut self, name: &str) {
        self.settings.remove(name);
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = leasehold(self.folder.path(), &self.url, &self.settings);
        command.args(arguments);
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn leasehold(&self, arguments: &[&str], stdin: Option<&str>) -> Output {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let mut input = child.stdin.take().expect("piped");
        // A command that ends without reading its input is no failure of the test.
        let _ = input.write_all(stdin.unwrap_or_default().as_bytes()).await;
        drop(input);
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
        output.expect("the command ends").expect("it was started")
    }

    /// Starts a worker whose log goes to `NAME.log` in the bed's folder.
    pub(crate) fn worker(&self, name: &str, arguments: &[&str]) -> Worker {
        let arguments: Vec<&str> = std::iter::once("run").chain(arguments.iter().copied()).collect();
        let mut command = self.command(&arguments);
        command.env("LEASEHOLD_LOG", "debug");
        start_worker(command, self.folder.path(), name)
    }

    /// Inserts events for one URL as an application would; returns their row ids.
    pub(crate) async fn insert(&self, url: &str, count: i32) -> Vec<i64> {
        sqlx::query_scalar(
            "insert into leasehold.outbox_events (event_type, destination_url, payload)
             select 'test.happened', $1, jsonb_build_object('number', n) from generate_series(1, $2) n returning id",
        )
        .bind(url)
        .bind(count)
        .fetch_all(&self.pool)
        .await
        .expect("an insert as the README has it")
    }

    pub(crate) async fn count(&self, condition: &str) -> i64 {
        let sql = format!("select count(*) from leasehold.outbox_events where {condition}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&self.pool).await.expect("a count")
    }

    pub(crate) async fn until(&self, condition: &str, count: i64) {
        let start = Instant::now();
        while self.count(condition).await != count {
            assert!(start.elapsed() < PATIENCE, "still not {count} rows with {condition}");
            sleep(20 * MS).await;
        }
    }
}

/// The most requests open at once for one event.
pub(crate) fn most_open(seen: &[Seen]) -> usize {
    let open = |at: Instant| {
        seen.iter()
            .filter(|other| other.opened <= at && other.closed.is_none_or(|closed| closed > at))
            .count()
    };
    seen.iter().map(|seen| open(seen.opened)).max().unwrap_or(0)
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub(crate) fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).expect("a file in the test's folder");
}
