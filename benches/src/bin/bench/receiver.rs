//! Answers `/ok` at once, `/minute` after one and `/hang` never, and remembers when each event came first.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
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

/// It listens on that many addresses beside its own: so many destinations are healthy.
const DESTINATIONS: u32 = 1_000;

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
    /// The address of the destination of an event, in turn.
    pub(crate) fn destination(&self, event: u32) -> SocketAddr {
        let [.., high, low] = (event % DESTINATIONS + 1).to_be_bytes();
        SocketAddr::from((Ipv4Addr::new(127, 1, high, low), self.address.port()))
    }

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

    async fn accept(self, listener: TcpListener) -> std::io::Result<()> {
        loop {
            let (stream, _) = listener.accept().await?;
            let _ = stream.set_nodelay(true);
            let receiver = self.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| receiver.clone().answer(request));
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }
}

/// Serves on a thread of its own until the program ends.
pub(crate) async fn start() -> anyhow::Result<Receiver> {
    let listen = |address| -> std::io::Result<std::net::TcpListener> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    let first = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let receiver = Receiver { address: first.local_addr()?, arrivals: Arc::default() };
    let mut listeners = vec![first];
    for event in 0..DESTINATIONS {
        listeners.push(listen(receiver.destination(event))?);
    }
    let serving = receiver.clone();
    std::thread::spawn(move || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut accepting = tokio::task::JoinSet::new();
            for listener in listeners {
                accepting.spawn(serving.clone().accept(TcpListener::from_std(listener)?));
            }
            while let Some(ended) = accepting.join_next().await {
                ended??;
            }
            Ok(())
        })
    });
    Ok(receiver)
}
