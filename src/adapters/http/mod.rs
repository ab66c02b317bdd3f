//! The way to the destinations over HTTP/1.1: signed requests to addresses that are allowed, and nothing else.
//!
//! It stands on hyper's connections and not on a full client, for three reasons:
//! - **Abort.** A client drives its connections in tasks of its own, which close an aborted request's socket some time
//!   later, or never while TLS can't write its goodbye. Here the connection lives in the future of
//!   [`HttpGateway::send`]: when that is dropped, the socket is closed before the drop returns.
//! - **No silent repeat.** Clients send a request again on their own when a kept connection breaks under it. Here each
//!   call makes one request on one connection, whatever happens: hyper's `SendRequest` below never repeats, and a kept
//!   connection is looked at before it is used, so that one closed while idle costs no attempt; nor does one of which
//!   hyper says that it took no byte. What is left is a close that is under way at that very moment: an error, as it may
//!   have been handled.
//! - **Address rules.** The addresses that were checked are the ones connected to; no name is resolved a second time,
//!   no redirect is followed, and no proxy variable is read.

mod classify;
mod connection;
mod destination;
mod lookups;
mod retry_after;
mod signature;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http_body_util::Full;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig};
use url::Host;

use crate::machine::AttemptResult;
use crate::ports::{Attempt, Gateway};

use classify::{Failure, Phase, classify};
pub use connection::IDLE_IN_ALL;
use connection::{Connection, Outgoing, Pool, Socket, Stream};
pub use destination::{AddressRules, AllowRule, AllowRuleError, Destination, DestinationError};
use destination::{Destinations, without_dot};
use lookups::Lookups;
pub use retry_after::retry_after;
pub use signature::{Secret, SecretError, Signer};

const AGENT: HeaderValue = HeaderValue::from_static(concat!("leasehold/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const WEBHOOK_EVENT_TYPE: HeaderName = HeaderName::from_static("webhook-event-type");
const WEBHOOK_ATTEMPT: HeaderName = HeaderName::from_static("webhook-attempt");
const WEBHOOK_LEASE_TOKEN: HeaderName = HeaderName::from_static("webhook-lease-token");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Time before the next address of a name is tried beside the ones under way (RFC 8305, section 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// At most this many addresses of a name are tried.
const MOST_ADDRESSES: usize = 8;

/// How requests are made.
#[derive(Clone, Debug)]
pub struct HttpSettings {
    /// Bounds DNS, connect and TLS.
    pub connect_timeout: Duration,
    /// Bounds DNS, connect, TLS and the wait for the response's head.
    pub request_timeout: Duration,
    /// At most this many bytes of a body are read.
    pub response_cap: usize,
    /// All of them sign, the first one first; at least one.
    pub secrets: Vec<Secret>,
    /// Turns the hex scheme on, with this prefix of its headers.
    pub hex_prefix: Option<String>,
    /// Where requests may go.
    pub addresses: AddressRules,
    /// Whether `http://` may be used.
    pub allow_http: bool,
}

/// Why a gateway was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpSettingsError {
    /// No signing secret.
    NoSecret,
    /// The hex scheme's prefix is no header name.
    HexPrefix(String),
}

impl fmt::Display for HttpSettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSecret => f.write_str("signing_secrets is empty; allowed is at least one whsec_<base64>"),
            Self::HexPrefix(prefix) => {
                write!(f, "hex_prefix is {prefix:?}; allowed is what a header name can begin with")
            }
        }
    }
}

impl std::error::Error for HttpSettingsError {}

/// The header names of the hex scheme.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HexHeaders {
    event_id: HeaderName,
    event_type: HeaderName,
    timestamp: HeaderName,
    signature: HeaderName,
}

impl HexHeaders {
    fn new(prefix: &str) -> Result<Self, HttpSettingsError> {
        let refused = || HttpSettingsError::HexPrefix(prefix.to_owned());
        // The name would begin with the hyphen, and `webhook-timestamp` and its like are taken.
        if prefix.is_empty() || prefix.eq_ignore_ascii_case("webhook") {
            return Err(refused());
        }
        let name = |suffix| format!("{prefix}-{suffix}").parse().map_err(|_| refused());
        Ok(Self {
            event_id: name("Event-Id")?,
            event_type: name("Event-Type")?,
            timestamp: name("Timestamp")?,
            signature: name("Signature")?,
        })
    }
}

