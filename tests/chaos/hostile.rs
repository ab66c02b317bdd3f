//! Destinations that mean harm, by the thousand, beside one that doesn't.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tokio_rustls::{TlsAcceptor, rustls};

use crate::ALONE;
use crate::bed::memory;
use crate::common::receiver::accept;
use crate::common::{MS, PATIENCE, Receiver};
use crate::ground::Ground;

/// Serves every connection in a task of its own.
async fn serve<F: Future<Output = ()> + Send + 'static>(each: fn(TcpStream) -> F) -> SocketAddr {
    // All of 127.0.0.0/8, so that there can be as many destinations as are wanted.
    let listener = TcpListener::bind(("0.0.0.0", 0)).await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        loop {
            tokio::spawn(each(accept(&listener).await));
        }
    });
    address
}

/// A header that never ends, byte by byte.
async fn slow_headers(mut stream: TcpStream) {
    let mut head = [0; 1_024];
    let _ = stream.read(&mut head).await;
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nx-slow: ").await;
    while stream.write_all(b"a").await.is_ok() {
        sleep(200 * MS).await;
    }
}

/// A success whose body never ends.
async fn endless_body(mut stream: TcpStream) {
    let mut head = [0; 1_024];
    let _ = stream.read(&mut head).await;
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
    while stream.write_all(&[b'a'; 16 * 1_024]).await.is_ok() {}
}

/// Reads a request's head, and answers with these bytes to its end.
async fn say(mut stream: TcpStream, answer: &[u8]) {
    let mut head = [0; 1_024];
    let _ = stream.read(&mut head).await;
    let _ = stream.write_all(answer).await;
    let _ = stream.shutdown().await;
}

/// Goes on about continuing before it answers.
async fn many_continues(stream: TcpStream) {
    let mut answer = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(20);
    answer.extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    say(stream, &answer).await;
}

/// The protocol of 1996, whose body ends with the connection.
async fn old_protocol(stream: TcpStream) {
    say(stream, b"HTTP/1.0 200 Fine\r\n\r\nthank you").await;
}

/// An answer in no protocol.
async fn garbage(stream: TcpStream) {
    say(stream, b"\x15\x03\x01\xff\0zzzz not what you asked for\r\n\r\n").await;
}

/// Resets the connection once the request is there.
async fn reset(stream: TcpStream) {
    let _ = stream.readable().await;
    // What was not read makes the close a reset.
    drop(stream);
}

/// A TLS server whose certificate nobody trusts.
async fn bad_certificate(stream: TcpStream) {
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("a key");
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .expect("a certificate");
    let _ = TlsAcceptor::from(Arc::new(config)).accept(stream).await;
}

