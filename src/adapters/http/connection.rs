//! One HTTP/1.1 connection, and the pool of idle ones.
//!
//! A connection is driven by whoever uses it, inside `send` itself, and never by a task of its own: dropping it closes
//! its socket before the drop returns, which is what rule P4 counts as the end of an open request. An idle connection
//! is polled by nobody; whether the other side has closed it is seen when it is taken out of the pool.

use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// How long a connection may be idle: less than the 5 s after which the least patient servers in wide use close it, so
/// that a request rarely meets a connection that is being closed, which would cost it an attempt.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// At most so many idle connections are kept in all, beside those with a request. One origin has no more of them than
/// requests may be open to one destination.
pub const IDLE_IN_ALL: usize = 512;
/// How long a body is read for, to reuse the connection.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest response head.
const HEAD_CAP: usize = 64 * 1024;

/// A TCP stream that is reset, not closed in order, when it is dropped while a request is open: what the kernel still
/// has of an aborted request must not trickle on to a slow receiver.
pub(super) struct Socket {
    stream: TcpStream,
    open: Arc<AtomicBool>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, open: Arc::new(AtomicBool::new(true)) }
    }

    /// Whether a request is open on it, shared.
    pub(super) fn open_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.open)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.open.load(Ordering::Relaxed) {
            let _ = self.stream.set_zero_linger(); // fails only on a socket that is gone already
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A request with its whole body. It passes through many hands, too.
pub(super) type Outgoing = Box<Request<Full<Bytes>>>;

/// A plain or a TLS stream.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection with at most one request on it. It passes through many hands, so that its parts stay where they are.
pub(super) struct Connection(Box<Parts>);

struct Parts {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: http1::Connection<TokioIo<Box<dyn Stream>>, Full<Bytes>>,
    driver_ended: bool,
    open: Arc<AtomicBool>,
}

impl Connection {
    /// `open` is the socket's flag.
    pub(super) async fn new(stream: Box<dyn Stream>, open: Arc<AtomicBool>) -> Result<Self, hyper::Error> {
        let (sender, driver) =
            http1::Builder::new().max_buf_size(HEAD_CAP).handshake(TokioIo::new(stream)).await?;
        Ok(Self(Box::new(Parts { sender, driver, driver_ended: false, open })))
    }

    /// Sends a request and waits for the response's head.
    pub(super) async fn send(&mut self, request: Outgoing) -> Result<Response<Incoming>, hyper::Error> {
        let Parts { sender, driver, driver_ended, .. } = &mut *self.0;
        let mut response = pin!(sender.send_request(*request));
        poll_fn(|cx| {
            // `drive` can't be called while `response` borrows the sender.
            if !*driver_ended {
                *driver_ended = Pin::new(&mut *driver).poll(cx).is_ready();
            }
            response.as_mut().poll(cx)
        })
        .await
    }

    /// Reads a body to its end, up to `cap` bytes and for at most a second. Gives the connection back if it can take
    /// another request; else its socket is closed.
    pub(super) async fn drain(mut self, mut body: Incoming, cap: usize) -> Option<Self> {
        let whole = async {
            let mut left = cap;
            loop {
                let frame = poll_fn(|cx| {
                    self.0.drive(cx);
                    Pin::new(&mut body).poll_frame(cx)
                });
                match frame.await {
                    None => return true,
                    Some(Err(_)) => return false,
                    Some(Ok(frame)) => match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                        Some(rest) => left = rest,
                        None => return false,
                    },
                }
            }
        };
        let whole = timeout(DRAIN_TIMEOUT, whole).await.unwrap_or(false);
        (whole && self.is_ready().await).then_some(self)
    }

    /// Whether the next request can be written right now. Sees it if the other side has closed the connection.
    async fn is_ready(&mut self) -> bool {
        poll_fn(|cx| {
            self.0.drive(cx);
            Poll::Ready(!self.0.driver_ended && matches!(self.0.sender.poll_ready(cx), Poll::Ready(Ok(()))))
        })
        .await
    }
}

impl Parts {
    /// Lets the connection read and write. Its errors reach whoever waits for a response or a body.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if !self.driver_ended {
            self.driver_ended = Pin::new(&mut self.driver).poll(cx).is_ready();
        }
    }
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// The idle connections.
#[derive(Clone, Default)]
pub(super) struct Pool(Arc<Mutex<Shelf>>);

#[derive(Default)]
struct Shelf {
    /// By scheme and authority.
    idle: HashMap<Arc<str>, Vec<Idle>>,
    count: usize,
    /// Whether a sweeper is at work. There is one only while something is idle.
    swept: bool,
}

impl Pool {
    /// The connection that was used last, if one is still good.
    pub(super) async fn take(&self, origin: &str) -> Option<Connection> {
        loop {
            let Idle { mut connection, since } = lock(&self.0).pop(origin)?;
            connection.0.open.store(true, Ordering::Relaxed);
            if since.elapsed() < IDLE_TIMEOUT && connection.is_ready().await {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection for the next request, if there is room.
    pub(super) fn put(&self, origin: &Arc<str>, connection: Connection) {
        connection.0.open.store(false, Ordering::Relaxed);
        let mut shelf = lock(&self.0);
        if shelf.count >= IDLE_IN_ALL {
            return;
        }
        shelf.idle.entry(Arc::clone(origin)).or_default().push(Idle { connection, since: Instant::now() });
        shelf.count += 1;
        if !std::mem::replace(&mut shelf.swept, true) {
            tokio::spawn(sweep(Arc::downgrade(&self.0)));
        }
    }
}

impl Shelf {
    fn pop(&mut self, origin: &str) -> Option<Idle> {
        let idle = self.idle.get_mut(origin)?.pop()?;
        self.count -= 1;
        Some(idle)
    }

    /// Closes what has been idle for too long.
    fn sweep(&mut self) {
        self.idle.retain(|_, idle| {
            idle.retain(|idle| idle.since.elapsed() < IDLE_TIMEOUT);
            !idle.is_empty()
        });
        self.count = self.idle.values().map(Vec::len).sum();
    }
}

async fn sweep(shelf: Weak<Mutex<Shelf>>) {
    loop {
        tokio::time::sleep(IDLE_TIMEOUT / 2).await;
        let Some(shelf) = shelf.upgrade() else { return };
        let mut shelf = lock(&shelf);
        shelf.sweep();
        if shelf.count == 0 {
            shelf.swept = false;
            return;
        }
    }
}

/// Nothing under this lock can leave it half done, so that a panic elsewhere is no reason to stop.
fn lock(shelf: &Mutex<Shelf>) -> MutexGuard<'_, Shelf> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}
