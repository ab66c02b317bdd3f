//! Draining and exit codes.

use rustix::process::Signal;

use crate::bed::{Bed, MS, Receiver};

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_in_time_finishes_what_is_open_and_releases_the_rest() {
    let bed = Bed::new().await.set(&[("LEASE", "1s"), ("MAX_IN_FLIGHT", "2")]);
    let receiver = Receiver::start(|_| (1_500 * MS, 200)).await;
    bed.insert(&receiver.url(), 5).await;
    let mut worker = bed.worker("w", &[]);
    receiver.until_seen(2).await;
    worker.signal(Signal::TERM);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    assert_eq!(bed.count("delivery_status = 'delivered'").await, 2);
    assert_eq!(bed.count("delivery_status = 'pending' and lease_owner is null and attempts = 0").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_must_abort_exits_3_and_delays_what_it_aborted() {
    let bed = Bed::new().await.set(&[("LEASE", "1s"), ("DRAIN_TIMEOUT", "1s")]);
    let receiver = Receiver::start(|_| (3_600_000 * MS, 200)).await;
    bed.insert(&receiver.url(), 1).await;
    let mut worker = bed.worker("w", &[]);
    receiver.until_seen(1).await;
    worker.signal(Signal::TERM);
    assert_eq!(worker.end().await, Some(3), "{}", worker.log());
    assert_eq!(bed.count("lease_owner is null and attempts = 0 and next_attempt_at > created_at").await, 1);
    let seen = receiver.seen();
    assert!(seen[0].closed.is_some(), "its socket is closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once() {
    let bed = Bed::new().await;
    let receiver = Receiver::start(|_| (3_600_000 * MS, 200)).await;
    bed.insert(&receiver.url(), 1).await;
    let mut worker = bed.worker("w", &[]);
    receiver.until_seen(1).await;
    worker.signal(Signal::TERM);
    worker.logs("draining").await;
    worker.signal(Signal::INT);
    assert_eq!(worker.end().await, Some(130), "{}", worker.log());
}

/// Nothing on the server bounds what is asked without prepared statements.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_can_not_be_looked_at_holds_up_neither_work_nor_a_signal() {
    let bed = Bed::new().await.set(&[("PREPARED_STATEMENTS", "false"), ("STORE_TIMEOUT", "4s")]);
    let receiver = Receiver::start(|_| (MS, 200)).await;
    bed.insert(&receiver.url(), 1).await;
    let mut locked = bed.pool.begin().await.expect("a transaction");
    let lock = sqlx::raw_sql("lock table leasehold.migrations in access exclusive mode");
    lock.execute(&mut *locked).await.expect("the lock");
    let mut told = bed.worker("told", &[]);
    told.logs("worker started").await;
    told.signal(Signal::TERM);
    assert_eq!(told.end().await, Some(0), "{}", told.log());
    assert!(!told.log().contains("draining"), "it has not begun:\n{}", told.log());
    let mut worker = bed.worker("w", &["--until-empty"]);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    assert_eq!(bed.count("delivery_status = 'delivered'").await, 1);
    drop(locked);
}

/// The database does not answer yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_it_starts_is_a_drain_as_well() {
    let mut bed = Bed::new().await.set(&[("STORE_TIMEOUT", "2s"), ("LEASE", "12s")]);
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    bed.url = format!("postgres://postgres@{}/postgres", silent.local_addr().expect("bound"));
    let mut worker = bed.worker("w", &[]);
    worker.logs("worker started").await;
    worker.signal(Signal::TERM);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
}
