//! The worker's side of a request: hyper's HTTP/1 client over the simulated TCP, inside the `send` future, so that
//! dropping it closes the socket.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, UNIX_EPOCH};
use std::{future, io};

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use leasehold::machine::{AttemptResult, LeaseKey};
use leasehold::ports::{Attempt, Gateway};
use sim_oracle::{Down, End, Fact};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use turmoil::net::TcpStream;

use super::endpoint::MANNER;
use super::hub::{Gated, Shared, Todo, effect, lock};
use crate::bugs::Bug;
use crate::plain::attempt_result;
use crate::schedule::Manner;

/// The destinations as a worker process sees them.
pub(super) struct Sender {
    pub(super) hub: Shared,
    pub(super) worker: u32,
    pub(super) request_timeout: Duration,
}

/// A request on its way, as its socket and its sender know it.
struct Exchange {
    hub: Shared,
    worker: u32,
    key: LeaseKey,
    number: u32,
    /// When the driver began with it.
    asked: u64,
    opened: AtomicBool,
    /// It was too late to start.
    late: AtomicBool,
    end: OnceLock<End>,
}

impl Exchange {
    fn fact(&self, make: impl FnOnce(u32, u32, i64) -> Fact) {
        let fact = make(self.worker, self.key.row.0 as u32, self.key.token.0);
        lock(&self.hub).emit_of(self.worker, fact);
    }

    fn opened(&self) -> bool {
        self.opened.load(Ordering::Relaxed)
    }

    /// The first byte is about to leave.
    fn open(&self) {
        self.opened.store(true, Ordering::Relaxed);
        let number = self.number;
        self.fact(|worker, event, token| Fact::RequestOpened { worker, event, token, number });
        let mut hub = lock(&self.hub);
        let event = self.key.row.0 as u32;
        if hub.kills[event as usize] > 0 {
            hub.kills[event as usize] -= 1;
            let at = hub.now() + hub.draws.below(20_000);
            hub.plan(at, Todo::Kill(self.worker, event));
        }
    }

    /// Its socket is closed, and the worker knows what came of it.
    fn over(&self, end: End) {
        self.fact(|worker, event, token| Fact::RequestEnded { worker, event, token, end });
        if end != End::Closed {
            self.fact(|worker, event, token| Fact::OutcomeKnown { worker, event, token });
        }
    }
}

/// Sees to it that an aborted request is over once its socket is closed. A status that came before stands.
struct Abort<'a>(&'a Exchange);

impl Drop for Abort<'_> {
    fn drop(&mut self) {
        if self.0.opened() {
            self.0.over(self.0.end.get().copied().unwrap_or(End::Closed));
        }
    }
}

