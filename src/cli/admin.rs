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

/// How long a client may take to say what it wants.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);

/// How long a request for counts waits for the first of them.
const COUNTED_WITHIN: Duration = Duration::from_secs(10);

/// Counting takes a tenth of the time at the most, whoever asks how often.
const COUNT_SHARE: u32 = 10;

const PAGE: &str = include_str!("admin.html");

/// The last count of the outbox.
#[derive(Clone, Debug)]
struct Counted {
    at: Instant,
    status: Status,
}

/// What is shown.
pub(super) struct Admin {
    worker: WorkerId,
    metrics: Metrics,
    registry: Registry,
    store: Store,
    /// Somebody wants to know the counts.
    asked: Notify,
    counted: watch::Sender<Option<Result<Counted, String>>>,
}

impl Admin {
    /// Of one worker.
    pub(super) fn new(worker: WorkerId, metrics: Metrics, store: Store) -> Self {
        let registry = metrics.registry(&worker);
        Self { worker, metrics, registry, store, asked: Notify::new(), counted: watch::Sender::new(None) }
    }

    /// Listens.
    ///
    /// # Errors
    /// When the address is not to be had.
    pub(super) async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
        let listener = TcpListener::bind(address).await;
        listener.with_context(|| format!("admin_addr: {address} can't be listened at"))
    }

    /// Answers until it is dropped.
    pub(super) async fn serve(self, listener: TcpListener) {
        let admin = Arc::new(self);
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&admin).count());
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            while tasks.try_join_next().is_some() {}
            let Ok(seat) = Arc::clone(&room).acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                // As when the process has no file descriptor left.
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let admin = Arc::clone(&admin);
            tasks.spawn(async move {
                let service = service_fn(|request| {
                    let admin = Arc::clone(&admin);
                    async move { Ok::<_, Infallible>(admin.answer(&request).await) }
                });
                let mut server = http1::Builder::new();
                server.timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
                // A client that breaks off is no matter of this worker's.
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
                drop(seat);
            });
        }
    }

    async fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if !["/", "/healthz", "/readyz", "/metrics", "/api/status"].contains(&path) {
            return plain(
                StatusCode::NOT_FOUND,
                "there are /, /healthz, /readyz, /metrics and /api/status\n",
            );
        }
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        match path {
            // A worker that can't go on ends, so that one which answers lives.
            "/healthz" => plain(StatusCode::OK, "alive\n"),
            "/readyz" => match self.problem() {
                None => plain(StatusCode::OK, "ready\n"),
                Some(problem) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
            },
            "/metrics" => self.scrape(),
            "/api/status" => self.status().await,
            _ => response(StatusCode::OK, "text/html; charset=utf-8", PAGE),
        }
    }

    /// Why the worker takes no events.
    fn problem(&self) -> Option<&'static str> {
        match () {
            () if self.metrics.draining() => Some("draining: it takes no more events"),
            () if !self.metrics.store_answers() => Some("the database does not answer"),
            () => None,
        }
    }

    /// As counted last, since who scrapes waits for no count.
    fn scrape(&self) -> Response<Full<Bytes>> {
        self.asked.notify_one();
        if let Some(Ok(counted)) = &*self.counted.borrow() {
            self.metrics.counted(&counted.status);
        }
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => {
                response(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", text)
            }
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    async fn status(&self) -> Response<Full<Bytes>> {
        self.asked.notify_one();
        let mut counted = self.counted.subscribe();
        let counted = timeout(COUNTED_WITHIN, counted.wait_for(Option::is_some)).await;
        let counted = match counted {
            Ok(Ok(counted)) => counted.clone(),
            _ => None,
        };
        let counted = counted.unwrap_or_else(|| Err(format!("not counted within {COUNTED_WITHIN:?}")));
        let worker = json!({
            "id": self.worker.as_str(),
            "version": env!("CARGO_PKG_VERSION"),
            "problem": self.problem(),
            "leases_held": self.metrics.leases(),
            "requests_open": self.metrics.requests(),
        });
        let (code, body) = match counted {
            Ok(counted) => {
                let mut body = status_json(&counted.status);
                body["counted_seconds_ago"] = json!(counted.at.elapsed().as_secs_f64());
                body["worker"] = worker;
                (StatusCode::OK, body)
            }
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": error, "worker": worker })),
        };
        response(code, "application/json", body.to_string())
    }

    /// Counts the outbox whenever somebody asked.
    async fn count(self: Arc<Self>) {
        loop {
            self.asked.notified().await;
            let began = Instant::now();
            let status = match timeout(STATUS_TIMEOUT, self.store.status()).await {
                Ok(status) => status.map_err(|error| error.to_string()),
                Err(_) => Err(format!("the database gave no status within {STATUS_TIMEOUT:?}")),
            };
            self.counted.send_replace(Some(status.map(|status| Counted { at: began, status })));
            sleep((began.elapsed() * (COUNT_SHARE - 1)).max(Duration::from_millis(500))).await;
        }
    }
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
