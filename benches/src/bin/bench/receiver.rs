//! Answers `/ok` at once, `/minute` after one and `/hang` never, and remembers when each event came first.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// What came in: microseconds of the Unix epoch by event id, and requests in all. Those that hang are not in it.
#[derive(Default)]
pub(crate) struct Arrivals {
    pub(crate) first: HashMap<String, i64>,
    pub(crate) requests: u64,
}

#[derive(Clone)]
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    arrivals: Arc<Mutex<Arrivals>>,
}

pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

impl Receiver {
    pub(crate) fn take(&self) -> Arrivals {
        std::mem::take(&mut self.arrivals.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, event: &str, at: i64) {
        let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.requests += 1;
        arrivals.first.entry(event.to_owned()).or_insert(at);
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Empty<Bytes>>, Infallible> {
        let at = now();
        let (head, body) = request.into_parts();
        if head.uri.path() == "/hang" {
            return std::future::pending().await;
        }
        let minute = head.uri.path() == "/minute";
        let _ = body.collect().await; // a worker that was killed
        let event = head.headers.get("webhook-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        self.note(event, at);
        if minute {
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        Ok(Response::new(Empty::new()))
    }
}

/// Serves on a thread of its own until the program ends.
pub(crate) async fn start() -> anyhow::Result<Receiver> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    listener.set_nonblocking(true)?;
    let receiver = Receiver { address: listener.local_addr()?, arrivals: Arc::default() };
    let serving = receiver.clone();
    std::thread::spawn(move || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                let receiver = serving.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| receiver.clone().answer(request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        })
    });
    Ok(receiver)
}
