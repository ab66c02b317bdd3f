//! What only Postgres has: other sessions, locks, poolers and lost connections.

use std::time::Duration;

use leasehold::adapters::postgres::{Postgres, PostgresOptions, claim_of_front};
use leasehold::adapters::store::{NewEvent, StoreError};
use leasehold::machine::{
    Answer, LeaseKey, OwnedRequest, RenewRequest, Row as Model, RowId, SettleRequest, Status, StoreFault,
    Unsendable, WorkerId,
};
use leasehold::ports::Outbox;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row as _};

use crate::bed::{A, Bed, GRACE, LEASE, Pg, TIMEOUT, delivered, ids, keys, on_postgres, options, renewal};
use crate::contract::json_of;
use crate::storage::{CLAIM, claim_query};

pub(crate) async fn session(bed: &Pg) -> PgConnection {
    PgConnection::connect(&bed.url).await.expect("a session")
}

pub(crate) async fn exec(session: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(session).await.expect("a statement");
}

/// A session that holds a row's lock until it commits.
pub(crate) async fn locking(bed: &Pg, row: i64) -> PgConnection {
    let mut other = session(bed).await;
    exec(&mut other, "begin").await;
    exec(&mut other, &format!("select from leasehold.outbox_events where id = {row} for update")).await;
    other
}

fn event(payload: String) -> NewEvent {
    NewEvent {
        event_id: None,
        event_type: "t".into(),
        destination_url: A.into(),
        payload,
        max_attempts: None,
        next_attempt_at: None,
    }
}

/// A command tries once, so that it asks the host that doesn't answer and the next one.
#[test]
fn a_command_finds_the_host_that_takes_writes() {
    on_postgres(async |bed| {
        let options = bed.pool.connect_options();
        let place = match options.get_socket() {
            Some(path) => path.display().to_string().replace('/', "%2F"),
            None => format!("{}:{}", options.get_host(), options.get_port()),
        };
        let user = bed.url.split(['/', '@']).nth(2).expect("a user");
        let url = format!("postgres://{user}@127.0.0.1:1,{place}/{}", bed.database);
        let store = Postgres::new(&url, crate::bed::options()).unwrap();
        store.migrate().await.unwrap();
        store.check_schema().await.unwrap();
        store.server_version().await.unwrap();
        assert_eq!(store.enqueue(&[event("{}".into())]).await.unwrap().len(), 1);
        assert_eq!(store.status(TIMEOUT).await.unwrap().pending, 1);
    });
}

/// Returns once that many sessions wait for a lock.
pub(crate) async fn until_waiting(bed: &Pg, sessions: i64) {
    loop {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&bed.pool)
        .await
        .unwrap();
        if waiting == sessions {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn store(bed: &Pg, options: PostgresOptions) -> Postgres {
    Postgres::new(&bed.url, options).expect("a store")
}

#[test]
fn racing_claims_share_the_rows_and_grant_none_twice() {
    on_postgres(async |bed| {
        for _ in 0..200 {
            bed.due().await;
        }
        let racers = (0..4).map(|number| {
            let store = store(bed, options());
            let mut request = bed.request(&format!("w{number}"));
            request.limit = 10;
            tokio::spawn(async move {
                let mut taken = Vec::new();
                for _ in 0..8 {
                    taken.extend(keys(&store.claim(request.clone()).await.unwrap()));
                }
                taken
            })
        });
        let mut taken: Vec<LeaseKey> = Vec::new();
        for racer in racers.collect::<Vec<_>>() {
            taken.extend(racer.await.unwrap());
        }
        // What racers skipped in the end.
        taken.extend(bed.take("last").await);
        taken.extend(bed.take("last").await);
        let mut rows: Vec<i64> = taken.iter().map(|key| key.row.0).collect();
        rows.sort_unstable();
        assert_eq!(rows, bed.rows().await.iter().map(|stored| stored.id).collect::<Vec<_>>());
        for stored in bed.rows().await {
            let key = LeaseKey { row: RowId(stored.id), token: stored.row.token };
            assert!(taken.contains(&key), "the row's token is the one that was granted");
        }
    });
}

#[test]
fn locked_rows_are_skipped_and_hold_up_no_others() {
    on_postgres(async |bed| {
        for _ in 0..3 {
            bed.due().await;
        }
        let mut taken = bed.take("w").await;
        taken.sort();
        bed.pass(Duration::from_secs(1)).await;
        let mut other = locking(bed, taken[1].row.0).await;
        let expected =
            [(taken[0], Answer::Applied), (taken[1], Answer::Skipped), (taken[2], Answer::Applied)];

        let before = bed.row(taken[1].row.0).await;
        let mut answers = bed.store().renew(renewal("w", taken.clone())).await.unwrap().answers;
        answers.sort();
        assert_eq!(answers, expected);
        let entries = taken.iter().map(|key| (*key, delivered())).collect();
        let request = SettleRequest { owner: WorkerId::new("w"), entries };
        let mut answers = bed.store().settle(request).await.unwrap().answers;
        answers.sort();
        assert_eq!(answers, expected);
        exec(&mut other, "commit").await;
        assert_eq!(bed.row(taken[1].row.0).await, before);
        assert_eq!(bed.settle("w", taken[1], delivered()).await, Answer::Applied);
    });
}

#[test]
fn a_waiting_renewal_waits_and_takes_the_late_clock() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        let mut other = locking(bed, lease.row.0).await;
        let request = RenewRequest { wait: true, ..renewal("w", vec![lease]) };
        let (reply, later) = tokio::join!(bed.store().renew(request), async {
            until_waiting(bed, 1).await;
            // The statement began long ago, by the clock: only the late one has moved.
            let early = bed.now();
            let late = early.after(Duration::from_secs(9));
            bed.set_clocks(early, late).await;
            exec(&mut other, "commit").await;
            late
        });
        let reply = reply.unwrap();
        assert_eq!((reply.db_now, reply.answers), (later, vec![(lease, Answer::Applied)]));
        assert_eq!(bed.row(lease.row.0).await.lease.unwrap().until, later.after(LEASE));
    });
}

