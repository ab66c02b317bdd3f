//! The HTTP gateway against real sockets: what goes over the wire, and what hostile receivers can't do.
#![cfg(feature = "http")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod server;

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use leasehold::adapters::http::{AllowRule, HttpGateway, HttpSettings, HttpSettingsError, Secret};
use leasehold::machine::{AttemptResult, LeaseKey, RetryAfter, RowId, Token};
use leasehold::ports::{Attempt, Gateway as _, Message};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, rustls};

use server::{OK, Server, read_request};

const OLD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NEW: &str = "whsec_c2Vjb25kIHNlY3JldCBvZiAyNCBieXRlcyE=";

fn settings(allow: &[&str]) -> HttpSettings {
    HttpSettings {
        // Long enough never to strike in a test that isn't about them.
        connect_timeout: Duration::from_secs(60),
        request_timeout: Duration::from_secs(60),
        response_cap: 64 * 1024,
        secrets: vec![OLD.parse().unwrap()],
        hex_prefix: None,
        addresses: allow.iter().map(|rule| rule.parse::<AllowRule>().unwrap()).collect(),
        allow_http: true,
    }
}

fn local() -> HttpSettings {
    settings(&["127.0.0.0/8"])
}

fn gateway(settings: HttpSettings) -> HttpGateway {
    HttpGateway::new(settings).unwrap()
}

fn attempt(url: impl Into<String>) -> Attempt {
    Attempt {
        key: LeaseKey { row: RowId(7), token: Token(1_764_000_000_123) },
        number: 3,
        timestamp: 1_764_000_000,
        message: Arc::new(Message {
            event_id: "evt_1".into(),
            event_type: "invoice.paid".into(),
            destination_url: url.into(),
            payload: Bytes::from_static(br#"{"amount": 12, "text": "gr\u00fc\u00df"}"#),
        }),
    }
}

fn with_payload(url: impl Into<String>, payload: Bytes) -> Arc<Message> {
    Arc::new(Message { payload, ..Message::clone(&attempt(url).message) })
}

trait SendAlone {
    async fn send_alone(&self, attempt: Attempt) -> AttemptResult;
}

impl SendAlone for HttpGateway {
    async fn send_alone(&self, attempt: Attempt) -> AttemptResult {
        self.send(attempt, || true, &OnceLock::new()).await.expect("it may start")
    }
}

fn responded(status: u16) -> AttemptResult {
    AttemptResult::Responded { status, retry_after: None }
}

fn error(result: AttemptResult) -> String {
    match result {
        AttemptResult::Errored { error } => error,
        other => panic!("expected an error, got {other:?}"),
    }
}

/// What the answer `bytes` makes of an attempt, with the connection then closed by the server.
async fn answered(bytes: impl Into<Vec<u8>>) -> AttemptResult {
    let bytes = bytes.into();
    let server = Server::answering(move |_| bytes.clone()).await;
    gateway(local()).send_alone(attempt(server.url("/"))).await
}

// --- What goes over the wire ------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_request_is_exactly_this() {
    let server = Server::answering(|_| OK.into()).await;
    let result = gateway(local()).send_alone(attempt(server.url("/hook?a=b#fragment"))).await;
    assert_eq!(result, responded(200));
    let request = server.request();
    let expected = attempt("").message.payload.clone();
    assert_eq!(request.body, expected);
    assert_eq!(request.line, "POST /hook?a=b HTTP/1.1");
    let signature = request.header("webhook-signature").to_owned();
    let mut headers = request.headers.clone();
    headers.sort();
    let mut wanted = vec![
        ("host".to_owned(), server.address.to_string()),
        ("user-agent".to_owned(), concat!("leasehold/", env!("CARGO_PKG_VERSION")).to_owned()),
        ("content-type".to_owned(), "application/json".to_owned()),
        ("content-length".to_owned(), expected.len().to_string()),
        ("idempotency-key".to_owned(), "evt_1".to_owned()),
        ("webhook-id".to_owned(), "evt_1".to_owned()),
        ("webhook-timestamp".to_owned(), "1764000000".to_owned()),
        ("webhook-signature".to_owned(), signature),
        ("webhook-event-type".to_owned(), "invoice.paid".to_owned()),
        ("webhook-attempt".to_owned(), "3".to_owned()),
        ("webhook-lease-token".to_owned(), "1764000000123".to_owned()),
    ];
    wanted.sort();
    assert_eq!(headers, wanted);
}

