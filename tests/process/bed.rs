//! A database of a test's own, workers as processes, and a receiver that writes down what it sees.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use sqlx::{Connection, Executor, PgConnection, PgPool};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::sleep;

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
pub(crate) const MS: Duration = Duration::from_millis(1);
/// Long enough for any machine; reaching it means that something hangs.
const PATIENCE: Duration = Duration::from_secs(90);

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

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold"));
        command
            .args(arguments)
            .env_clear()
            .env("DATABASE_URL", &self.url)
            .envs(self.settings.iter().map(|(name, value)| (format!("LEASEHOLD_{name}"), value)))
            .current_dir(self.folder.path())
            .kill_on_drop(true);
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
        let path = self.folder.path().join(format!("{name}.log"));
        let log = std::fs::File::create(&path).expect("a log file");
        let arguments: Vec<&str> = std::iter::once("run").chain(arguments.iter().copied()).collect();
        let child = self
            .command(&arguments)
            .env("LEASEHOLD_WORKER_NAME", name)
            .env("LEASEHOLD_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        Worker { child, log: path }
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

pub(crate) struct Worker {
    pub(crate) child: Child,
    log: std::path::PathBuf,
}

impl Worker {
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        rustix::process::kill_process(pid.expect("still running"), signal).expect("a signal to an own child");
    }

    /// Waits for its end; returns the exit code.
    pub(crate) async fn end(&mut self) -> Option<i32> {
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        status.expect("the worker ends").expect("it was started").code()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) async fn logs(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} in the log:\n{}", self.log());
            sleep(20 * MS).await;
        }
    }
}

/// One request as the receiver saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) event: String,
    pub(crate) attempt: u32,
    pub(crate) token: i64,
    pub(crate) opened: Instant,
    pub(crate) closed: Option<Instant>,
    pub(crate) answered: bool,
}

/// What a receiver answers to an attempt: after a while, with a status.
pub(crate) type Manner = Arc<dyn Fn(u32) -> (Duration, u16) + Send + Sync>;

#[derive(Clone)]
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

struct Open {
    receiver: Receiver,
    index: usize,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.receiver.seen.lock().expect("no panic")[self.index].closed = Some(Instant::now());
    }
}

impl Receiver {
    pub(crate) async fn start(manner: impl Fn(u32) -> (Duration, u16) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let receiver = Self { address: listener.local_addr().expect("bound"), seen: Arc::default() };
        let (accepting, manner) = (receiver.clone(), Arc::new(manner) as Manner);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (receiver, manner) = (accepting.clone(), Arc::clone(&manner));
                tokio::spawn(async move {
                    let service =
                        service_fn(move |request| receiver.clone().receive(Arc::clone(&manner), request));
                    let io = TokioIo::new(stream);
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                });
            }
        });
        receiver
    }

    async fn receive(
        self,
        manner: Manner,
        request: Request<Incoming>,
    ) -> Result<Response<Empty<Bytes>>, Infallible> {
        let header = |name: &str| {
            let value = request.headers().get(name).unwrap_or_else(|| panic!("no header {name}"));
            value.to_str().expect("ASCII").to_owned()
        };
        let attempt = header("webhook-attempt").parse().expect("a number");
        let seen = Seen {
            event: header("webhook-id"),
            attempt,
            token: header("webhook-lease-token").parse().expect("a number"),
            opened: Instant::now(),
            closed: None,
            answered: false,
        };
        let open = {
            let mut all = self.seen.lock().expect("no panic");
            all.push(seen);
            Open { receiver: self.clone(), index: all.len() - 1 }
        };
        request.into_body().collect().await.ok();
        let (takes, status) = manner(attempt);
        sleep(takes).await;
        self.seen.lock().expect("no panic")[open.index].answered = true;
        let mut response = Response::new(Empty::new());
        *response.status_mut() = StatusCode::from_u16(status).expect("a status");
        Ok(response)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }

    /// The requests of each event, in the order of their arrival.
    pub(crate) fn by_event(&self) -> BTreeMap<String, Vec<Seen>> {
        let mut events: BTreeMap<String, Vec<Seen>> = BTreeMap::new();
        for seen in self.seen() {
            events.entry(seen.event.clone()).or_default().push(seen);
        }
        events
    }

    pub(crate) async fn until_seen(&self, count: usize) {
        let start = Instant::now();
        while self.seen().len() < count {
            assert!(start.elapsed() < PATIENCE, "only {} of {count} requests came", self.seen().len());
            sleep(5 * MS).await;
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