#[test]
fn a_waiting_renewal_sees_what_the_lock_holder_did() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        let mut other = locking(bed, lease.row.0).await;
        exec(
            &mut other,
            "update leasehold.outbox_events set lease_owner = 'other', lease_token = lease_token + 1",
        )
        .await;
        let before_commit = async {
            until_waiting(bed, 1).await;
            exec(&mut other, "commit").await;
        };
        let request = RenewRequest { wait: true, ..renewal("w", vec![lease]) };
        let (reply, ()) = tokio::join!(bed.store().renew(request), before_commit);
        assert_eq!(reply.unwrap().answers, [(lease, Answer::Refused)]);
        assert_eq!(bed.row(lease.row.0).await.lease.unwrap().owner, WorkerId::new("other"));
    });
}

#[test]
fn a_claim_that_commits_late_keeps_its_rows_to_itself() {
    on_postgres(async |bed| {
        for claim in [CLAIM.to_owned(), claim_of_front(CLAIM)] {
            bed.run("delete from leasehold.outbox_events").await.unwrap();
            a_late_claim_keeps_its_rows(bed, claim).await;
        }
    });
}

async fn a_late_claim_keeps_its_rows(bed: &Pg, claim: String) {
    let rows = [bed.due().await, bed.due().await];
    let mut late = session(bed).await;
    exec(&mut late, "begin").await;
    let claimed: Vec<i64> = claim_query(bed, claim, "late", 1)
        .fetch_all(&mut late)
        .await
        .unwrap()
        .iter()
        .filter_map(|row| row.get("id"))
        .collect();
    assert_eq!(claimed, [rows[0]]);
    // Its claim isn't committed: the row is left out, and what is free is taken.
    assert_eq!(ids(&bed.claim(bed.request("w")).await), [rows[1]]);
    assert!(bed.take("w").await.is_empty());
    exec(&mut late, "commit").await;
    assert!(bed.take("w").await.is_empty());
    assert_eq!(bed.owned("late").await.len(), 1);
    // The lease counts from the claim's late clock, not from the commit.
    bed.pass(LEASE + GRACE).await;
    assert_eq!(bed.take("w").await.len(), 2);
}

#[test]
fn early_compares_and_late_grants() {
    on_postgres(async |bed| {
        let row = bed.due().await;
        let early = bed.now();
        let late = early.after(Duration::from_secs(5));
        let between = bed.insert(A, "{}", &Model::new(20, early.after(Duration::from_secs(1)))).await;
        bed.set_clocks(early, late).await;
        let claimed = bed.claim(bed.request("w")).await;
        assert_eq!(ids(&claimed), [row], "not due by the early clock");
        assert_eq!(claimed.reply.db_now, late);
        let model = bed.row(row).await;
        assert_eq!(model.lease.unwrap().until, late.after(LEASE));
        assert_eq!(model.token.0, late.as_millis());
        bed.set_clock(late).await;
        assert_eq!(ids(&bed.claim(bed.request("w")).await), [between]);
        // Expiry goes by the early clock as well.
        bed.set_clocks(late.after(LEASE + GRACE - Duration::from_micros(1)), late.after(LEASE * 3)).await;
        assert!(bed.take("other").await.is_empty());
    });
}