/// The [`Gateway`] over HTTP. Cheap to share; to be used within a tokio runtime.
pub struct HttpGateway {
    settings: HttpSettings,
    signer: Signer,
    hex: Option<HexHeaders>,
    tls: Result<TlsConnector, String>,
    destinations: Destinations,
    pool: Pool,
    lookups: Lookups,
}

impl HttpGateway {
    /// Trusts the certificate authorities of the machine.
    ///
    /// # Errors
    /// No secret, or a prefix that makes no header name.
    pub fn new(settings: HttpSettings) -> Result<Self, HttpSettingsError> {
        Self::with(settings, platform_tls())
    }

    /// Takes a TLS configuration, such as one with a private certificate authority.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_tls(settings: HttpSettings, tls: ClientConfig) -> Result<Self, HttpSettingsError> {
        Self::with(settings, Ok(tls))
    }

    fn with(
        settings: HttpSettings,
        tls: Result<ClientConfig, rustls::Error>,
    ) -> Result<Self, HttpSettingsError> {
        let signer = Signer::new(&settings.secrets).ok_or(HttpSettingsError::NoSecret)?;
        let hex = settings.hex_prefix.as_deref().map(HexHeaders::new).transpose()?;
        let tls = tls.map(|config| TlsConnector::from(Arc::new(config))).map_err(|error| error.to_string());
        Ok(Self {
            settings,
            signer,
            hex,
            tls,
            destinations: Destinations::default(),
            pool: Pool::default(),
            lookups: Lookups::default(),
        })
    }

    /// Why `https://` can't be used, if it can't: no certificate authorities were found on this machine. Requests to it
    /// then fail as every other TLS error does.
    pub fn tls_problem(&self) -> Option<&str> {
        self.tls.as_ref().err().map(String::as_str)
    }

    /// Whether the hex scheme's headers can begin with this.
    ///
    /// # Errors
    /// They can't.
    pub fn check_hex_prefix(prefix: &str) -> Result<(), HttpSettingsError> {
        HexHeaders::new(prefix).map(drop)
    }

    async fn attempt(
        &self,
        attempt: Attempt,
        may_start: impl Fn() -> bool,
        known: &OnceLock<AttemptResult>,
    ) -> Result<Option<AttemptResult>, Failure> {
        let destination = self
            .destinations
            .get(&attempt.message.destination_url)
            .map_err(|error| Failure::Undeliverable(error.to_string()))?;
        let mut request = self.request(attempt, &destination)?;
        if !destination.https && !self.settings.allow_http {
            return Err(Failure::PlainHttp);
        }
        if let Some(address) = literal(&destination.host)
            && !self.settings.addresses.allows(address)
        {
            return Err(Failure::Forbidden { host: address.to_string(), address });
        }
        let started = Instant::now();
        let whole = Deadline::new(started, self.settings.request_timeout);
        let connect =
            Deadline::new(started, self.settings.connect_timeout.min(self.settings.request_timeout));
        loop {
            let kept = self.pool.take(&destination.origin).await;
            let was_kept = kept.is_some();
            let connection = match kept {
                Some(connection) => connection,
                // Mostly not needed, and large: a request that is open should not have room for it.
                None => Box::pin(self.connect(&destination, &connect)).await?,
            };
            if !may_start() {
                return Ok(None);
            }
            match self.exchange(connection, request, &whole, &destination, known).await {
                Ok(result) => return Ok(Some(result)),
                // It was being closed, and nothing was written.
                Err((_, Some(unsent))) if was_kept => request = unsent,
                Err((failure, _)) => return Err(failure),
            }
        }
    }

    /// The request, signed, with the headers that README lists.
    fn request(&self, attempt: Attempt, destination: &Destination) -> Result<Outgoing, Failure> {
        let Attempt { key, number, timestamp, message } = attempt;
        let value = |name: &HeaderName, text: &str| {
            HeaderValue::from_str(text)
                .map_err(|_| Failure::Undeliverable(format!("{name} has characters that fit no header")))
        };
        let mut request = Request::new(Full::new(message.payload.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = destination.target.clone().into();
        let headers = request.headers_mut();
        headers.reserve(16);
        headers.insert(HOST, destination.authority.clone());
        headers.insert(USER_AGENT, AGENT);
        headers.insert(CONTENT_TYPE, JSON);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(message.payload.len()));
        let signature = self.signer.sign(&message.event_id, timestamp, &message.payload);
        let id = value(&WEBHOOK_ID, &message.event_id)?;
        let event_type = value(&WEBHOOK_EVENT_TYPE, &message.event_type)?;
        let time = HeaderValue::from(timestamp);
        if let Some(hex) = &self.hex {
            headers.insert(&hex.event_id, id.clone());
            headers.insert(&hex.event_type, event_type.clone());
            headers.insert(&hex.timestamp, time.clone());
            let signature = self.signer.sign_hex(timestamp, &message.payload);
            headers.insert(&hex.signature, value(&hex.signature, &signature)?);
        }
        headers.insert(IDEMPOTENCY_KEY, id.clone());
        headers.insert(WEBHOOK_ID, id);
        headers.insert(WEBHOOK_TIMESTAMP, time);
        headers.insert(WEBHOOK_SIGNATURE, value(&WEBHOOK_SIGNATURE, &signature)?);
        headers.insert(WEBHOOK_EVENT_TYPE, event_type);
        headers.insert(WEBHOOK_ATTEMPT, HeaderValue::from(number));
        headers.insert(WEBHOOK_LEASE_TOKEN, HeaderValue::from(key.token.0));
        Ok(Box::new(request))
    }

    /// One request on one connection. The connection goes to the pool or is closed before this returns. A request of
    /// which nothing was written is given back.
    async fn exchange(
        &self,
        mut connection: Connection,
        request: Outgoing,
        deadline: &Deadline,
        destination: &Destination,
        known: &OnceLock<AttemptResult>,
    ) -> Result<AttemptResult, (Failure, Option<Outgoing>)> {
        let failed = |failure| (failure, None);
        let (head, body) = {
            // Pinned here: passed on by value it would have its place twice in every open request.
            let response = pin!(async { Ok(connection.send(request).await) });
            let response = deadline.bound(Phase::Waiting, destination, response).await.map_err(failed)?;
            let broken =
                |(error, unsent)| (Failure::Broken { authority: destination.host_and_port(), error }, unsent);
            response.map_err(broken)?.into_parts()
        };
        if head.status.is_success() {
            // Some answer before they have read what they answer: without the rest of it nothing is delivered.
            let rest = pin!(async { Ok(connection.finish().await) });
            if !deadline.bound(Phase::Writing, destination, rest).await.map_err(failed)? {
                let (authority, status) = (destination.host_and_port(), head.status.as_u16());
                return Err(failed(Failure::Unread { authority, status }));
            }
        }
        // The status line decides; an abort while the body is read must not undo it (rule P4).
        let result = classify(Ok(head));
        let _ = known.set(result.clone());
        if let Some(connection) = connection.drain(body, self.settings.response_cap).await {
            self.pool.put(&destination.origin, connection);
        }
        Ok(result)
    }

    /// A new connection to an address that is allowed.
    async fn connect(&self, destination: &Destination, deadline: &Deadline) -> Result<Connection, Failure> {
        let addresses = deadline.bound(Phase::Resolving, destination, self.resolve(destination)).await?;
        let stream = deadline.bound(Phase::Connecting, destination, dial(addresses)).await?;
        let _ = stream.set_nodelay(true); // slower without it, no worse
        let socket = Socket::new(stream);
        let progress = socket.progress();
        let stream: Box<dyn Stream> = if destination.https {
            let handshake = self.handshake(destination, socket);
            Box::new(deadline.bound(Phase::Handshaking, destination, handshake).await?)
        } else {
            Box::new(socket)
        };
        Connection::new(stream, progress)
            .await
            .map_err(|error| Failure::Broken { authority: destination.host_and_port(), error })
    }

    async fn handshake(
        &self,
        destination: &Destination,
        socket: Socket,
    ) -> Result<impl Stream + 'static, Failure> {
        let failed = |error| Failure::Tls { authority: destination.host_and_port(), error };
        let tls = self.tls.as_ref().map_err(|error| Failure::NoTls(error.clone()))?;
        let name = match &destination.host {
            Host::Domain(name) => ServerName::try_from(without_dot(name).to_owned())
                .map_err(|error| failed(io::Error::other(error)))?,
            Host::Ipv4(address) => IpAddr::from(*address).into(),
            Host::Ipv6(address) => IpAddr::from(*address).into(),
        };
        tls.connect(name, socket).await.map_err(failed)
    }

    /// The addresses of a host that may be connected to; at least one.
    async fn resolve(&self, destination: &Destination) -> Result<Vec<SocketAddr>, Failure> {
        let Host::Domain(name) = &destination.host else {
            return Ok(literal(&destination.host)
                .map(|address| (address, destination.port).into())
                .into_iter()
                .collect());
        };
        let failed = |error| Failure::Resolve { host: name.clone(), error };
        let mut addresses = self.lookups.of(name, destination.port).await.map_err(failed)?;
        let Some(first) = addresses.first().map(SocketAddr::ip) else {
            return Err(failed(io::Error::other("the name has no address")));
        };
        if !self.settings.addresses.allows_name(name) {
            addresses.retain(|address| self.settings.addresses.allows(address.ip()));
        }
        if addresses.is_empty() {
            return Err(Failure::Forbidden { host: name.clone(), address: first });
        }
        Ok(addresses)
    }
}

