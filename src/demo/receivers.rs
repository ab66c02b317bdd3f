//! The demo's receivers: each behaves badly in its own way and writes down every request that it sees.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::adapters::http::Signer;

/// How a receiver behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Manner {
    /// Answers at once.
    Quick,
    /// Takes longer than the lease.
    Slow(Duration),
    /// Refuses the first attempt of every event.
    Flaky,
    /// Never answers the first attempt.
    Hanging,
}

impl Manner {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Slow(_) => "slow",
            Self::Flaky => "flaky",
            Self::Hanging => "hanging",
        }
    }
}

/// One request as its receiver saw it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) manner: Manner,
    pub(super) opened: Instant,
    /// When its response was complete or the worker's side closed the socket.
    pub(super) closed: Option<Instant>,
    pub(super) status: Option<u16>,
    pub(super) token: i64,
}

/// All requests, by event id.
#[derive(Clone, Debug, Default)]
pub(super) struct Record(Arc<Mutex<State>>);

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) requests: BTreeMap<String, Vec<Seen>>,
    /// Requests that were not signed as they should be.
    pub(super) bad: u64,
}

impl Record {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, manner: Manner, event: &str, token: i64) -> Open {
        let mut state = self.state();
        let seen = state.requests.entry(event.to_owned()).or_default();
        seen.push(Seen { manner, opened: Instant::now(), closed: None, status: None, token });
        Open { record: self.clone(), event: event.to_owned(), index: seen.len() - 1 }
    }
}

/// A request that is open until this is dropped: when its response is on the way, or when the connection is gone.
struct Open {
    record: Record,
    event: String,
    index: usize,
}

impl Open {
    fn answer(&self, status: StatusCode) {
        let mut state = self.record.state();
        if let Some(seen) = state.requests.get_mut(&self.event).and_then(|seen| seen.get_mut(self.index)) {
            seen.status = Some(status.as_u16());
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.record.state();
        if let Some(seen) = state.requests.get_mut(&self.event).and_then(|seen| seen.get_mut(self.index)) {
            seen.closed = Some(Instant::now());
        }
    }
}

/// Starts a receiver on a free loopback port. It runs until the runtime ends.
pub(super) async fn start(
    manner: Manner,
    record: Record,
    signer: Arc<Signer>,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let (record, signer) = (record.clone(), Arc::clone(&signer));
            tokio::spawn(async move {
                let service =
                    service_fn(move |request| receive(manner, record.clone(), Arc::clone(&signer), request));
                // A connection that breaks is the worker's abort or its death; the record has it.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    Ok(address)
}

async fn receive(
    manner: Manner,
    record: Record,
    signer: Arc<Signer>,
    request: Request<Incoming>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let header = |name: &str| {
        request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned()
    };
    let (event, timestamp, signature) =
        (header("webhook-id"), header("webhook-timestamp"), header("webhook-signature"));
    let attempt: u32 = header("webhook-attempt").parse().unwrap_or(0);
    let open = record.open(manner, &event, header("webhook-lease-token").parse().unwrap_or(0));
    let body =
        request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    if timestamp.parse().ok().map(|timestamp| signer.sign(&event, timestamp, &body)) != Some(signature) {
        record.state().bad += 1;
    }
    match manner {
        Manner::Quick => {}
        Manner::Slow(time) => sleep(time).await,
        Manner::Hanging if attempt <= 1 => std::future::pending().await,
        Manner::Flaky if attempt <= 1 => return Ok(answer(&open, StatusCode::SERVICE_UNAVAILABLE)),
        Manner::Flaky | Manner::Hanging => sleep(Duration::from_millis(5)).await,
    }
    Ok(answer(&open, StatusCode::NO_CONTENT))
}

fn answer(open: &Open, status: StatusCode) -> Response<Empty<Bytes>> {
    open.answer(status);
    let mut response = Response::new(Empty::new());
    *response.status_mut() = status;
    response
}