#[test]
fn a_claim_that_has_its_locks_too_late_takes_nothing() {
    on_postgres(async |bed| {
        for whole in [false, true] {
            bed.run("delete from leasehold.outbox_events").await.unwrap();
            let early = bed.now();
            let late = early.after(Duration::from_secs(5));
            let row = bed.due().await;
            if whole {
                let suspect = Model { reclaims: 3, ..Model::new(20, early) };
                bed.insert(A, "{}", &suspect).await;
            }
            bed.set_clocks(early, late).await;
            let mut request = bed.request("w");
            // Without a search it is the statement for the front of the queue alone.
            request.terms.expired = whole;
            request.terms.valid_until = Some(late.before(Duration::from_micros(1)));
            let reply = bed.claim(request.clone()).await.reply;
            assert!(reply.grants.is_empty(), "{:?}", reply.grants);
            assert_eq!(reply.db_now, late, "its worker sees that it was void");
            assert_eq!(reply.front.map(|front| front.row.0), Some(row), "it left what it had locked");
            request.terms.valid_until = Some(late);
            assert_eq!(bed.claim(request).await.reply.grants.len(), 1 + usize::from(whole));
            bed.set_clock(late).await;
        }
    });
}

#[test]
fn everything_works_without_session_state() {
    on_postgres(async |bed| {
        let store = store(bed, PostgresOptions { prepared_statements: false, ..options() });
        let row = bed.due().await;
        bed.due().await;
        let claimed = store.claim(bed.request("w")).await.unwrap();
        assert_eq!(claimed.reply.grants.len(), 2);
        let lease = claimed.reply.grants[0].key;
        assert_eq!(lease.row.0, row);
        let answers = store.renew(renewal("w", vec![lease])).await.unwrap().answers;
        assert_eq!(answers, [(lease, Answer::Applied)]);
        let entries = vec![(lease, delivered())];
        let settled = store.settle(SettleRequest { owner: WorkerId::new("w"), entries }).await.unwrap();
        assert_eq!(settled.answers, [(lease, Answer::Applied)]);
        let left = store.owned(OwnedRequest { owner: WorkerId::new("w") }).await.unwrap();
        assert_eq!(left.keys.len(), 1);
        assert_eq!(store.status(TIMEOUT).await.unwrap().delivered, 1);
        store.migrate().await.unwrap();
        // Nothing that a pooler can't carry: no prepared statement is left on any connection.
        let sql = "select count(*) from pg_prepared_statements";
        let left: i64 =
            sqlx::query_scalar(sql).persistent(false).fetch_one(&mut session(bed).await).await.unwrap();
        assert_eq!(left, 0);
    });
}

async fn sessions_of_the_store(bed: &Pg) -> Vec<i32> {
    let sql = "select pid from pg_stat_activity where datname = current_database() and application_name = 'leasehold'
        order by pid";
    sqlx::query_scalar(sql).fetch_all(&bed.pool).await.unwrap()
}

#[test]
fn a_dropped_call_closes_its_connection() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        let mut other = locking(bed, lease.row.0).await;
        let request = RenewRequest { wait: true, ..renewal("w", vec![lease]) };
        let waiting_pid: i32 = tokio::select! {
            reply = bed.store().renew(request) => panic!("the row is locked: {reply:?}"),
            pid = async {
                until_waiting(bed, 1).await;
                let sql = "select pid from pg_stat_activity where datname = current_database()
                     and wait_event_type = 'Lock'";
                sqlx::query_scalar(sql).fetch_one(&bed.pool).await.unwrap()
            } => pid,
        };
        // While the abandoned statement still waits, renewals go on, by another connection.
        assert_eq!(bed.renew("w", lease).await, Answer::Skipped);
        exec(&mut other, "commit").await;
        while sessions_of_the_store(bed).await.contains(&waiting_pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(bed.renew("w", lease).await, Answer::Applied);
    });
}