impl fmt::Debug for HttpGateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpGateway").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Gateway for HttpGateway {
    /// Returns once the status is known and the body was read or given up (at most a second later). Whether it returns
    /// or is dropped, no request of it is open afterwards: dropping closes the socket, with a reset, before the drop
    /// returns. A task that runs it has to be aborted *and awaited* to know that it was dropped.
    async fn send(
        &self,
        attempt: Attempt,
        may_start: impl Fn() -> bool + Send + Sync,
        known: &OnceLock<AttemptResult>,
    ) -> Option<AttemptResult> {
        let result = self.attempt(attempt, may_start, known).await;
        result.unwrap_or_else(|failure| Some(classify(Err(failure))))
    }
}

/// A point in time, and the setting that put it there.
struct Deadline {
    at: Instant,
    after: Duration,
}

impl Deadline {
    fn new(start: Instant, after: Duration) -> Self {
        Self { at: start + after, after }
    }

    async fn bound<T>(
        &self,
        phase: Phase,
        destination: &Destination,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        timeout_at(self.at, work).await.unwrap_or_else(|_| {
            Err(Failure::TimedOut { phase, authority: destination.host_and_port(), after: self.after })
        })
    }
}

fn literal(host: &Host<String>) -> Option<IpAddr> {
    match host {
        Host::Ipv4(address) => Some((*address).into()),
        Host::Ipv6(address) => Some((*address).into()),
        Host::Domain(_) => None,
    }
}

