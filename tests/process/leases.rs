//! The promise, on real parts.

use std::time::Duration;

use crate::bed::{Bed, MS, Receiver, most_open};

/// Lease 1 s, destinations that answer after 4 s, three workers, more events than may be in flight, so that claimed
/// events wait in the queue longer than a lease.
#[tokio::test(flavor = "multi_thread")]
async fn deliveries_far_longer_than_the_lease_get_exactly_one_request() {
    let bed = Bed::new().await.set(&[
        // The promise is for a store that answers; beside other tests its disk may not for half a second.
        ("LEASE", "2s"),
        ("MAX_IN_FLIGHT", "4"),
        ("MAX_IN_FLIGHT_PER_DESTINATION", "4"),
        ("MAX_LEASED", "8"),
        ("CLAIM_BATCH", "8"),
    ]);
    let receiver = Receiver::start(|_| (6_000 * MS, 200)).await;
    bed.insert(&receiver.url(), 24).await;
    let mut workers = ["a", "b", "c"].map(|name| bed.worker(name, &["--until-empty"]));
    bed.until("lease_owner is not null", 24).await;
    for worker in &mut workers {
        assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    }
    assert_eq!(bed.count("delivery_status = 'delivered' and attempts = 1 and reclaims = 0").await, 24);
    let events = receiver.by_event();
    assert_eq!(events.len(), 24);
    for (event, seen) in events {
        let logs = || workers.each_ref().map(|worker| worker.log()).join("\n");
        assert_eq!(seen.len(), 1, "{event} got {seen:?}\n{}", logs());
    }
}

/// A worker killed in the middle of its attempts: its events are taken over after L + G and not before.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_workers_events_are_taken_over_after_lease_and_grace() {
    let bed = Bed::new().await.set(&[("LEASE", "2s"), ("RECLAIM_GRACE", "500ms")]);
    // The first request of an event never ends by itself.
    let receiver = Receiver::start(|_| (3_600_000 * MS, 200)).await;
    bed.insert(&receiver.url(), 6).await;
    let mut victim = bed.worker("victim", &[]);
    receiver.until_seen(6).await;
    victim.child.kill().await.expect("SIGKILL");
    let heir = bed.worker("heir", &[]);
    let mut early = 0;
    // Every reading comes from one statement, so that the database's clock and the rows belong together.
    let takeover = loop {
        let (leased_to_victim, expired, taken): (i64, i64, i64) = sqlx::query_as(
            "select count(*) filter (where lease_owner like 'victim%'),
                    count(*) filter (where lease_owner like 'victim%' and lease_until + interval '500 ms' <= clock_timestamp()),
                    count(*) filter (where lease_owner like 'heir%')
             from leasehold.outbox_events",
        )
        .fetch_one(&bed.pool)
        .await
        .expect("a reading");
        early += i64::from(leased_to_victim == 6 && expired == 0);
        if taken == 6 {
            break taken;
        }
        tokio::time::sleep(5 * MS).await;
    };
    assert_eq!(takeover, 6);
    assert!(early > 0, "the heir was watching while the leases were live");
    // By the database's own record: a token is the claim's time in milliseconds, or higher.
    let early: i64 = sqlx::query_scalar(
        "select count(*) from leasehold.outbox_events where reclaims <> 1 or attempts <> 0 or lease_token < 1000000000000",
    )
    .fetch_one(&bed.pool)
    .await
    .expect("a reading");
    assert_eq!(early, 0);
    receiver.until_seen(12).await;
    for (event, seen) in receiver.by_event() {
        assert_eq!(seen.len(), 2, "{event}");
        assert!(seen[1].token > seen[0].token, "the token rises");
        // The token of a claim is its moment by the database's clock: at least L + G lie between the last possible
        // renewal's base and the takeover, and the kill came after the first claim.
        let apart = seen[1].token - seen[0].token;
        assert!(apart >= 2_500, "{event} was taken over {apart} ms after its claim");
        assert_eq!(most_open(&seen), 1, "{event}");
    }
    drop(heir);
}

/// A worker that is stopped for longer than its lease and continued acts on no dead lease.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_stopped_past_its_lease_fences_itself_when_it_goes_on() {
    let bed = Bed::new().await.set(&[("LEASE", "1s")]);
    let receiver = Receiver::start(|seen| (if seen.attempt == 1 { 8_000 * MS } else { MS }, 200)).await;
    bed.insert(&receiver.url(), 1).await;
    let stopped = bed.worker("stopped", &[]);
    receiver.until_seen(1).await;
    stopped.signal(rustix::process::Signal::STOP);
    let _heir = bed.worker("heir", &[]);
    bed.until("lease_owner like 'heir%'", 1).await;
    stopped.signal(rustix::process::Signal::CONT);
    stopped.logs("lease fenced").await;
    bed.until("delivery_status = 'delivered'", 1).await;
    let seen = receiver.seen();
    let first = &seen[0];
    assert!(
        first.closed.is_some() && first.answered.is_none(),
        "the stopped worker's request was aborted: {first:?}"
    );
    assert_eq!(bed.count("attempts = 1").await, 1, "only the heir's try was settled");
}

/// The database's connections are cut under a worker with open requests: it reconnects and nothing is sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn cut_connections_are_healed_within_the_lease() {
    let bed = Bed::new().await.set(&[("LEASE", "3s")]);
    let receiver = Receiver::start(|_| (5_000 * MS, 200)).await;
    bed.insert(&receiver.url(), 5).await;
    let mut worker = bed.worker("w", &["--until-empty"]);
    receiver.until_seen(5).await;
    for _ in 0..3 {
        sqlx::query("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
            .execute(&bed.pool)
            .await
            .expect("a superuser may");
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    assert!(receiver.by_event().values().all(|seen| seen.len() == 1));
}