#[test]
fn time_outs_of_the_server_are_not_applied() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        let request = RenewRequest { wait: true, ..renewal("w", vec![lease]) };
        for prepared_statements in [true, false] {
            let store_timeout = Duration::from_millis(300);
            let short = store(bed, PostgresOptions { store_timeout, prepared_statements, ..options() });
            let mut other = locking(bed, lease.row.0).await;
            let fault = short.renew(request.clone()).await.expect_err("the row is locked");
            assert!(matches!(fault, StoreFault::NotApplied { .. }), "{fault:?}");
            exec(&mut other, "commit").await;
        }
        bed.run(&format!("alter database {} set lock_timeout = '100ms'", bed.database)).await.unwrap();
        let with_lock_timeout = bed.again().await;
        let mut other = locking(bed, lease.row.0).await;
        let fault = with_lock_timeout.renew(request.clone()).await.expect_err("the row is locked");
        assert!(
            matches!(&fault, StoreFault::NotApplied { error } if error.starts_with("55P03")),
            "{fault:?}"
        );
        exec(&mut other, "commit").await;
        let answers = with_lock_timeout.renew(request).await.unwrap().answers;
        assert_eq!(answers, [(lease, Answer::Applied)]);
    });
}

/// Who asked is gone by then, and the next one that asks would have another statement beside it.
#[test]
fn counts_that_take_too_long_are_given_up_by_the_server() {
    on_postgres(async |bed| {
        let mut other = session(bed).await;
        exec(&mut other, "begin; lock leasehold.outbox_events").await;
        for prepared_statements in [true, false] {
            let store = store(bed, PostgresOptions { prepared_statements, ..options() });
            let counted = tokio::time::timeout(TIMEOUT, store.status(Duration::from_millis(300))).await;
            let error = counted.expect("the server's word").expect_err("the table is locked").to_string();
            assert!(error.contains("57014"), "{error}");
        }
        exec(&mut other, "commit").await;
    });
}

/// What a message to the server can hold is bounded, and so is what it must hold in memory at once.
#[test]
fn large_events_are_enqueued_by_several_statements_all_or_none() {
    on_postgres(async |bed| {
        bed.run(
            "create table statements (n int);
             create function leasehold.counted() returns trigger language plpgsql as $$ begin
                 insert into statements values (1);
                 return null;
             end $$;
             create trigger counted after insert on leasehold.outbox_events
                 for each statement execute function leasehold.counted()",
        )
        .await
        .unwrap();
        let store = store(bed, PostgresOptions { max_payload: 16 << 20, ..options() });
        let sizes = [3, 3, 3, 9, 3, 3].map(|mebibytes| mebibytes << 20);
        let mut events: Vec<NewEvent> = sizes.map(|bytes| event(json_of(bytes))).into();
        let ids = store.enqueue(&events).await.unwrap();
        let sql = "select event_id, payload_bytes::bigint from leasehold.outbox_events order by id";
        let stored: Vec<(String, i64)> = sqlx::query_as(sql).fetch_all(&bed.pool).await.unwrap();
        let expected: Vec<_> = ids.into_iter().zip(sizes.map(u64::cast_signed)).collect();
        assert_eq!(stored, expected);
        let statements: i64 =
            sqlx::query_scalar("select count(*) from statements").fetch_one(&bed.pool).await.unwrap();
        assert_eq!(statements, 4, "3 + 3, 3, 9, 3 + 3 MiB");
        events.push(NewEvent { event_type: "with space".into(), ..event("{}".into()) });
        let refused = store.enqueue(&events).await;
        assert!(matches!(refused, Err(StoreError::Refused { place: 6, .. })), "{refused:?}");
        assert_eq!(bed.rows().await.len(), 6);
    });
}

#[test]
fn a_lost_connection_costs_one_call_at_most() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        bed.renew("w", lease).await;
        let before = sessions_of_the_store(bed).await;
        assert!(!before.is_empty());
        bed.run(
            "select pg_terminate_backend(pid, 60000) from pg_stat_activity
             where datname = current_database() and application_name = 'leasehold'",
        )
        .await
        .unwrap();
        // Each pooled connection may cost one call, whose outcome is not known.
        for _ in 0..before.len() {
            if let Err(fault) = bed.store().renew(renewal("w", vec![lease])).await {
                assert!(matches!(fault, StoreFault::Unknown { .. }), "{fault:?}");
            }
            if let Err(fault) = bed.store().claim(bed.request("w")).await {
                assert!(matches!(fault, StoreFault::Unknown { .. }), "{fault:?}");
            }
        }
        assert_eq!(bed.renew("w", lease).await, Answer::Applied);
        assert_eq!(bed.settle("w", lease, delivered()).await, Answer::Applied);
    });
}