/// Thousands of open requests that lead nowhere neither hold up a healthy destination nor cost memory, and what is said
/// about each failure names its cause.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_hostile_destinations_harm_no_other() {
    let _alone = ALONE.lock().await;
    let (mut ground, server) = Ground::new().await;
    ground.set(&[
        ("MAX_IN_FLIGHT", "3000"),
        ("MAX_LEASED", "4000"),
        // So many requests at once are no test of short leases.
        ("LEASE", "30s"),
        ("STORE_TIMEOUT", "5s"),
        ("REQUEST_TIMEOUT", "6s"),
        ("CONNECT_TIMEOUT", "2s"),
    ]);
    let healthy = Receiver::start(|_| (5 * MS, 200)).await;
    let refused = {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        listener.local_addr().expect("bound").port()
    };
    // Kind, how many, and where to: `%s` stands for the last three bytes of an address.
    let kinds = [
        ("slow", 2_000, format!("http://127.%s:{}/", serve(slow_headers).await.port())),
        ("endless", 100, format!("http://127.%s:{}/", serve(endless_body).await.port())),
        ("certificate", 20, format!("https://127.0.0.1:{}/", serve(bad_certificate).await.port())),
        ("continues", 50, format!("http://127.%s:{}/", serve(many_continues).await.port())),
        ("garbage", 50, format!("http://127.%s:{}/", serve(garbage).await.port())),
        ("name", 20, "http://host-%s.invalid/".to_owned()),
        ("old", 50, format!("http://127.%s:{}/", serve(old_protocol).await.port())),
        ("refused", 300, format!("http://127.%s:{refused}/")),
        ("reset", 50, format!("http://127.%s:{}/", serve(reset).await.port())),
        ("tls", 20, format!("https://{}/", healthy.address)),
    ];
    let mut connection = server.admin().await;
    for (kind, count, url) in &kinds {
        sqlx::query(
            "insert into leasehold.outbox_events (event_id, event_type, destination_url, payload, max_attempts)
             select $1 || n, $1, replace($3, '%s', format('1.%s.%s', n / 250, 1 + n % 250)), '{}', 2
             from generate_series(1, $2) n",
        )
        .bind(kind)
        .bind(count)
        .bind(url)
        .execute(&mut connection)
        .await
        .expect("an insert");
    }
    let mut worker = ground.worker("worker", &server.url());
    let leased =
        "select count(*) from leasehold.outbox_events where event_type = 'slow' and lease_owner is not null";
    let start = Instant::now();
    while sqlx::query_scalar::<_, i64>(leased).fetch_one(&mut connection).await.expect("a count") < 1_500 {
        assert!(start.elapsed() < PATIENCE, "the slow ones are not under way");
        sleep(20 * MS).await;
    }
    sqlx::query(
        "insert into leasehold.outbox_events (event_id, event_type, destination_url, payload)
         select 'healthy' || n, 'healthy', $1, '{}' from generate_series(1, 200) n",
    )
    .bind(healthy.url())
    .execute(&mut connection)
    .await
    .expect("an insert");
    let mut most = 0;
    let outcomes: Vec<(String, String, i32, Option<String>)> = loop {
        most = most.max(memory(&worker, "VmRSS:").expect("it runs"));
        let pending: i64 = sqlx::query_scalar(
            "select count(*) from leasehold.outbox_events where delivery_status = 'pending'",
        )
        .fetch_one(&mut connection)
        .await
        .expect("a count");
        if pending == 0 {
            break sqlx::query_as(
                "select event_type, delivery_status, attempts, last_error from leasehold.outbox_events",
            )
            .fetch_all(&mut connection)
            .await
            .expect("the table");
        }
        assert!(start.elapsed() < PATIENCE, "{pending} events are still pending");
        sleep(50 * MS).await;
    };
    println!("hostile destinations: at most {most} KiB");
    let expected = [
        ("certificate", 20, "failed", 2, "TLS"),
        ("continues", 50, "delivered", 1, ""),
        ("endless", 100, "delivered", 1, ""),
        ("garbage", 50, "failed", 2, "did not answer in HTTP"),
        ("healthy", 200, "delivered", 1, ""),
        ("name", 20, "failed", 2, ".invalid"),
        ("old", 50, "delivered", 1, ""),
        ("refused", 300, "failed", 2, "refused"),
        ("reset", 50, "failed", 2, "broke"),
        ("slow", 2_000, "failed", 2, "timed out"),
        ("tls", 20, "failed", 2, "TLS"),
    ];
    assert_eq!(outcomes.len(), expected.iter().map(|(_, count, ..)| count).sum::<usize>());
    for (kind, status, attempts, error) in &outcomes {
        let wanted = expected.iter().find(|(expected, ..)| expected == kind).expect("a kind");
        assert_eq!((status.as_str(), *attempts), (wanted.2, wanted.3), "{kind}: {error:?}");
        assert!(error.as_deref().unwrap_or("").contains(wanted.4), "{kind}: {error:?}");
    }
    // The healthy destination got each event once, and none waited for the slow ones.
    let seen = healthy.seen();
    assert_eq!(seen.iter().filter(|seen| seen.event.starts_with("healthy")).count(), 200);
    let late: i64 = sqlx::query_scalar(
        "select count(*) from leasehold.outbox_events as healthy where event_type = 'healthy' and delivered_at >
             (select min(updated_at) from leasehold.outbox_events where event_type = 'slow' and attempts = 2)",
    )
    .fetch_one(&mut connection)
    .await
    .expect("a count");
    assert_eq!(late, 0, "of the healthy, after the first slow one had timed out twice");
    assert!(most < 256 * 1_024, "{most} KiB");
    worker.signal(rustix::process::Signal::TERM);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    ground.assert_logs_are_clean();
}
