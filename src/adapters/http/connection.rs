//! One HTTP/1.1 connection, and the pool of idle ones.
//!
//! A connection is driven by whoever uses it, inside `send` itself, and never by a task of its own: dropping it closes
//! its socket before the drop returns, which is what rule P4 counts as the end of an open request. An idle connection
//! is polled by nobody; whether the other side has closed it is seen when it is taken out of the pool.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// How long a connection may be idle: less than the 2 s after which the least patient servers in wide use close it, so
/// that a request rarely meets a connection that is being closed, which would cost it an attempt.
const IDLE_TIMEOUT: Duration = Duration::from_millis(1_500);
/// At most so many idle connections are kept in all, beside those with a request. One origin has no more of them than
/// requests may be open to one destination.
pub const IDLE_IN_ALL: usize = 512;
/// How long a body is read for, to reuse the connection.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest response head.
const HEAD_CAP: usize = 64 * 1024;
/// The most header fields of a response.
const MOST_FIELDS: usize = 1024;

/// How far a connection's request is, as its socket and its body see it.
#[derive(Default)]
pub(super) struct Progress {
    /// A request is open.
    open: AtomicBool,
    /// hyper has its body.
    taken: AtomicBool,
    /// And has written it whole: hyper and TLS flush a stream once they have nothing left to write.
    written: AtomicBool,
}