/// Under another isolation a statement fails that comes to a row which changed since it began.
#[test]
fn a_default_isolation_of_the_database_changes_nothing() {
    on_postgres(async |bed| {
        let default = "default_transaction_isolation = 'serializable'";
        bed.run(&format!("alter database {} set {default}", bed.database)).await.unwrap();
        for prepared_statements in [true, false] {
            let store = store(bed, PostgresOptions { prepared_statements, ..options() });
            bed.due().await;
            let lease = bed.take("w").await[0];
            let mut other = locking(bed, lease.row.0).await;
            exec(&mut other, "update leasehold.outbox_events set updated_at = now()").await;
            let before_commit = async {
                until_waiting(bed, 1).await;
                exec(&mut other, "commit").await;
            };
            let request = RenewRequest { wait: true, ..renewal("w", vec![lease]) };
            let (reply, ()) = tokio::join!(store.renew(request), before_commit);
            assert_eq!(reply.unwrap().answers, [(lease, Answer::Applied)]);
            assert_eq!(bed.settle("w", lease, delivered()).await, Answer::Applied);
        }
    });
}

/// As on a server that shows nothing of its WAL.
#[test]
fn without_the_name_of_its_timeline_a_server_is_known_by_its_start() {
    on_postgres(async |bed| {
        let user = format!("user_of_{}", bed.database);
        bed.run(&format!(
            "create role {user} login; grant usage on schema leasehold to {user};
             grant select, update on leasehold.outbox_events to {user}; grant select on leasehold.test_clock to {user};
             revoke execute on function pg_current_wal_lsn() from public"
        ))
        .await
        .unwrap();
        let mut url = url::Url::parse(&bed.url).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c role={user}"));
        let store = Postgres::new(url.as_str(), options()).unwrap();
        let row = bed.due().await;
        let claimed = store.claim(bed.request("w")).await;
        let looked = store.claim(bed.request("w")).await;
        bed.run(&format!("drop owned by {user}; drop role {user}")).await.unwrap();
        let claimed = claimed.unwrap();
        assert_eq!(ids(&claimed), [row]);
        let known = claimed.reply.incarnation;
        assert!(bed.incarnation().as_str().starts_with(&format!("{}/", known.as_str())), "{known:?}");
        assert_eq!(looked.unwrap().reply.incarnation, known);
    });
}

/// A number with an exponent is as short as it is written, and as long as it is.
#[test]
fn a_small_payload_that_is_large_as_text_is_oversized() {
    on_postgres(async |bed| {
        let large = bed
            .insert(
                A,
                "[1e131071,1e131071,1e131071,1e131071,1e131071,1e131071,1e131071,1e131071]",
                &Model::new(20, bed.now()),
            )
            .await;
        let small = bed.insert(A, "{}", &Model::new(20, bed.now())).await;
        let claimed = bed.claim(bed.request("w")).await;
        let granted: Vec<_> =
            claimed.reply.grants.iter().map(|grant| (grant.key.row.0, grant.unsendable.clone())).collect();
        let bytes = 8 * 131_072 + 7 * 2 + 2;
        assert_eq!(granted, [(large, Some(Unsendable::Oversized { bytes })), (small, None)]);
    });
}

#[test]
fn who_may_not_create_anything_may_migrate_what_is_migrated() {
    on_postgres(async |bed| {
        let user = format!("user_of_{}", bed.database);
        let mut session = session(bed).await;
        exec(
            &mut session,
            &format!(
                "create role {user} login; grant usage on schema leasehold to {user};
                 grant select on leasehold.migrations to {user}"
            ),
        )
        .await;
        let mut url = url::Url::parse(&bed.url).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c role={user}"));
        let migrated = Postgres::new(url.as_str(), options()).unwrap().migrate().await;
        exec(&mut session, &format!("drop owned by {user}; drop role {user}")).await;
        migrated.unwrap();
    });
}

#[test]
fn no_server_is_not_applied() {
    on_postgres(async |bed| {
        let mut url = url::Url::parse(&bed.url).unwrap();
        url.set_path("leasehold_no_such_database");
        let store = Postgres::new(url.as_str(), options()).unwrap();
        let fault = store.claim(bed.request("w")).await.expect_err("no such database");
        assert!(matches!(fault, StoreFault::NotApplied { .. }), "{fault:?}");
    });
}

