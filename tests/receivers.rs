//! The receivers of `deploy/receivers`, in every language that is at hand: signatures and duplicates.

#[path = "../deploy/receivers/receiver.rs"]
#[expect(unreachable_pub, reason = "it is written for an application of its own")]
mod receiver;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use leasehold::adapters::http::{Secret, Signer};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER: &str = "whsec_c3RyYW5nZXIgc2VjcmV0IG9mIDI0IGJ5dGVz";
const BODY: &str = r#"{"order": 17, "name": "Zoë"}"#;

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() as i64
}

fn sign(secrets: &[&str], event: &str, timestamp: i64) -> String {
    let secrets: Vec<Secret> = secrets.iter().map(|secret| secret.parse().expect("a secret")).collect();
    Signer::new(&secrets).expect("a secret").sign(event, timestamp, BODY.as_bytes())
}

struct Sent<'a> {
    event: &'a str,
    token: i64,
    timestamp: i64,
    signature: String,
    body: &'a str,
}

/// Sends one request; returns status and body.
async fn send(port: u16, sent: Sent<'_>) -> (u16, String) {
    let Sent { event, token, timestamp, signature, body } = sent;
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    let request = format!(
        "POST /hook HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nwebhook-id: {event}\r\nwebhook-timestamp: {timestamp}\r\n\
         webhook-signature: {signature}\r\nwebhook-attempt: 1\r\nwebhook-lease-token: {token}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut response = String::new();
    stream.read_to_string(&mut response).await.expect("it answers");
    let status = response.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
    let known = ["late duplicate", "duplicate", "new", "bad signature"];
    let word = known.into_iter().find(|word| response.split("\r\n\r\n").nth(1).unwrap_or("").contains(word));
    (status, word.unwrap_or_else(|| panic!("no answer in {response:?}")).to_owned())
}

/// Breaks a request off in the middle of its body, as a worker does that loses its lease.
async fn break_off(port: u16) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    let half = "POST /hook HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(half.as_bytes()).await.expect("it reads");
    stream.set_zero_linger().expect("a socket");
}

async fn tells_them_apart(port: u16) {
    let timestamp = now();
    let good = |event, token| Sent {
        event,
        token,
        timestamp,
        signature: sign(&[SECRET], event, timestamp),
        body: BODY,
    };
    break_off(port).await;
    let answers = |status, word: &str| (status, word.to_owned());
    let refused = answers(401, "bad signature");
    assert_eq!(send(port, good("a", 10)).await, answers(200, "new"));
    assert_eq!(send(port, good("a", 12)).await, answers(200, "duplicate"));
    assert_eq!(send(port, good("a", 11)).await, answers(200, "late duplicate"));
    assert_eq!(send(port, good("b", 9_007_199_254_740_993)).await, answers(200, "new"));
    assert_eq!(
        send(port, good("b", 9_007_199_254_740_994)).await,
        answers(200, "duplicate"),
        "tokens are integers"
    );
    let rotated = Sent { signature: sign(&[OTHER, SECRET], "c", timestamp), ..good("c", 1) };
    assert_eq!(send(port, rotated).await, answers(200, "new"), "the second signature fits");
    let stranger = Sent { signature: sign(&[OTHER], "d", timestamp), ..good("d", 1) };
    assert_eq!(send(port, stranger).await, refused);
    assert_eq!(send(port, Sent { body: r#"{"order": 18, "name": "Zoë"}"#, ..good("d", 1) }).await, refused);
    assert_eq!(send(port, Sent { event: "e", ..good("d", 1) }).await, refused);
    for timestamp in [timestamp - 400, timestamp + 400] {
        let signature = sign(&[SECRET], "d", timestamp);
        assert_eq!(send(port, Sent { timestamp, signature, ..good("d", 1) }).await, refused);
    }
    assert_eq!(send(port, good("d", 1)).await, answers(200, "new"), "what was refused is not known");
}

/// A process and those that it has started, killed on drop.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

/// Starts an example and tries it, if its language is at hand.
async fn example(program: &str, arguments: &[&str]) {
    let version = if program == "go" { "version" } else { "--version" };
    if !Command::new(program)
        .arg(version)
        .stdout(Stdio::null())
        .status()
        .await
        .is_ok_and(|status| status.success())
    {
        println!("{program} is not on this machine: its receiver is not tried");
        return;
    }
    let port = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port").local_addr().expect("bound").port();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/receivers");
    let mut receiver = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .env("WEBHOOK_SECRET", SECRET)
        .env("PORT", port.to_string())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stderr(Stdio::null())
        // `go run` starts the program that it made, and does not take it along when it is killed.
        .process_group(0)
        .spawn()
        .expect("it starts");
    let _group = Group(receiver.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it runs"));
    let start = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(receiver.try_wait().expect("an own child").is_none(), "{program} ended");
        assert!(start.elapsed() < Duration::from_secs(90), "{program} does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tells_them_apart(port).await;
}

#[tokio::test]
async fn rust() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(receiver::serve(listener, SECRET));
    tells_them_apart(port).await;
}

#[tokio::test]
async fn python() {
    example("python3", &["receiver.py"]).await;
}

#[tokio::test]
async fn javascript() {
    example("node", &["receiver.mjs"]).await;
}

#[tokio::test]
async fn go() {
    example("go", &["run", "receiver.go"]).await;
}
