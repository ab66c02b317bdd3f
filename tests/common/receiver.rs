//! A receiver that writes down every request.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use super::{MS, PATIENCE};

/// One request as the receiver saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) event: String,
    pub(crate) attempt: u32,
    pub(crate) token: i64,
    pub(crate) opened: Instant,
    pub(crate) closed: Option<Instant>,
    /// The status that was answered; [`HANG_UP`] stands for none.
    pub(crate) answered: Option<u16>,
}

/// A manner's status for closing the connection without an answer.
pub(crate) const HANG_UP: u16 = 0;

/// The next connection. An error is of one that is gone already, or there are too many for the moment.
pub(crate) async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(_) => sleep(10 * MS).await,
        }
    }
}

/// What a receiver answers: after a while, with a status.
type Manner = Arc<dyn Fn(&Seen) -> (Duration, u16) + Send + Sync>;

#[derive(Clone)]
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

struct Open {
    receiver: Receiver,
    index: usize,
}

impl Open {
    fn answer(&self, status: u16) {
        self.receiver.seen.lock().expect("no panic")[self.index].answered = Some(status);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.receiver.seen.lock().expect("no panic")[self.index].closed = Some(Instant::now());
    }
}

impl Receiver {
    pub(crate) async fn start(manner: impl Fn(&Seen) -> (Duration, u16) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let receiver = Self { address: listener.local_addr().expect("bound"), seen: Arc::default() };
        let (accepting, manner) = (receiver.clone(), Arc::new(manner) as Manner);
        tokio::spawn(async move {
            loop {
                let stream = accept(&listener).await;
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
    ) -> Result<Response<Empty<Bytes>>, std::io::Error> {
        let header = |name: &str| {
            let value = request.headers().get(name).unwrap_or_else(|| panic!("no header {name}"));
            value.to_str().expect("ASCII").to_owned()
        };
        let seen = Seen {
            event: header("webhook-id"),
            attempt: header("webhook-attempt").parse().expect("a number"),
            token: header("webhook-lease-token").parse().expect("a number"),
            opened: Instant::now(),
            closed: None,
            answered: None,
        };
        let (takes, status) = manner(&seen);
        let open = {
            let mut all = self.seen.lock().expect("no panic");
            all.push(seen);
            Open { receiver: self.clone(), index: all.len() - 1 }
        };
        request.into_body().collect().await.ok();
        sleep(takes).await;
        open.answer(status);
        if status == HANG_UP {
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
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
        while self.seen.lock().expect("no panic").len() < count {
            assert!(start.elapsed() < PATIENCE, "only {} of {count} requests came", self.seen().len());
            sleep(5 * MS).await;
        }
    }
}