/// A session that holds the gate `pg_advisory_lock(1)` shut, and fires no trigger.
async fn gatekeeper(bed: &Pg) -> PgConnection {
    let mut keeper = session(bed).await;
    exec(&mut keeper, "select pg_advisory_lock(1); set session_replication_role = replica").await;
    keeper
}

/// Waits until a statement stands at the gate, makes a change, and opens it.
async fn change_meanwhile(bed: &Pg, keeper: &mut PgConnection, change: &str) {
    let waits = "select exists (select from pg_locks where locktype = 'advisory' and not granted
         and database = (select oid from pg_database where datname = current_database()))";
    while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&bed.pool).await.unwrap() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    exec(keeper, &format!("{change}; select pg_advisory_unlock(1)")).await;
}

/// A renewal that commits between a settle's snapshot and its locks hides the row from it, but takes no lease away.
#[test]
fn a_renewal_meanwhile_makes_a_settle_skip_and_never_refuse() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        // A statement that would change rows comes to this gate when it has its snapshot and no lock yet.
        bed.run(
            "create function leasehold.gate() returns trigger language plpgsql as $$ begin
                 perform pg_advisory_lock(1);
                 perform pg_advisory_unlock(1);
                 return null;
             end $$;
             create trigger gate before update on leasehold.outbox_events
                 for each statement execute function leasehold.gate()",
        )
        .await
        .unwrap();
        let mut keeper = gatekeeper(bed).await;
        let renew = "update leasehold.outbox_events set lease_until = lease_until + interval '1 second'";
        let renew = change_meanwhile(bed, &mut keeper, renew);
        let (answer, ()) = tokio::join!(bed.settle("w", lease, delivered()), renew);
        assert_eq!(answer, Answer::Skipped);
        assert_eq!(bed.settle("w", lease, delivered()).await, Answer::Applied);
    });
}

/// What changes between a claim's snapshot and its locks is left, and nothing passes it over.
#[test]
fn a_change_meanwhile_is_left_to_the_next_claim() {
    on_postgres(async |bed| {
        // A claim asks for the incarnation when it has its snapshot and no lock yet.
        let incarnation = bed.incarnation();
        bed.run(&format!(
            "create or replace function leasehold.incarnation() returns text language plpgsql as $$ begin
                 perform pg_advisory_lock(1);
                 perform pg_advisory_unlock(1);
                 return '{}';
             end $$",
            incarnation.as_str()
        ))
        .await
        .unwrap();
        for expired in [false, true] {
            let (changed, other) = (bed.due().await, bed.due().await);
            let mut request = bed.request("w");
            request.terms.expired = expired;
            let mut keeper = gatekeeper(bed).await;
            let change =
                format!("update leasehold.outbox_events set payload = '[\"new\"]' where id = {changed}");
            let (claimed, ()) =
                tokio::join!(bed.claim(request.clone()), change_meanwhile(bed, &mut keeper, &change));
            assert_eq!(ids(&claimed), [other], "whole: {expired}");
            let front = claimed.reply.front.expect("a front");
            assert_eq!((front.row.0, front.due), (changed, bed.now()), "whole: {expired}");
            request.from = Some(front);
            let claimed = bed.claim(request).await;
            assert_eq!(ids(&claimed), [changed], "whole: {expired}");
            assert_eq!(claimed.messages[0].payload, "[\"new\"]");
        }
    });
}

#[test]
fn a_delivered_event_stays_delivered_for_every_session() {
    on_postgres(async |bed| {
        bed.due().await;
        let lease = bed.take("w").await[0];
        // Two sessions settle the same lease at once: one applies, the other finds it ended or locked.
        let settle = |store: Postgres| async move {
            let entries = vec![(lease, delivered())];
            store.settle(SettleRequest { owner: WorkerId::new("w"), entries }).await.unwrap().answers[0].1
        };
        let (one, two) = tokio::join!(settle(bed.again().await), settle(bed.again().await));
        let mut answers = [one, two];
        answers.sort();
        assert!(answers[0] == Answer::Applied && answers[1] != Answer::Applied, "{answers:?}");
        let row = bed.row(lease.row.0).await;
        assert_eq!((row.status, row.attempts), (Status::Delivered, 1));
    });
}
