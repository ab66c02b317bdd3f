//! What a worker shows of itself at `admin_addr`.

use std::net::SocketAddr;
use std::time::Instant;

use rustix::process::Signal;
use sqlx::Executor as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use crate::bed::{Bed, MS, Receiver};
use crate::common::{PATIENCE, Worker};

/// Where it says that it serves.
async fn address(worker: &Worker) -> SocketAddr {
    worker.logs("address=").await;
    let log = worker.log();
    let address = log.split("address=").nth(1).and_then(|rest| rest.split_whitespace().next());
    address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no address in:\n{log}"))
}

/// Status code, header lines and body.
async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String, String) {
    let asking = async {
        let mut stream = TcpStream::connect(address).await.expect("the worker listens");
        let request = format!("{method} {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    };
    let answer = tokio::time::timeout(PATIENCE, asking).await.expect("an answer in time");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status code");
    (code, head.to_lowercase(), body.to_owned())
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let (code, _, body) = ask(address, "GET", path).await;
    (code, body)
}

async fn until(address: SocketAddr, path: &str, wanted: impl Fn(u16, &str) -> bool) {
    let start = Instant::now();
    loop {
        let (code, body) = get(address, path).await;
        if wanted(code, &body) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{path} is still {code} {body}");
        sleep(50 * MS).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_shows_what_it_does_and_how_it_is() {
    // What is tried again, and what is open, stays as it is.
    let still = [("ADMIN_ADDR", "127.0.0.1:0"), ("RETRY_INITIAL", "1h"), ("REQUEST_TIMEOUT", "5m")];
    let bed = Bed::new().await.set(&still);
    let good = Receiver::start(|_| (MS, 200)).await;
    let bad = Receiver::start(|_| (MS, 500)).await;
    let slow = Receiver::start(|_| (300_000 * MS, 200)).await;
    bed.insert(&good.url(), 3).await;
    bed.insert(&bad.url(), 2).await;
    let worker = bed.worker("w", &[]);
    let address = address(&worker).await;
    bed.until("delivery_status = 'delivered'", 3).await;
    bed.until("attempts = 1 and lease_owner is null", 5).await;

    assert_eq!(get(address, "/healthz").await, (200, "alive\n".to_owned()));
    assert_eq!(get(address, "/readyz").await, (200, "ready\n".to_owned()));
    until(address, "/metrics", |_, text| text.contains("leasehold_outbox_events{state=\"delivered\"} 3\n"))
        .await;
    let (code, head, text) = ask(address, "GET", "/metrics").await;
    assert_eq!(code, 200);
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    for line in [
        "leasehold_settles_total{outcome=\"delivered\"} 3",
        "leasehold_settles_total{outcome=\"retry\"} 2",
        "leasehold_settles_total{outcome=\"failed\"} 0",
        "leasehold_heartbeats_ended_total{why=\"settled\"} 5",
        "leasehold_heartbeats_ended_total{why=\"lost\"} 0",
        "leasehold_store_failures_total{call=\"claim\",fault=\"refused\"} 0",
        "leasehold_events_reclaimed_total 0",
        "leasehold_probations_total 0",
        "leasehold_settles_abandoned_total 0",
        "leasehold_events_failed_by_claim_total{spent=\"attempts\"} 0",
        "leasehold_leases_held 0",
        "leasehold_requests_open 0",
        "leasehold_store_failing 0",
        "leasehold_claims_answered 1",
        "leasehold_draining 0",
        "leasehold_outbox_events{state=\"waiting\"} 2",
        "leasehold_outbox_oldest_due_age_seconds 0.0",
    ] {
        assert!(text.lines().any(|said| said == line), "no {line} in\n{text}");
    }

    bed.insert(&slow.url(), 1).await;
    until(address, "/api/status", |code, body| {
        let status: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let worker = &status["worker"];
        code == 200
            && (&status["pending"], &status["leased"], &status["retrying"])
                == (&3.into(), &1.into(), &2.into())
            && (&status["delivered"], &status["failed"], &status["due"]) == (&3.into(), &0.into(), &0.into())
            && status["oldest_due_age_seconds"].is_null()
            && worker["id"].as_str().is_some_and(|id| id.starts_with("w-"))
            && (&worker["leases_held"], &worker["requests_open"]) == (&1.into(), &1.into())
            && worker["problem"].is_null()
    })
    .await;

    let (code, head, page) = ask(address, "GET", "/").await;
    assert!(
        code == 200 && head.contains("text/html") && page.contains("api/status"),
        "{code} {head}\n{page}"
    );
    let (code, head, body) = ask(address, "HEAD", "/metrics").await;
    assert!(code == 200 && body.is_empty(), "{code} {head}\n{body}");
    let (code, head, _) = ask(address, "POST", "/healthz").await;
    assert!(code == 405 && head.contains("allow: get, head"), "{code} {head}");
    assert_eq!(get(address, "/secrets").await.0, 404);

    worker.signal(Signal::TERM);
    until(address, "/readyz", |code, body| code == 503 && body.starts_with("draining")).await;
    assert_eq!(get(address, "/healthz").await.0, 200, "it is alive until it has drained");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_database_is_alive_and_not_ready() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = nobody.local_addr().expect("bound").port();
    drop(nobody);
    let mut bed = Bed::new().await.set(&[("ADMIN_ADDR", "127.0.0.1:0")]);
    bed.url = format!("postgres://someone:opensesame@127.0.0.1:{port}/none");
    let worker = bed.worker("w", &[]);
    let address = address(&worker).await;
    assert_eq!(get(address, "/healthz").await.0, 200);
    until(address, "/readyz", |code, body| (code, body) == (503, "the database does not answer\n")).await;
    let (_, text) = get(address, "/metrics").await;
    assert!(text.contains("\nleasehold_store_failing 1\n") && !text.contains("leasehold_outbox"), "{text}");
    let (code, body) = get(address, "/api/status").await;
    assert!(code == 503 && body.contains("error") && !body.contains("opensesame"), "{code} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_claims_are_refused_is_not_ready_until_they_are_answered() {
    let bed = Bed::new().await.set(&[("ADMIN_ADDR", "127.0.0.1:0")]);
    let worker = bed.worker("w", &[]);
    let address = address(&worker).await;
    until(address, "/readyz", |code, _| code == 200).await;
    until(address, "/metrics", |_, text| text.contains("leasehold_outbox")).await;
    // What claims, looks and counts all need.
    let rename = |from: &str, to: &str| format!("alter function leasehold.{from}() rename to {to}");
    bed.pool.execute(sqlx::AssertSqlSafe(rename("early_now", "gone"))).await.expect("an owner's right");
    until(address, "/readyz", |code, body| code == 503 && body.contains("refused: the log says why")).await;
    until(address, "/metrics", |_, text| {
        text.contains("\nleasehold_claims_answered 0\n")
            && text.contains("\nleasehold_store_failing 0\n")
            && !text.contains("leasehold_outbox")
    })
    .await;
    bed.pool.execute(sqlx::AssertSqlSafe(rename("gone", "early_now"))).await.expect("an owner's right");
    until(address, "/readyz", |code, _| code == 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_or_takes_no_answer_keeps_nobody_out_and_no_worker_from_ending() {
    let bed = Bed::new().await.set(&[("ADMIN_ADDR", "127.0.0.1:0")]);
    let mut worker = bed.worker("w", &[]);
    let address = address(&worker).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(address).await.expect("the worker listens"));
    }
    for _ in 0..20 {
        let mut stream = TcpStream::connect(address).await.expect("the worker listens");
        let request = "GET /metrics HTTP/1.1\r\nhost: worker\r\n\r\n".repeat(100);
        stream.write_all(request.as_bytes()).await.expect("room for it in the kernel");
        silent.push(stream);
    }
    assert_eq!(get(address, "/healthz").await.0, 200);
    silent.push(TcpStream::connect(address).await.expect("the worker listens"));
    worker.signal(Signal::TERM);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_taken_is_an_error_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    let bed = Bed::new().await.set(&[("ADMIN_ADDR", &address)]);
    let mut worker = bed.worker("w", &[]);
    assert_eq!(worker.end().await, Some(1));
    assert!(
        worker.log().contains(&format!("admin_addr: {address} can't be listened at")),
        "{}",
        worker.log()
    );
}
