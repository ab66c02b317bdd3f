//! A little TCP server that speaks only as much HTTP as a test needs.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// The least that keeps a connection alive.
pub(crate) const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Bytes,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        let mut values = self.headers.iter().filter(|(key, _)| key == name);
        let (_, value) = values.next().unwrap_or_else(|| panic!("no {name} in {:?}", self.headers));
        assert!(values.next().is_none(), "{name} twice");
        value
    }
}

/// The requests that came, in order.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Request>>>);

impl Log {
    pub(crate) fn push(&self, request: Request) {
        self.0.lock().unwrap().push(request);
    }
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Connections accepted.
    pub(crate) connections: Arc<AtomicUsize>,
    /// Connections done with.
    pub(crate) finished: Arc<AtomicUsize>,
    log: Log,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Runs `handle` for each connection.
    pub(crate) async fn with<F, Fut>(handle: F) -> Self
    where
        F: Fn(TcpStream, Log) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, finished, log) =
            (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default(), Log::default());
        let (accepted, ended, requests) = (connections.clone(), finished.clone(), log.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                accepted.fetch_add(1, SeqCst);
                let (work, ended) = (handle(stream, requests.clone()), ended.clone());
                tokio::spawn(async move {
                    work.await;
                    ended.fetch_add(1, SeqCst);
                });
            }
        });
        Self { address, connections, finished, log, task }
    }

    /// Answers every request with the same bytes, until the client closes; closes itself after an answer that says
    /// nothing of its length.
    pub(crate) async fn answering(
        answer: impl Fn(&Request) -> Vec<u8> + Clone + Send + Sync + 'static,
    ) -> Self {
        Self::with(move |mut stream, log| {
            let answer = answer.clone();
            async move {
                while let Some(request) = read_request(&mut stream).await {
                    let bytes = answer(&request);
                    log.push(request);
                    if stream.write_all(&bytes).await.is_err() || bytes != OK.as_bytes() {
                        break;
                    }
                }
            }
        })
        .await
    }

    pub(crate) fn url(&self, rest: &str) -> String {
        format!("http://{}{rest}", self.address)
    }

    /// How many requests were logged.
    pub(crate) fn requests(&self) -> usize {
        self.log.0.lock().unwrap().len()
    }

    /// The request that came last.
    pub(crate) fn request(&self) -> Request {
        self.log.0.lock().unwrap().last().expect("a request").clone()
    }

    /// Resolves once every connection is done with.
    pub(crate) async fn ended(&self) {
        let ended = async {
            while self.finished.load(SeqCst) < self.connections.load(SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), ended).await.expect("every connection comes to an end");
    }
}

/// The next request with its whole body; `None` at the end of the stream.
pub(crate) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let text = String::from_utf8(head).unwrap();
    let mut lines = text.trim_end().split("\r\n");
    let line = lines.next().unwrap().to_owned();
    let headers: Vec<(String, String)> = lines
        .map(|line| line.split_once(": ").map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap())
        .collect();
    let length = headers.iter().find(|(name, _)| name == "content-length").unwrap().1.parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request { line, headers, body: body.into() })
}
