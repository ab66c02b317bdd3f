//! The destinations: HTTP/1 servers, one port each. The request says how it is to be treated.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, UNIX_EPOCH};
use std::{fmt, io};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, header, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use leasehold::ports::Message;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::spawn_local;
use tokio::time::{Sleep, sleep};
use turmoil::net::{TcpListener, TcpStream};

use super::hub::{Shared, lock};
use crate::schedule::{Asked, Manner, Schedule};

/// The first destination's port.
pub(super) const PORTS: u16 = 8000;

/// The header in which a request says how it is to be treated.
pub(super) const MANNER: &str = "sim-manner";

/// What is sent for an event.
pub(super) fn message(schedule: &Schedule, event: u32) -> Message {
    let destination = schedule.events[event as usize].destination;
    Message {
        event_id: format!("e{event}"),
        event_type: "sim.event".into(),
        destination_url: format!("http://web:{}/hook/{event}", PORTS + destination),
        payload: payload(event),
    }
}

/// Payloads differ in length: some take several reads.
fn payload(event: u32) -> Bytes {
    let filling = "x".repeat((event as usize * 997) % 20_000);
    format!("{{\"event\":{event},\"filling\":\"{filling}\"}}").into()
}

/// Serves all destinations.
pub(super) async fn serve(hub: Shared) -> turmoil::Result {
    let destinations = lock(&hub).schedule.destinations.len() as u16;
    for destination in 0..destinations {
        let listener = TcpListener::bind(("0.0.0.0", PORTS + destination)).await?;
        spawn_local(listen(hub.clone(), listener));
    }
    std::future::pending().await
}

async fn listen(hub: Shared, listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let drips = lock(&hub).draws.percent(5);
        let treat = {
            let hub = hub.clone();
            service_fn(move |request| treat(hub.clone(), request))
        };
        let stream = TokioIo::new(Dripping { stream, drips, pause: None });
        // A date would be the machine's own.
        let connection = http1::Builder::new().auto_date_header(false).serve_connection(stream, treat);
        spawn_local(connection);
    }
}

/// The connection is to be reset.
#[derive(Debug)]
struct Reset;

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("reset")
    }
}

impl std::error::Error for Reset {}

async fn treat(hub: Shared, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Reset> {
    let (head, body) = request.into_parts();
    let said = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let manner: Manner = serde_json::from_str(said(MANNER)).map_err(|_| Reset)?;
    if manner == Manner::ResetBefore {
        return Err(Reset);
    }
    // A worker that is gone sends half a body.
    let body = body.collect().await.map_err(|_| Reset)?.to_bytes();
    let event: u32 = said("webhook-id")[1..].parse().map_err(|_| Reset)?;
    assert_eq!(body, payload(event), "the body of event {event}");
    assert_eq!(head.uri.path(), format!("/hook/{event}"), "the path of event {event}");
    assert!(!said("webhook-attempt").is_empty() && !said("webhook-lease-token").is_empty());
    let (soon, now, timeouts) = {
        let mut hub = lock(&hub);
        let timeouts = hub.schedule.settings.iter().map(|settings| settings.request_timeout).max();
        let now = hub.now();
        (hub.draws.within(500, 20_000), hub.store.clock.at(now), timeouts.unwrap_or(0))
    };
    let (delay, status, asked) = match manner {
        Manner::Ok(least, most) => (lock(&hub).draws.within(least, most), 200, None),
        Manner::Status(status) => (soon, status, None),
        Manner::RetryAfter(status, asked) => (soon, status, Some(asked)),
        Manner::TooLate => (timeouts + soon, 200, None),
        Manner::ResetBefore | Manner::ResetAfter => {
            sleep(Duration::from_micros(soon)).await;
            return Err(Reset);
        }
        Manner::Hang | Manner::Undeliverable => std::future::pending().await,
    };
    sleep(Duration::from_micros(delay)).await;
    let mut response = Response::builder().status(status);
    if let Some(asked) = asked {
        response = response.header(header::RETRY_AFTER, retry_after(asked, now));
    }
    // Its end may arrive long after its head.
    let thanks = "thanks ".repeat(lock(&hub).draws.within(0, 20) as usize);
    response.body(Full::new(thanks.into())).map_err(|_| Reset)
}

fn retry_after(asked: Asked, now: i64) -> String {
    match asked {
        Asked::Delay(delay) => delay.div_ceil(1_000_000).to_string(),
        Asked::Date(ahead) => {
            let date = Duration::from_micros(u64::try_from(now + ahead).unwrap_or(0));
            httpdate::fmt_http_date(UNIX_EPOCH + date)
        }
        Asked::Garbage => "soon".into(),
    }
}

/// A stream that may write its bytes a few at a time.
struct Dripping {
    stream: TcpStream,
    drips: bool,
    pause: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Dripping {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Dripping {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let drop = if self.drips { bytes.len().min(12) } else { bytes.len() };
        if let Some(pause) = &mut self.pause {
            std::task::ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        let written = Pin::new(&mut self.stream).poll_write(context, &bytes[..drop]);
        if self.drips && written.is_ready() {
            self.pause = Some(Box::pin(sleep(Duration::from_millis(7))));
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