/// A TCP stream that is reset, not closed in order, when it is dropped while a request is open: what the kernel still
/// has of an aborted request must not trickle on to a slow receiver.
pub(super) struct Socket {
    stream: TcpStream,
    progress: Arc<Progress>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        let progress = Progress { open: AtomicBool::new(true), ..Progress::default() };
        Self { stream, progress: Arc::new(progress) }
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.progress.open.load(Ordering::Relaxed) {
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
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.progress.written.fetch_or(self.progress.taken.load(Ordering::Relaxed), Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A body that says when hyper has it.
struct Payload {
    body: Full<Bytes>,
    progress: Arc<Progress>,
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.progress.taken.store(self.body.is_end_stream(), Ordering::Relaxed);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request without an answer: why, and the request itself if none of it was written.
pub(super) type Unanswered = (hyper::Error, Option<Outgoing>);

/// A request with its whole body. It passes through many hands, too.
pub(super) type Outgoing = Box<Request<Full<Bytes>>>;

/// A plain or a TLS stream.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection with at most one request on it. It passes through many hands, so that its parts stay where they are.
pub(super) struct Connection(Box<Parts>);

struct Parts {
    sender: http1::SendRequest<Payload>,
    driver: Driver,
    progress: Arc<Progress>,
}

/// What lets a connection read and write.
#[allow(clippy::large_enum_variant, reason = "one a connection, within its box")]
enum Driver {
    Running(http1::Connection<TokioIo<Box<dyn Stream>>, Payload>),
    /// hyper's part is gone, or a request still in its queue would never have an answer. The socket stays until the
    /// answer was seen, which decides how it is closed.
    Ended {
        _socket: Option<TokioIo<Box<dyn Stream>>>,
    },
}

impl Driver {
    /// Its errors reach whoever waits for a response or a body.
    fn drive(&mut self, cx: &mut Context<'_>) {
        let Self::Running(connection) = self else { return };
        if Pin::new(connection).poll(cx).is_ready()
            && let Self::Running(ended) = std::mem::replace(self, Self::Ended { _socket: None })
        {
            *self = Self::Ended { _socket: Some(ended.into_parts().io) };
        }
    }

    fn has_ended(&self) -> bool {
        matches!(self, Self::Ended { .. })
    }
}

impl Connection {
    /// `progress` is the socket's.
    pub(super) async fn new(stream: Box<dyn Stream>, progress: Arc<Progress>) -> Result<Self, hyper::Error> {
        // Of a head nothing but the status, what frames the body and `Retry-After` is used: what else is odd in it is no
        // reason to send again what was accepted.
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(HEAD_CAP)
            .max_headers(MOST_FIELDS)
            .allow_spaces_after_header_name_in_responses(true)
            .allow_obsolete_multiline_headers_in_responses(true)
            .ignore_invalid_headers_in_responses(true)
            .handshake(TokioIo::new(stream))
            .await?;
        Ok(Self(Box::new(Parts { sender, driver: Driver::Running(driver), progress })))
    }

    /// Sends a request and waits for the response's head.
    pub(super) async fn send(&mut self, request: Outgoing) -> Result<Response<Incoming>, Unanswered> {
        let Parts { sender, driver, progress } = &mut *self.0;
        let request = request.map(|body| Payload { body, progress: Arc::clone(progress) });
        progress.taken.store(request.body().is_end_stream(), Ordering::Relaxed);
        progress.written.store(false, Ordering::Relaxed);
        let mut response = pin!(sender.try_send_request(request));
        let response = poll_fn(|cx| {
            driver.drive(cx);
            response.as_mut().poll(cx)
        });
        response.await.map_err(|mut unsent| {
            let request = unsent.take_message().map(|request| Box::new(request.map(|payload| payload.body)));
            (unsent.into_error(), request)
        })
    }

    /// Writes what is left of the request. Answers whether there is nothing more: a response may come, and the connection
    /// end, before the other side has read what it answers. From then on the socket is closed in order: the kernel may
    /// still have some of what was accepted, and a reset would take that back.
    pub(super) async fn finish(&mut self) -> bool {
        let written = poll_fn(|cx| {
            self.0.driver.drive(cx);
            let written = self.0.progress.written.load(Ordering::Relaxed);
            if written || self.0.driver.has_ended() { Poll::Ready(written) } else { Poll::Pending }
        });
        let written = written.await;
        self.0.progress.open.store(!written, Ordering::Relaxed);
        written
    }

    /// Reads a body to its end, up to `cap` bytes and for at most a second. Gives the connection back if it can take
    /// another request; else its socket is closed.
    pub(super) async fn drain(mut self, mut body: Incoming, cap: usize) -> Option<Self> {
        let whole = async {
            let mut left = cap;
            loop {
                let frame = poll_fn(|cx| {
                    self.0.driver.drive(cx);
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
            self.0.driver.drive(cx);
            Poll::Ready(
                !self.0.driver.has_ended() && matches!(self.0.sender.poll_ready(cx), Poll::Ready(Ok(()))),
            )
        })
        .await
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
            connection.0.progress.open.store(true, Ordering::Relaxed);
            if since.elapsed() < IDLE_TIMEOUT && connection.is_ready().await {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection for the next request, if there is room.
    pub(super) fn put(&self, origin: &Arc<str>, connection: Connection) {
        connection.0.progress.open.store(false, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that says nothing until it closes the connection.
    struct Silent {
        closed: Arc<AtomicBool>,
        written: Arc<AtomicBool>,
    }

    impl AsyncRead for Silent {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if self.closed.load(Ordering::Relaxed) { Poll::Ready(Ok(())) } else { Poll::Pending }
        }
    }

    impl AsyncWrite for Silent {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.written.store(true, Ordering::Relaxed);
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_connection_that_closes_before_the_first_byte_gives_the_request_back() {
        let (closed, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let peer = Silent { closed: Arc::clone(&closed), written: Arc::clone(&written) };
        let mut connection = Connection::new(Box::new(peer), Arc::default()).await.expect("a connection");
        assert!(connection.is_ready().await);
        closed.store(true, Ordering::Relaxed);
        let request = Request::post("/hook").body(Full::new(Bytes::from_static(b"7"))).expect("a request");
        let (_, unsent) = connection.send(Box::new(request)).await.expect_err("nobody answers");
        assert_eq!(unsent.expect("it was not written").uri(), "/hook");
        assert!(!written.load(Ordering::Relaxed));
    }
}