/// The receiver's own library accepts the signature under either secret while one is being rotated.
#[tokio::test]
async fn receivers_verify_with_either_secret() {
    let server = Server::answering(|_| OK.into()).await;
    let settings = HttpSettings { secrets: vec![NEW.parse().unwrap(), OLD.parse().unwrap()], ..local() };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let attempt = Attempt { timestamp: now.try_into().unwrap(), ..attempt(server.url("/")) };
    assert_eq!(gateway(settings).send_alone(attempt).await, responded(200));
    let request = server.request();
    let headers: http::HeaderMap = request
        .headers
        .iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect::<http::HeaderMap>();
    for secret in [OLD, NEW] {
        standardwebhooks::Webhook::new(secret).unwrap().verify(&request.body, &headers).unwrap();
    }
    let stranger = standardwebhooks::Webhook::new("whsec_c3RyYW5nZXIgc2VjcmV0IG9mIDI0IGJ5dGVz").unwrap();
    stranger.verify(&request.body, &headers).unwrap_err();
    let mut tampered = request.body.to_vec();
    tampered.push(b' ');
    standardwebhooks::Webhook::new(OLD).unwrap().verify(&tampered, &headers).unwrap_err();
}

#[tokio::test]
async fn hex_scheme_is_sent_besides() {
    let server = Server::answering(|_| OK.into()).await;
    let settings = HttpSettings { hex_prefix: Some("X-Acme".into()), ..local() };
    let attempt = Attempt {
        timestamp: 1_700_000_000,
        message: with_payload(server.url("/"), Bytes::from_static(br#"{"a":1}"#)),
        ..attempt("")
    };
    assert_eq!(gateway(settings).send_alone(attempt).await, responded(200));
    let request = server.request();
    assert_eq!(request.header("x-acme-event-id"), "evt_1");
    assert_eq!(request.header("x-acme-event-type"), "invoice.paid");
    assert_eq!(request.header("x-acme-timestamp"), "1700000000");
    // printf '%s' '1700000000.{"a":1}' | openssl dgst -sha256 -mac HMAC -macopt hexkey:<the secret's bytes>
    assert_eq!(
        request.header("x-acme-signature"),
        "sha256=ea5835875e930d7cf1c91ffbb109b084566a2aaf43e9cf111b093501eae29b47"
    );
    assert!(request.header("webhook-signature").starts_with("v1,"));
}

#[test]
fn bad_settings_are_refused() {
    for prefix in ["", "X Acme", "X:", "webhook", "Ü"] {
        let refused =
            HttpGateway::new(HttpSettings { hex_prefix: Some(prefix.into()), ..local() }).unwrap_err();
        assert_eq!(refused, HttpSettingsError::HexPrefix(prefix.into()));
    }
    let none = HttpGateway::new(HttpSettings { secrets: Vec::<Secret>::new(), ..local() }).unwrap_err();
    assert_eq!(none, HttpSettingsError::NoSecret);
    assert!(!format!("{:?}", gateway(local())).contains("MfKQ9r8"));
}

#[tokio::test]
async fn bodies_of_every_size_arrive_whole() {
    let server = Server::answering(|_| OK.into()).await;
    let gateway = gateway(local());
    for size in [0, 1, 65_536, 8 << 20] {
        let payload = Bytes::from(vec![b'x'; size]);
        let message = with_payload(server.url("/"), payload.clone());
        assert_eq!(gateway.send_alone(Attempt { message, ..attempt("") }).await, responded(200));
        assert_eq!(server.request().body, payload);
    }
}

// --- Where it goes ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn forbidden_addresses_are_not_connected_to() {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let strict = gateway(settings(&[]));
    for host in [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "0177.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "[::1]",
        "[::]",
        "0.0.0.0",
        "localhost",
        "localhost.",
        "LOCALHOST",
        "169.254.169.254",
        "10.0.0.1",
        "[fd00::1]",
        "[64:ff9b::7f00:1]",
    ] {
        let text = error(strict.send_alone(attempt(format!("http://{host}:{port}/path?key=hunter2"))).await);
        // Some resolvers don't know `localhost.`: no address, no connection.
        let unknown = host == "localhost." && text.starts_with("dns: ");
        assert!(
            unknown || text.starts_with("forbidden: ") && text.contains("not a public"),
            "{host}: {text}"
        );
        assert!(!text.contains("hunter2") && !text.contains("/path"), "{text}");
    }
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[tokio::test]
async fn a_host_pattern_allows_what_the_name_resolves_to() {
    let server = Server::answering(|_| OK.into()).await;
    let port = server.address.port();
    let named = gateway(settings(&["localhost"]));
    assert_eq!(named.send_alone(attempt(format!("http://LocalHost:{port}/"))).await, responded(200));
    assert_eq!(server.request().header("host"), format!("localhost:{port}"));
    // The name is allowed, the address as such is not.
    assert!(error(named.send_alone(attempt(server.url("/"))).await).starts_with("forbidden: "));
}

#[tokio::test]
async fn what_can_never_be_sent_is_undeliverable() {
    let gateway = gateway(local());
    for (url, text) in [
        ("not a url", "does not parse"),
        ("ftp://127.0.0.1/", "scheme ftp"),
        ("http://user:hunter2@127.0.0.1/", "user info"),
        ("https://user@127.0.0.1/", "user info"),
        ("http://@127.0.0.1/", "user info"),
        ("http://", "no host"),
    ] {
        match gateway.send_alone(attempt(url)).await {
            AttemptResult::Undeliverable { error } => {
                assert!(error.contains(text) && !error.contains("hunter2"), "{url}: {error}");
            }
            other => panic!("{url}: {other:?}"),
        }
    }
    let mut bad = attempt("http://127.0.0.1:1/");
    Arc::make_mut(&mut bad.message).event_id = "a\r\nx-injected: 1".into();
    assert!(matches!(gateway.send_alone(bad).await, AttemptResult::Undeliverable { .. }));
}

#[tokio::test]
async fn plain_http_can_be_off() {
    let server = Server::answering(|_| OK.into()).await;
    let gateway = gateway(HttpSettings { allow_http: false, ..local() });
    let text = error(gateway.send_alone(attempt(server.url("/"))).await);
    assert!(text.contains("plain http"), "{text}");
    assert_eq!(server.connections.load(SeqCst), 0);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let inner = Server::answering(|_| OK.into()).await;
    for status in [301_u16, 302, 303, 307, 308] {
        let to = inner.url("/secret");
        let outer = Server::answering(move |_| {
            format!("HTTP/1.1 {status} Moved\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n").into()
        })
        .await;
        assert_eq!(gateway(local()).send_alone(attempt(outer.url("/"))).await, responded(status));
    }
    assert_eq!(inner.connections.load(SeqCst), 0);
}

/// In a process of its own, since variables of the environment are its process's.
#[tokio::test]
async fn proxy_variables_are_ignored() {
    if std::env::var_os("http_proxy").is_none_or(|proxy| proxy != "http://127.0.0.1:1") {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            child.env(name, "http://127.0.0.1:1");
        }
        child.env_remove("no_proxy").env_remove("NO_PROXY");
        let output = child.args(["--exact", "proxy_variables_are_ignored"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let server = Server::answering(|_| OK.into()).await;
    assert_eq!(gateway(local()).send_alone(attempt(server.url("/"))).await, responded(200));
}

// --- What comes back --------------------------------------------------------------------------------------------------

#[tokio::test]
async fn statuses_and_retry_after() {
    assert_eq!(answered("HTTP/1.1 204 No Content\r\n\r\n").await, responded(204));
    assert_eq!(answered("HTTP/1.0 200 OK\r\n\r\nuntil closed").await, responded(200));
    assert_eq!(answered("HTTP/1.1 500 Oh\r\n\r\n").await, responded(500));
    assert_eq!(answered("HTTP/1.1 999 Odd\r\n\r\n").await, responded(999));
    let retry_after = Some(RetryAfter::Delay(Duration::from_secs(120)));
    let result = answered("HTTP/1.1 429 Slow\r\nRetry-After: 120\r\n\r\n").await;
    assert_eq!(result, AttemptResult::Responded { status: 429, retry_after });
    let dated = "HTTP/1.1 503 Later\r\nDate: Sun, 06 Nov 1994 12:00:00 GMT\r\n\
                 Retry-After: Sun, 06 Nov 1994 12:02:00 GMT\r\n\r\n";
    assert_eq!(answered(dated).await, AttemptResult::Responded { status: 503, retry_after });
}

#[tokio::test]
async fn interim_responses_are_not_the_response() {
    let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
    let refused = format!("{interim}HTTP/1.1 422 No\r\ncontent-length: 0\r\n\r\n");
    assert_eq!(answered(refused).await, responded(422));
    assert!(error(answered("HTTP/1.1 100 Continue\r\n\r\n").await).contains("broke"));
    let upgrade = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
    assert_eq!(answered(upgrade).await, responded(101));
}

#[tokio::test]
async fn garbage_is_an_error() {
    for garbage in [
        "hello\r\n\r\n".to_owned(),
        "SSH-2.0-OpenSSH_9.6\r\n".to_owned(),
        "HTTP/1.1 2000 OK\r\n\r\n".to_owned(),
        "HTTP/2.0 200 OK\r\n\r\n".to_owned(),
        "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_owned(),
        format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)),
        format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(10_000)),
    ] {
        let text = error(answered(garbage.clone()).await);
        assert!(text.contains("127.0.0.1"), "{:.40}: {text}", garbage);
    }
}

#[tokio::test]
async fn a_success_counts_whatever_the_body_does() {
    for body in [
        "content-length: 10\r\n\r\nshort",
        "transfer-encoding: chunked\r\n\r\nnot a chunk",
        "transfer-encoding: chunked\r\n\r\n5\r\nhel",
        "content-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc",
    ] {
        assert_eq!(answered(format!("HTTP/1.1 200 OK\r\n{body}")).await, responded(200), "{body}");
    }
}

/// Some acknowledge before they read, and some never read.
#[tokio::test]
async fn a_success_counts_once_the_request_is_written() {
    // More than the kernels take while nobody reads.
    let payload = Bytes::from(vec![b'7'; 16 << 20]);
    for (answer, reads) in [
        ("content-length: 0\r\n\r\n", true),
        ("transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true),
        ("content-length: 0\r\n\r\n", false),
        ("connection: close\r\ncontent-length: 0\r\n\r\n", false),
    ] {
        let server = Server::with(move |mut stream, log| async move {
            stream.peek(&mut [0]).await.unwrap();
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{answer}").as_bytes()).await.unwrap();
            if reads {
                log.push(read_request(&mut stream).await.unwrap());
            }
        })
        .await;
        let attempt = attempt(server.url("/"));
        let message = with_payload(server.url("/"), payload.clone());
        let result = gateway(local()).send_alone(Attempt { message, ..attempt }).await;
        server.ended().await;
        if reads {
            assert_eq!((result, server.request().body.len()), (responded(200), payload.len()), "{answer}");
        } else {
            assert!(matches!(result, AttemptResult::Errored { .. }), "{answer} {result:?}");
        }
    }
}

/// Nobody sends again what was accepted: that a connection isn't kept takes back none of it.
#[tokio::test]
async fn what_was_accepted_arrives_though_the_connection_is_closed() {
    // Less than the kernels take while nobody reads.
    let payload = Bytes::from(vec![b'7'; 1 << 20]);
    for head in ["HTTP/1.1 200 OK\r\nconnection: close", "HTTP/1.0 200 OK"] {
        let closed = Arc::new(Notify::new());
        let reads = Arc::clone(&closed);
        let server = Server::with(move |mut stream, log| {
            let reads = Arc::clone(&reads);
            async move {
                stream.peek(&mut [0]).await.unwrap();
                stream.write_all(format!("{head}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await.unwrap();
                reads.notified().await;
                log.push(read_request(&mut stream).await.unwrap());
            }
        })
        .await;
        let attempt = attempt(server.url("/"));
        let message = with_payload(server.url("/"), payload.clone());
        let result = gateway(local()).send_alone(Attempt { message, ..attempt }).await;
        closed.notify_one();
        server.ended().await;
        assert_eq!((result, server.request().body.len()), (responded(200), payload.len()), "{head}");
    }
}

#[tokio::test]
async fn a_success_counts_whatever_else_is_in_its_head() {
    for line in ["Server : x", "Bad Name: x", "X-Folded: a\r\n b", "X-\u{e4}: x", "no colon"] {
        let answer = format!("HTTP/1.1 200 OK\r\n{line}\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(answered(answer).await, responded(200), "{line}");
    }
    let fields = |count: usize, value: &str| format!("x: {value}\r\n").repeat(count);
    let answer = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}content-length: 0\r\n\r\n");
    assert_eq!(answered(answer(&fields(1_000, ""))).await, responded(200));
    // What one head may take stays bounded, in fields and in bytes.
    for fields in [fields(2_000, ""), fields(1_000, &"x".repeat(256))] {
        let head = answered(answer(&fields)).await;
        assert!(matches!(head, AttemptResult::Errored { .. }), "{head:?}");
    }
}

/// Neither an endless body, nor one that says it is huge, nor one that never comes holds a request open: the socket
/// is closed when `send` returns.
#[tokio::test]
async fn bodies_are_capped() {
    for (head, flood) in [
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n", true),
        ("HTTP/1.0 200 OK\r\n\r\n", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", false),
    ] {
        let server = Server::with(move |mut stream, _| async move {
            read_request(&mut stream).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            let chunk = [b"1000\r\n".as_slice(), &[b'x'; 4096], b"\r\n"].concat();
            while flood && stream.write_all(&chunk).await.is_ok() {}
            // Ends only once the other side has closed the connection.
            while matches!(stream.read(&mut [0; 1024]).await, Ok(n) if n > 0) {}
        })
        .await;
        assert_eq!(gateway(local()).send_alone(attempt(server.url("/"))).await, responded(200), "{head}");
        server.ended().await;
    }
}

#[tokio::test]
async fn connections_that_break() {
    let closed = Server::with(|stream, _| async move { drop(stream) }).await;
    assert!(error(gateway(local()).send_alone(attempt(closed.url("/"))).await).contains("broke"));
    let silent = Server::with(|mut stream, _| async move { drop(read_request(&mut stream).await) }).await;
    assert!(error(gateway(local()).send_alone(attempt(silent.url("/"))).await).contains("broke"));
    assert_eq!(silent.connections.load(SeqCst), 1, "a request that may have been handled is not repeated");
    let reset = Server::with(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.set_zero_linger().unwrap();
    })
    .await;
    assert!(error(gateway(local()).send_alone(attempt(reset.url("/"))).await).contains("broke"));
    let nobody = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = error(gateway(local()).send_alone(attempt(format!("http://{nobody}/"))).await);
    assert!(text.contains(&format!("connecting to {nobody}: Connection refused")), "{text}");
    let text = error(gateway(local()).send_alone(attempt("http://nobody.invalid/x?y")).await);
    assert!(text.starts_with("dns: nobody.invalid: ") && !text.contains('?'), "{text}");
}

#[tokio::test]
async fn one_deadline_covers_it_all() {
    let short = Duration::from_millis(200);
    let silent = Server::with(|mut stream, _| async move {
        while matches!(stream.read(&mut [0; 1024]).await, Ok(n) if n > 0) {}
    })
    .await;
    let drip = Server::with(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await.unwrap();
        while stream.write_all(b"y").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let hasty = gateway(HttpSettings { request_timeout: short, ..local() });
    for server in [silent, drip] {
        let text = error(hasty.send_alone(attempt(server.url("/"))).await);
        let expected = format!("timed out after 200ms waiting for the response of {}", server.address);
        assert_eq!(text, expected);
        server.ended().await;
    }
    let mute = Server::with(|mut stream, _| async move {
        while matches!(stream.read(&mut [0; 1024]).await, Ok(n) if n > 0) {}
    })
    .await;
    let url = format!("https://{}/", mute.address);
    let hasty = gateway(HttpSettings { connect_timeout: short, ..local() });
    let text = error(hasty.send_alone(attempt(url)).await);
    assert!(text.starts_with("timed out after 200ms in the TLS handshake"), "{text}");
}

// --- Connections ------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn connections_are_kept_alive() {
    let server = Server::answering(|_| OK.into()).await;
    let gateway = gateway(local());
    for _ in 0..5 {
        assert_eq!(gateway.send_alone(attempt(server.url("/"))).await, responded(200));
    }
    assert_eq!((server.connections.load(SeqCst), server.requests()), (1, 5));
}

/// As many connections are kept as requests were open together.
#[tokio::test]
async fn a_burst_finds_the_connections_of_the_last() {
    const BURST: usize = 100;
    let all = Arc::new(tokio::sync::Barrier::new(BURST));
    let server = Server::with(move |mut stream, log| {
        let all = all.clone();
        async move {
            while let Some(request) = read_request(&mut stream).await {
                log.push(request);
                all.wait().await;
                stream.write_all(OK.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    let gateway = Arc::new(gateway(local()));
    for _ in 0..3 {
        let mut burst = tokio::task::JoinSet::new();
        for _ in 0..BURST {
            let (gateway, attempt) = (gateway.clone(), attempt(server.url("/")));
            burst.spawn(async move { gateway.send_alone(attempt).await });
        }
        assert_eq!(burst.join_all().await, vec![responded(200); BURST]);
    }
    assert_eq!((server.connections.load(SeqCst), server.requests()), (BURST, 3 * BURST));
}

/// A body of the cap's length is read to its end; one that is a byte longer costs the connection.
#[tokio::test]
async fn the_cap_is_exact() {
    let server = Server::answering(|_| OK.into()).await;
    for (response_cap, connections) in [(2, 1), (1, 3)] {
        server.connections.store(0, SeqCst);
        let gateway = gateway(HttpSettings { response_cap, ..local() });
        for _ in 0..3 {
            assert_eq!(gateway.send_alone(attempt(server.url("/"))).await, responded(200));
        }
        assert_eq!(server.connections.load(SeqCst), connections, "{response_cap}");
    }
}

/// A server that closes connections, having said so or not, before the next request: each request arrives once.
#[tokio::test]
async fn a_closed_idle_connection_costs_no_attempt() {
    for close in ["connection: close\r\n", ""] {
        let idle = Arc::new(tokio::sync::Notify::new());
        let kept = idle.clone();
        let server = Server::with(move |mut stream, log| {
            let kept = kept.clone();
            async move {
                log.push(read_request(&mut stream).await.unwrap());
                let answer = format!("HTTP/1.1 200 OK\r\n{close}content-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                kept.notified().await;
            }
        })
        .await;
        let gateway = gateway(local());
        for n in 1..=3 {
            assert_eq!(gateway.send_alone(attempt(server.url("/"))).await, responded(200));
            idle.notify_one();
            while server.finished.load(SeqCst) < n {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!((server.connections.load(SeqCst), server.requests()), (3, 3));
    }
}

/// A server that closes a kept connection upon the second request may have handled it.
#[tokio::test]
async fn a_request_that_was_written_is_never_repeated() {
    let server = Server::with(|mut stream, log| async move {
        log.push(read_request(&mut stream).await.unwrap());
        stream.write_all(OK.as_bytes()).await.unwrap();
        log.push(read_request(&mut stream).await.unwrap());
    })
    .await;
    let gateway = gateway(local());
    assert_eq!(gateway.send_alone(attempt(server.url("/"))).await, responded(200));
    assert!(error(gateway.send_alone(attempt(server.url("/"))).await).contains("broke"));
    assert_eq!((server.connections.load(SeqCst), server.requests()), (1, 2));
}

// --- Abort ------------------------------------------------------------------------------------------------------------

/// Reads until the other side has reset the connection, without letting any task of the runtime run meanwhile.
fn read_to_the_reset(mut peer: StdStream) {
    peer.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    loop {
        match peer.read(&mut [0; 65_536]) {
            Ok(0) => panic!("closed in order: what the kernel still held was sent"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the socket is still open: {error}"),
        }
    }
}

/// Starts a request, lets it run until the peer has it, and drops it. The runtime has one thread, and that thread then
/// blocks in a read: only the drop itself can have closed the socket.
async fn aborted(payload: Bytes) {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let message = with_payload(format!("http://{address}/"), payload);
    let gateway = gateway(local());
    let mut sending = Box::pin(gateway.send_alone(Attempt { message, ..attempt("") }));
    let peer = tokio::select! {
        result = &mut sending => panic!("{result:?}"),
        peer = tokio::task::spawn_blocking(move || {
            let (peer, _) = listener.accept().unwrap();
            peer.peek(&mut [0]).unwrap();
            peer
        }) => peer.unwrap(),
    };
    drop(sending);
    read_to_the_reset(peer);
}

#[tokio::test]
async fn dropping_a_request_closes_its_socket_at_once() {
    aborted(Bytes::from_static(b"{}")).await;
}

/// What the kernel still held of the body doesn't reach a receiver that was slow to read.
#[tokio::test]
async fn dropping_a_request_discards_what_is_unsent() {
    aborted(Bytes::from(vec![b'x'; 64 << 20])).await;
}

/// In order, since what it sent was accepted.
#[tokio::test]
async fn dropping_a_request_while_its_body_is_drained_closes_its_socket() {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (gateway, known) = (gateway(local()), OnceLock::new());
    let mut sending = Box::pin(gateway.send(attempt(format!("http://{address}/")), || true, &known));
    let peer = tokio::task::spawn_blocking(move || {
        let (mut peer, _) = listener.accept().unwrap();
        peer.peek(&mut [0]).unwrap();
        std::io::Write::write_all(&mut peer, b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n").unwrap();
        peer
    });
    tokio::select! {
        result = &mut sending => panic!("{result:?}"),
        () = async { while known.get().is_none() { tokio::task::yield_now().await } } => {}
    }
    let mut peer = peer.await.unwrap();
    drop(sending);
    // No task of the runtime runs meanwhile.
    peer.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut request = Vec::new();
    peer.read_to_end(&mut request).expect("it is closed, and in order");
    assert!(request.ends_with(&attempt("").message.payload), "and has brought all of it");
}

// --- TLS --------------------------------------------------------------------------------------------------------------

fn certificate(name: &str) -> (TlsAcceptor, RootCertStore) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    (TlsAcceptor::from(Arc::new(server)), roots)
}

fn trusting(roots: RootCertStore) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

async fn tls_server(acceptor: TlsAcceptor) -> Server {
    Server::with(move |stream, log| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            while let Some(request) = read_request(&mut stream).await {
                log.push(request);
                stream.write_all(OK.as_bytes()).await.unwrap();
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_success_over_tls_counts_once_the_request_is_written() {
    let (acceptor, roots) = certificate("localhost");
    let payload = Bytes::from(vec![b'7'; 16 << 20]);
    for reads in [true, false] {
        let acceptor = acceptor.clone();
        let server = Server::with(move |stream, log| {
            let acceptor = acceptor.clone();
            async move {
                let mut stream = acceptor.accept(stream).await.unwrap();
                let first = [stream.read_u8().await.unwrap()];
                stream.write_all(OK.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                if reads {
                    let mut whole = tokio::io::AsyncReadExt::chain(first.as_slice(), stream);
                    log.push(read_request(&mut whole).await.unwrap());
                }
            }
        })
        .await;
        let url = format!("https://localhost:{}/", server.address.port());
        let gateway = HttpGateway::with_tls(settings(&["localhost"]), trusting(roots.clone())).unwrap();
        let message = with_payload(url.clone(), payload.clone());
        let result = gateway.send_alone(Attempt { message, ..attempt(url) }).await;
        server.ended().await;
        if reads {
            assert_eq!((result, server.request().body.len()), (responded(200), payload.len()));
        } else {
            assert!(matches!(result, AttemptResult::Errored { .. }), "{result:?}");
        }
    }
}

#[tokio::test]
async fn tls_is_verified() {
    let (acceptor, roots) = certificate("localhost");
    let server = tls_server(acceptor).await;
    let port = server.address.port();
    let settings = || settings(&["localhost", "127.0.0.0/8"]);
    let url = format!("https://localhost:{port}/x?key=hunter2");

    let trusted = HttpGateway::with_tls(settings(), trusting(roots.clone())).unwrap();
    for _ in 0..2 {
        assert_eq!(trusted.send_alone(attempt(url.clone())).await, responded(200));
    }
    let good = server.connections.load(SeqCst);
    assert_eq!(server.requests(), 2);

    let wrong_name = error(trusted.send_alone(attempt(format!("https://127.0.0.1:{port}/"))).await);
    assert!(wrong_name.starts_with(&format!("TLS with 127.0.0.1:{port}: ")), "{wrong_name}");
    let (_, others) = certificate("localhost");
    let stranger = HttpGateway::with_tls(settings(), trusting(others)).unwrap();
    let text = error(stranger.send_alone(attempt(url.clone())).await);
    assert!(text.starts_with("TLS with localhost:") && text.contains("certificate"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    // The machine's own authorities, if it has any, don't vouch for it either.
    let machine = gateway(settings());
    let text = error(machine.send_alone(attempt(url)).await);
    assert!(text.starts_with("TLS "), "{text}");
    assert_eq!(server.requests(), 2, "no request went to a server that was not verified");
    assert!(good >= 1);

    let plain =
        Server::with(|mut stream, _| async move { stream.write_all(OK.as_bytes()).await.unwrap() }).await;
    let text = error(trusted.send_alone(attempt(format!("https://{}/", plain.address))).await);
    assert!(text.starts_with("TLS with "), "{text}");
}

#[tokio::test]
async fn the_status_is_known_while_the_body_still_drips() {
    let server = Server::with(|mut stream, _| async move {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").await.unwrap();
        while matches!(stream.read(&mut [0; 1024]).await, Ok(n) if n > 0) {}
    })
    .await;
    let (gateway, known) = (gateway(local()), OnceLock::new());
    let mut sending = Box::pin(gateway.send(attempt(server.url("/")), || true, &known));
    tokio::select! {
        result = &mut sending => panic!("the body has not ended: {result:?}"),
        () = async { while known.get().is_none() { tokio::task::yield_now().await } } => {}
    }
    drop(sending);
    assert_eq!(known.into_inner(), Some(responded(200)));
}

#[tokio::test]
async fn nothing_is_sent_once_it_is_too_late_to_start() {
    let server = Server::answering(|_| OK.into()).await;
    let gateway = gateway(local());
    let late = gateway.send(attempt(server.url("/")), || false, &OnceLock::new()).await;
    assert_eq!(late, None);
    assert_eq!(gateway.send_alone(attempt(server.url("/second"))).await, responded(200));
    assert_eq!((server.requests(), server.request().line.as_str()), (1, "POST /second HTTP/1.1"));
}
