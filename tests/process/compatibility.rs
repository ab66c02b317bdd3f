//! A table of the old kind, moved in by `INSERT … SELECT`, is worked off as tabulated here.

use crate::bed::{Bed, MS, Receiver};

/// Status, attempts, max_attempts, then what they are after one round against a receiver that answers 500, and the
/// jitter-free backoff in seconds (initial 5 s, doubling, at most 60 s).
type Old = (&'static str, i32, i32, &'static str, i32, Option<i64>);
const OLD: [Old; 8] = [
    ("pending", 0, 20, "pending", 1, Some(5)),
    ("pending", 1, 20, "pending", 2, Some(10)),
    ("pending", 2, 20, "pending", 3, Some(20)),
    ("pending", 5, 20, "pending", 6, Some(60)),
    ("pending", 4, 5, "failed", 5, None),
    ("pending", 7, 5, "failed", 7, None),
    ("delivered", 3, 20, "delivered", 3, None),
    ("failed", 20, 20, "failed", 20, None),
];

#[tokio::test(flavor = "multi_thread")]
async fn an_old_outbox_is_worked_off_with_its_counters_and_backoff() {
    let bed = Bed::new().await.set(&[("RETRY_INITIAL", "5s"), ("RETRY_MAX", "60s")]);
    let receiver = Receiver::start(|_| (MS, 500)).await;
    sqlx::raw_sql(
        "create table old_outbox (
           id bigint primary key, event_type text, destination_url text, payload jsonb, delivery_status text,
           attempts int, max_attempts int, next_attempt_at timestamptz, lease_owner text, lease_until timestamptz,
           last_error text)",
    )
    .execute(&bed.pool)
    .await
    .expect("a table of the old kind");
    for (index, (status, attempts, max_attempts, ..)) in OLD.iter().enumerate() {
        sqlx::query("insert into old_outbox values ($1, 'old', $2, '{}', $3, $4, $5, now() - interval '1 h', null, null, 'before')")
            .bind(index as i64 + 1)
            .bind(receiver.url())
            .bind(status)
            .bind(attempts)
            .bind(max_attempts)
            .execute(&bed.pool)
            .await
            .expect("an old row");
    }
    sqlx::query(
        "insert into leasehold.outbox_events (id, event_type, destination_url, payload, delivery_status, attempts,
           max_attempts, next_attempt_at, lease_owner, lease_until, last_error)
         select id, event_type, destination_url, payload, delivery_status, attempts, max_attempts, next_attempt_at,
           lease_owner, lease_until, last_error from old_outbox",
    )
    .execute(&bed.pool)
    .await
    .expect("the move");
    let _worker = bed.worker("w", &[]);
    bed.until("delivery_status = 'pending' and next_attempt_at > now()", 4).await;
    bed.until("delivery_status = 'failed'", 3).await;
    bed.until("lease_owner is null", OLD.len() as i64).await;
    for (index, (.., status, attempts, backoff)) in OLD.iter().enumerate() {
        let (is, tries, delay, error): (String, i32, Option<f64>, Option<String>) = sqlx::query_as(
            "select delivery_status, attempts, extract(epoch from next_attempt_at - updated_at)::float8, last_error
             from leasehold.outbox_events where id = $1",
        )
        .bind(index as i64 + 1)
        .fetch_one(&bed.pool)
        .await
        .expect("the moved row");
        assert_eq!((is.as_str(), tries), (*status, *attempts), "row {index}");
        if let Some(backoff) = backoff {
            // `updated_at` is the settle's clock; what had passed of the delay by then is not waited again.
            let delay = delay.expect("a due time");
            assert!(delay <= *backoff as f64 && delay > *backoff as f64 - 1.0, "row {index}: {delay} s");
            assert_eq!(error.as_deref(), Some("destination answered 500"));
        }
    }
    let requests = receiver.seen();
    assert_eq!(requests.len(), 5, "rows whose attempts were spent before get no request");
    let mut numbers: Vec<u32> = requests.iter().map(|seen| seen.attempt).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3, 5, 6]);
}