/// The socket. A stop of the process may meet its first byte.
struct Socket {
    stream: TcpStream,
    exchange: Arc<Exchange>,
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.exchange.opened() {
            let worker = self.exchange.worker;
            let mut hub = lock(&self.exchange.hub);
            if let Some(pause) = hub.processes[worker as usize].pause_at_send.take() {
                hub.stop(worker);
                let until = hub.now() + pause;
                hub.plan(until, Todo::Continue(worker));
            }
            if hub.gated(worker, context) {
                return Poll::Pending;
            }
            drop(hub);
            self.exchange.open();
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What HTTP said.
fn parse(response: &Response<Incoming>) -> End {
    let text = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let asked = text.and_then(|text| match text.parse() {
        Ok(seconds) => Some(sim_oracle::RetryAfter::Delay(Duration::from_secs(seconds).as_micros() as u64)),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
            Some(sim_oracle::RetryAfter::Date(date.as_micros() as i64))
        }
    });
    End::Status(response.status().as_u16(), asked)
}

impl Sender {
    async fn exchange(
        &self,
        attempt: Attempt,
        may_start: impl Fn() -> bool + Send + Sync,
        known: &OnceLock<AttemptResult>,
    ) -> Option<AttemptResult> {
        let asked = lock(&self.hub).now();
        effect(&self.hub, self.worker).await;
        let Attempt { key, number, timestamp, message } = attempt;
        let event = key.row.0 as u32;
        let (manner, bug) = {
            let mut hub = lock(&self.hub);
            let manner = hub.draw_manner(event);
            // No answer: an outcome that is settled first would take the event off probation.
            (if hub.kills[event as usize] > 0 { Manner::Hang } else { manner }, hub.bug)
        };
        let exchange = Arc::new(Exchange {
            hub: Arc::clone(&self.hub),
            worker: self.worker,
            key,
            number,
            asked,
            opened: AtomicBool::new(false),
            late: AtomicBool::new(false),
            end: OnceLock::new(),
        });
        let mut end = End::Undeliverable;
        if manner != Manner::Undeliverable {
            let request = Request::post(&message.destination_url)
                .header(header::HOST, "web")
                .header("webhook-id", &message.event_id)
                .header("webhook-timestamp", timestamp)
                .header("webhook-event-type", &message.event_type)
                .header("webhook-attempt", number)
                .header("webhook-lease-token", key.token.0)
                .header(MANNER, serde_json::to_string(&manner).unwrap_or_default())
                .body(Full::new(message.payload.clone()));
            #[allow(clippy::expect_used, reason = "the simulated rows have nothing odd in them")]
            let request = request.expect("a request");
            let abort = Abort(&exchange);
            let _ =
                timeout(self.request_timeout, respond(&exchange, request.clone(), &may_start, known)).await;
            if bug == Some(Bug::SendTwice) && exchange.end.get().is_none() {
                exchange.over(End::Error);
                exchange.opened.store(false, Ordering::Relaxed);
                let _ = timeout(self.request_timeout, respond(&exchange, request, &may_start, known)).await;
            }
            if exchange.late.load(Ordering::Relaxed) {
                return None;
            }
            // It may have been stopped at its first byte.
            future::poll_fn(|context| match lock(&self.hub).gated(self.worker, context) {
                true => Poll::Pending,
                false => Poll::Ready(()),
            })
            .await;
            std::mem::forget(abort);
            end = exchange.end.get().copied().unwrap_or(End::Error);
        }
        exchange.over(end);
        self.maybe_die().await;
        Some(match end {
            End::Error if bug == Some(Bug::AcceptedIsSuccess) => attempt_result(End::Status(200, None)),
            end => attempt_result(end),
        })
    }

    /// The worker may die of an answer.
    async fn maybe_die(&self) {
        let dies = {
            let mut hub = lock(&self.hub);
            let dies = std::mem::take(&mut hub.processes[self.worker as usize].crash_on_answer);
            if dies {
                hub.die(self.worker, Down::Crash);
            }
            dies
        };
        if dies {
            future::pending::<()>().await;
        }
    }
}

/// From connecting to the end of the response. What counts is known with its head.
async fn respond(
    exchange: &Arc<Exchange>,
    request: Request<Full<Bytes>>,
    may_start: &(impl Fn() -> bool + Sync),
    known: &OnceLock<AttemptResult>,
) -> Option<()> {
    let port = request.uri().port_u16()?;
    let stream = TcpStream::connect(("web", port)).await.ok()?;
    let socket = TokioIo::new(Socket { stream, exchange: Arc::clone(exchange) });
    let (mut sender, connection) = http1::handshake(socket).await.ok()?;
    let mut connection = pin!(connection);
    if !may_start() && lock(&exchange.hub).bug != Some(Bug::StartUnchecked) {
        exchange.late.store(true, Ordering::Relaxed);
        return None;
    }
    let asked = exchange.asked;
    exchange.fact(|worker, event, token| Fact::StartAllowed { worker, event, token, asked });
    let mut exchange = pin!(async {
        let response = sender.send_request(request).await.ok()?;
        let end = parse(&response);
        let _ = exchange.end.set(end);
        let _ = known.set(attempt_result(end));
        let mut body = response.into_body();
        while let Some(Ok(_)) = body.frame().await {}
        Some(())
    });
    tokio::select! {
        biased;
        done = &mut exchange => done,
        _ = &mut connection => exchange.await,
    }
}

impl Gateway for Sender {
    async fn send(
        &self,
        attempt: Attempt,
        may_start: impl Fn() -> bool + Send + Sync,
        known: &OnceLock<AttemptResult>,
    ) -> Option<AttemptResult> {
        Gated::new(&self.hub, self.worker, self.exchange(attempt, may_start, known)).await
    }
}
