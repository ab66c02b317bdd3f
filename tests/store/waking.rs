//! Who is told of new events, on Postgres.

use std::time::Duration;

use leasehold::machine::ClaimRequest;
use leasehold::ports::Outbox as _;
use sqlx::postgres::PgListener;

use crate::bed::{Bed as _, on_postgres};
use crate::postgres::{exec, session};

#[test]
fn a_commit_wakes_workers_only_while_one_sleeps() {
    on_postgres(async |bed| {
        let producer = format!("producer_of_{}", bed.database);
        let mut producing = session(bed).await;
        exec(
            &mut producing,
            &format!(
                "create role {producer}; grant usage on schema leasehold to {producer};
                 grant insert (event_type, destination_url, payload) on leasehold.outbox_events to {producer};
                 set role {producer}"
            ),
        )
        .await;
        const INSERT: &str = "insert into leasehold.outbox_events (event_type, destination_url, payload)
            values ('t', 'https://a.example', '{}')";
        let mut listener = PgListener::connect_with(&bed.pool).await.unwrap();
        listener.listen("leasehold_events").await.unwrap();

        // What a producer's commit sent comes before what is sent after it.
        let mut committed = async |wakes: bool, why: &str| {
            exec(&mut producing, INSERT).await;
            sqlx::query("select pg_notify('leasehold_events', 'after')").execute(&bed.pool).await.unwrap();
            let first = listener.recv().await.unwrap();
            assert_eq!(first.payload() != "after", wakes, "{why}");
            if wakes {
                assert_eq!(listener.recv().await.unwrap().payload(), "after");
            }
        };
        committed(false, "nobody ever slept").await;
        let claim = async |asleep| bed.claim(ClaimRequest { asleep, ..bed.request("w") }).await;
        let poll = Some(Duration::from_secs(3_600));
        claim(poll).await;
        claim(poll).await;
        committed(true, "one sleeps").await;
        exec(&mut session(bed).await, "update leasehold.sleepers set until = until - interval '1 hour'")
            .await;
        committed(true, "it still sleeps after its poll interval").await;
        claim(None).await;
        committed(false, "it is awake again").await;
        claim(poll).await;
        exec(&mut session(bed).await, "update leasehold.sleepers set until = now() - interval '1 second'")
            .await;
        committed(false, "it has not been heard of for too long").await;
        exec(&mut producing, &format!("reset role; drop owned by {producer}; drop role {producer}")).await;
    });
}

#[test]
fn a_transaction_asks_once_who_sleeps() {
    on_postgres(async |bed| {
        let mut producing = session(bed).await;
        const INSERT: &str = "insert into leasehold.outbox_events (event_type, destination_url, payload)
            select 't', 'https://a.example', '{}' from generate_series(1, 1000)";
        exec(
            &mut producing,
            &format!("create function pg_temp.enqueue() returns void language sql set search_path = public as $$ {INSERT} $$;
                 set track_functions = 'pl'"),
        )
        .await;
        for inserts in [
            INSERT.to_owned(),
            format!("{INSERT}; {INSERT}"),
            // It is given back with what was inserted, and not before.
            format!("savepoint s; {INSERT}; rollback to s; {INSERT}"),
            format!("savepoint s; {INSERT}; release s; {INSERT}"),
            // Settings of a function end with it.
            format!("select pg_temp.enqueue(); {INSERT}"),
        ] {
            // Counts since the last report to the server, which no transaction makes before its end.
            const CALLS: &str = "select calls from pg_stat_xact_user_functions where funcname = 'wake'";
            let mut calls = async |statements: &str| -> i64 {
                exec(&mut producing, statements).await;
                let calls = sqlx::query_scalar(CALLS).fetch_optional(&mut producing).await.unwrap();
                calls.unwrap_or(0)
            };
            let before = calls("begin").await;
            let after = calls(&format!("{inserts}; set constraints all immediate")).await;
            exec(&mut producing, "commit").await;
            assert_eq!(after - before, 1, "{inserts}");
        }
    });
}

/// Dead rows of sleepers stay while a transaction is open. A producer's commit must not read them.
#[test]
fn a_commit_does_not_step_over_who_slept_before() {
    on_postgres(async |bed| {
        let mut open = session(bed).await;
        exec(&mut open, "begin isolation level repeatable read; select").await;
        exec(
            &mut session(bed).await,
            "insert into leasehold.sleepers
             select 'w' || n, clock_timestamp() - n * interval '1 second' from generate_series(1, 20000) as n",
        )
        .await;
        exec(&mut session(bed).await, "delete from leasehold.sleepers").await;
        // How often it was deleted from and looked at, and the pages that were read for it. A session's come when it ends.
        let read = async || -> (i64, i64, i64) {
            let sql = "select n_tup_del, seq_scan + idx_scan, heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
                 from pg_stat_user_tables join pg_statio_user_tables using (relid)
                 where pg_stat_user_tables.relname = 'sleepers'";
            sqlx::query_as(sql).fetch_one(&bed.pool).await.unwrap()
        };
        let once = async |has_come: &dyn Fn((i64, i64, i64)) -> bool| loop {
            let figures = read().await;
            if has_come(figures) {
                break figures;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let before = once(&|(deleted, ..)| deleted == 20_000).await;
        let insert = "insert into leasehold.outbox_events (event_type, destination_url, payload)
            values ('t', 'https://a.example', '{}')";
        exec(&mut session(bed).await, insert).await;
        let after = once(&|(_, looks, _)| looks > before.1).await;
        assert!(after.2 - before.2 < 20, "of {} pages", after.2 - before.2);
        exec(&mut open, "commit").await;
    });
}

#[test]
fn a_sleeping_worker_is_given_a_hint() {
    on_postgres(async |bed| {
        let worker = bed.again().await;
        worker
            .claim(ClaimRequest { asleep: Some(Duration::from_secs(1)), ..bed.request("w") })
            .await
            .unwrap();
        let listening = tokio::spawn(async move { worker.hint().await });
        loop {
            let sql = "select count(*) from pg_stat_activity where datname = current_database()
                 and query ilike 'listen%' and state = 'idle'";
            let count: i64 = sqlx::query_scalar(sql).fetch_one(&bed.pool).await.unwrap();
            if count > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!listening.is_finished());
        bed.due().await;
        tokio::time::timeout(Duration::from_secs(60), listening).await.expect("a wake-up").unwrap();
    });
}
