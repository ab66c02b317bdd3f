//! A TCP proxy that loses, delays and spoils what goes through it.

use std::future::pending;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::common::receiver::accept;

/// What the proxy does to bytes and closes of both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weather {
    Fair,
    /// Nothing passes; connections are half open until the weather changes.
    Cut,
    /// What is asked arrives, answers don't.
    NoAnswers,
    /// Of an answer of which 4 KiB come at once nothing more is taken: a server sends 8 KiB at a time.
    NoLongAnswers,
    /// Questions don't arrive, what was asked before is answered.
    NoQuestions,
    /// Each piece takes this long.
    Slow(Duration),
    /// Every fourth piece takes as long as a packet that is lost and sent again.
    Lossy,
    /// Connections are closed, and new ones too.
    Refuse,
    /// Connections are answered with bytes of no protocol.
    Garbage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Questions,
    Answers,
}

impl Weather {
    fn passes(self, way: Way) -> bool {
        match self {
            Self::Cut => false,
            Self::NoAnswers => way == Way::Questions,
            Self::NoQuestions => way == Way::Answers,
            Self::Fair | Self::NoLongAnswers | Self::Slow(_) | Self::Lossy | Self::Refuse | Self::Garbage => {
                true
            }
        }
    }

    /// Whether all that is sent arrives, if late.
    pub(crate) fn passes_all(self) -> bool {
        self.passes(Way::Questions) && self.passes(Way::Answers) && !self.breaks()
    }

    fn breaks(self) -> bool {
        matches!(self, Self::Refuse | Self::Garbage)
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Upstream {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Upstream {
    async fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(address) => Box::new(TcpStream::connect(address).await?),
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    weather: watch::Sender<Weather>,
}

impl Proxy {
    pub(crate) async fn start(upstream: Upstream) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (weather, watching) = watch::channel(Weather::Fair);
        tokio::spawn(async move {
            loop {
                let client = accept(&listener).await;
                tokio::spawn(carry(client, upstream.clone(), watching.clone()));
            }
        });
        Self { address, weather }
    }

    pub(crate) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

async fn carry(mut client: TcpStream, upstream: Upstream, mut weather: watch::Receiver<Weather>) {
    let now = *weather.borrow();
    if now == Weather::Garbage {
        let _ = client.write_all(b"\x15\x03\x01\xff\0zzzz not what you asked for").await;
    }
    if now.breaks() {
        return;
    }
    if weather.wait_for(|weather| weather.passes(Way::Questions)).await.is_err() {
        return;
    }
    let Ok(server) = upstream.connect().await else { return };
    let (from_server, to_server) = tokio::io::split(server);
    let (from_client, to_client) = client.split();
    tokio::select! {
        () = pump(from_client, to_server, weather.clone(), Way::Questions) => {}
        () = pump(from_server, to_client, weather.clone(), Way::Answers) => {}
        _ = weather.wait_for(|weather| weather.breaks()) => {}
    }
}

/// Carries one direction to its end.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut weather: watch::Receiver<Weather>,
    way: Way,
) {
    let mut piece = vec![0; 16 * 1024];
    for number in 0_u32.. {
        let read = from.read(&mut piece).await.unwrap_or(0);
        let Ok(now) = weather.wait_for(|weather| weather.passes(way)).await.map(|weather| *weather) else {
            return;
        };
        match now {
            Weather::Slow(time) => sleep(time).await,
            Weather::NoLongAnswers if way == Way::Answers && read >= 4_096 => pending().await,
            // The least time after which Linux sends again.
            Weather::Lossy if number % 4 == 3 => sleep(Duration::from_millis(200)).await,
            _ => {}
        }
        if read == 0 || to.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}