/// Connects to the first address that answers: in the resolver's order, the next one a little later or once one failed.
/// Losing and aborted attempts may end later than this does; no byte of a request is on them.
async fn dial(addresses: Vec<SocketAddr>) -> Result<TcpStream, Failure> {
    let connect =
        |to| async move { TcpStream::connect(to).await.map_err(|error| Failure::Connect { to, error }) };
    if let [address] = addresses[..] {
        return connect(address).await;
    }
    let mut rest = addresses.into_iter().take(MOST_ADDRESSES);
    let mut race = JoinSet::new();
    let mut last = Failure::Resolve { host: String::new(), error: io::Error::other("no address") };
    loop {
        match rest.next() {
            Some(address) => drop(race.spawn(connect(address))),
            None if race.is_empty() => return Err(last),
            None => {}
        }
        tokio::select! {
            Some(done) = race.join_next() => match done {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(failure)) => last = failure,
                Err(_) => {} // neither panics nor is it aborted
            },
            () = sleep(NEXT_ADDRESS_AFTER), if rest.len() > 0 => {}
        }
    }
}

/// Why no certificate can be verified on this machine, if that is so.
pub fn platform_problem() -> Option<String> {
    platform_tls().err().map(|error| error.to_string())
}

/// The machine's certificate authorities, by the one provider of cryptography in this program.
fn platform_tls() -> Result<ClientConfig, rustls::Error> {
    use rustls_platform_verifier::BuilderVerifierExt as _;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.with_platform_verifier()?.with_no_client_auth())
}
