//! What a worker shows of itself over HTTP at `admin_addr`: health, metrics, counts of the outbox, and a page for people.
//!
//! Nothing here is in the way of a delivery: it reads, and what it asks the database is bounded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::prometheus_text;
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::commands::{STATUS_TIMEOUT, status_json};
use super::store::Store;
use crate::adapters::store::Status;
use crate::adapters::telemetry::metrics::Metrics;
use crate::machine::WorkerId;

/// Whoever holds connections open here takes no more of the process's file descriptors than this.
const MOST_CONNECTIONS: usize = 16;

/// How long a client may take to say what it wants,
const HEADERS_WITHIN: Duration = Duration::from_secs(5);

/// and to have its answer.
const ANSWERED_WITHIN: Duration = Duration::from_secs(20);

/// How long a request for counts waits for new ones, if those there are are
const COUNTED_WITHIN: Duration = Duration::from_secs(10);

/// older than this.
const OLD: Duration = Duration::from_secs(60);

/// Counting takes a tenth of the time at the most, whoever asks how often.
const COUNT_SHARE: u32 = 10;

/// The pause after a count: at least this,
const LEAST_PAUSE: Duration = Duration::from_secs(1);

/// and after one that failed within as much time at most. One that had to be given up would be the same again.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(10);

const PAGE: &str = include_str!("admin.html");

/// Listens.
///
/// # Errors
/// When the address is not to be had.
pub(super) async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("admin_addr: {address} can't be listened at"))
}

/// The last count of the outbox.
#[derive(Clone, Debug)]
struct Counted {
    at: Instant,
    status: Result<Status, String>,
}

/// What is shown.
pub(super) struct Admin {
    worker: WorkerId,
    metrics: Metrics,
    registry: Registry,
    store: Store,
    /// Somebody wants to know the counts.
    asked: Notify,
    counted: watch::Sender<Option<Counted>>,
}

impl Admin {
    /// Of one worker.
    pub(super) fn new(worker: WorkerId, metrics: Metrics, store: Store) -> Self {
        let registry = metrics.registry(&worker);
        Self { worker, metrics, registry, store, asked: Notify::new(), counted: watch::Sender::new(None) }
    }

    /// Answers until it is dropped.
    pub(super) async fn serve(self, listener: TcpListener) {
        let admin = Arc::new(self);
        tokio::join!(Arc::clone(&admin).count(), admin.accept(listener));
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(seat) = Arc::clone(&room).acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                // As when the process has no file descriptor left.
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let admin = Arc::clone(&self);
            connections.spawn(async move {
                let service = service_fn(|request| {
                    let admin = Arc::clone(&admin);
                    async move { Ok::<_, Infallible>(admin.answer(&request).await) }
                });
                let mut server = http1::Builder::new();
                server.timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN).keep_alive(false);
                // A client that breaks off, or takes no answer, is no matter of this worker's.
                let _ =
                    timeout(ANSWERED_WITHIN, server.serve_connection(TokioIo::new(stream), service)).await;
                drop(seat);
            });
        }
    }

    async fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let reads = [Method::GET, Method::HEAD].contains(request.method());
        match request.uri().path() {
            "/" | "/healthz" | "/readyz" | "/metrics" | "/api/status" if !reads => {
                let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
                refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
                refused
            }
            "/" => response(StatusCode::OK, "text/html; charset=utf-8", PAGE),
            "/healthz" => plain(StatusCode::OK, "alive\n"),
            "/readyz" => match self.problem() {
                None => plain(StatusCode::OK, "ready\n"),
                Some(problem) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
            },
            "/metrics" => self.scrape(),
            "/api/status" => self.status().await,
            _ => plain(StatusCode::NOT_FOUND, "there are /, /healthz, /readyz, /metrics and /api/status\n"),
        }
    }

    /// Why the worker takes no events.
    fn problem(&self) -> Option<&'static str> {
        if self.metrics.draining() {
            Some("draining: it takes no more events")
        } else if self.metrics.store_fails() {
            Some("the database does not answer")
        } else if !self.metrics.claims_work() {
            Some("no claim was answered yet, or the last one was refused: the log says why")
        } else {
            None
        }
    }

    /// As counted last, since who scrapes waits for no count.
    fn scrape(&self) -> Response<Full<Bytes>> {
        self.asked.notify_one();
        let mut text = String::new();
        match prometheus_text::encode(&mut text, &self.registry) {
            Ok(()) => response(StatusCode::OK, prometheus_text::CONTENT_TYPE, text),
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    async fn status(&self) -> Response<Full<Bytes>> {
        self.asked.notify_one();
        let mut counts = self.counted.subscribe();
        let fresh = |last: &Option<Counted>| last.as_ref().is_some_and(|counted| counted.at.elapsed() < OLD);
        let _ = timeout(COUNTED_WITHIN, counts.wait_for(fresh)).await;
        let counted = counts.borrow().clone();
        let (code, mut body) = match counted {
            Some(Counted { at, status: Ok(status) }) => {
                let mut body = status_json(&status);
                body["counted_seconds_ago"] = json!(at.elapsed().as_secs_f64());
                (StatusCode::OK, body)
            }
            Some(Counted { status: Err(error), .. }) => {
                (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": error }))
            }
            None => {
                let error = format!("not counted within {COUNTED_WITHIN:?}");
                (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": error }))
            }
        };
        body["worker"] = json!({
            "id": self.worker.as_str(),
            "version": env!("CARGO_PKG_VERSION"),
            "problem": self.problem(),
            "leases_held": self.metrics.leases(),
            "requests_open": self.metrics.requests(),
        });
        response(code, "application/json", body.to_string())
    }

    /// Counts the outbox whenever somebody asked.
    async fn count(self: Arc<Self>) {
        loop {
            // What nobody has asked for in a while is not shown as if it were new.
            while timeout(OLD, self.asked.notified()).await.is_err() {
                self.metrics.counted(None);
            }
            let began = Instant::now();
            let status = match timeout(STATUS_TIMEOUT, self.store.status(STATUS_TIMEOUT)).await {
                Ok(status) => status.map_err(|error| error.to_string()),
                Err(_) => Err(format!("the database gave no status within {STATUS_TIMEOUT:?}")),
            };
            let pause = pause(began.elapsed(), status.is_err());
            self.metrics.counted(status.as_ref().ok());
            self.counted.send_replace(Some(Counted { at: Instant::now(), status }));
            sleep(pause).await;
        }
    }
}

/// How long nothing is counted after a count that took this long.
fn pause(took: Duration, failed: bool) -> Duration {
    let pause = (took * (COUNT_SHARE - 1)).max(LEAST_PAUSE);
    if failed && took <= PAUSE_AFTER_FAILURE { pause.min(PAUSE_AFTER_FAILURE) } else { pause }
}

fn plain(code: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    response(code, "text/plain; charset=utf-8", text)
}

fn response(code: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_take_long_are_seldom_whether_they_fail_or_not() {
        let seconds = Duration::from_secs;
        for (took, failed, expected) in [
            (Duration::ZERO, false, LEAST_PAUSE),
            (seconds(2), false, seconds(18)),
            (seconds(300), false, seconds(2_700)),
            (Duration::ZERO, true, LEAST_PAUSE),
            // A database that is not to be reached answers again soon.
            (seconds(5), true, PAUSE_AFTER_FAILURE),
            // One that had to give up would begin the same anew.
            (seconds(270), true, seconds(2_430)),
        ] {
            assert_eq!(pause(took, failed), expected, "{took:?}, failed: {failed}");
        }
    }
}
