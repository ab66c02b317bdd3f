//! What only Postgres has: other sessions, locks, poolers, lost connections, and how the rows are stored.

use std::time::Duration;

use leasehold::adapters::postgres::{PLANS, Postgres, PostgresOptions, claim_of_front};
use leasehold::adapters::store::NewEvent;
use leasehold::machine::{
    Answer, ClaimFailure, DbTime, LeaseKey, RenewRequest, Row as Model, RowId, SettleRequest, Status,
    StoreFault, Token, Unsendable, WorkerId,
};
use leasehold::ports::Outbox;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row as _};

use crate::bed::{
    A, Bed, GRACE, LEASE, MAX_PAYLOAD, Pg, delivered, ids, keys, on_postgres, options, renewal,
};

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
        let event = NewEvent {
            event_id: None,
            event_type: "t".into(),
            destination_url: A.into(),
            payload: "{}".into(),
            max_attempts: None,
            next_attempt_at: None,
        };
        assert_eq!(store.enqueue(&[event]).await.unwrap().len(), 1);
        assert_eq!(store.status().await.unwrap().pending, 1);
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
        assert_eq!(store.leases_of(WorkerId::new("w")).await.unwrap().len(), 1);
        assert_eq!(store.status().await.unwrap().delivered, 1);
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

// ---- storage

#[test]
fn heartbeats_are_hot() {
    on_postgres(async |bed| {
        for _ in 0..200 {
            let lease = crate::bed::leased("w", bed.now());
            bed.insert(A, "{}", &Model { lease, token: Token(1), ..Model::new(20, bed.now()) }).await;
        }
        // One row of each page is renewed: whatever other sessions keep from being pruned, the free part of the page
        // holds all versions. Which page a row is on depends on the connection that inserted it.
        let sql = "select min(id) from leasehold.outbox_events group by (ctid::text::point)[0] order by 1";
        let ids: Vec<i64> = sqlx::query_scalar(sql).fetch_all(&bed.pool).await.unwrap();
        assert!(ids.len() > 5);
        let taken: Vec<LeaseKey> = ids.into_iter().map(|id| crate::bed::key(id, Token(1))).collect();
        // A store of its own: a session that ends has its counts flushed.
        let renewer = bed.again().await;
        for _ in 0..5 {
            bed.pass(Duration::from_secs(5)).await;
            let answers = renewer.renew(renewal("w", taken.clone())).await.unwrap().answers;
            assert!(answers.iter().all(|(_, answer)| *answer == Answer::Applied));
        }
        drop(renewer);
        let (updated, hot) = loop {
            let sql =
                "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'outbox_events'";
            let seen: (i64, i64) = sqlx::query_as(sql).fetch_one(&bed.pool).await.unwrap();
            if seen.0 >= 5 * taken.len() as i64 {
                break seen;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(
            (updated, hot),
            (5 * taken.len() as i64, updated),
            "every renewal writes its row once, and is HOT"
        );
    });
}

#[test]
fn no_index_names_what_a_heartbeat_writes() {
    on_postgres(async |bed| {
        let sql =
            "select indexdef from pg_indexes where schemaname = 'leasehold' and tablename = 'outbox_events'";
        let indexes: Vec<String> = sqlx::query_scalar(sql).fetch_all(&bed.pool).await.unwrap();
        assert!(indexes.len() >= 4);
        for index in indexes {
            assert!(!index.contains("lease_until") && !index.contains("updated_at"), "{index}");
        }
    });
}

#[test]
fn ids_given_by_default_begin_with_their_time() {
    on_postgres(async |bed| {
        let clock = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
        let insert = "insert into leasehold.outbox_events (event_type, destination_url, payload)
            values ('test', 'https://a.example', '{}') returning event_id";
        let mut last = String::new();
        for _ in 0..3 {
            let before: i64 = sqlx::query_scalar(clock).fetch_one(&bed.pool).await.unwrap();
            let id: String = sqlx::query_scalar(insert).fetch_one(&bed.pool).await.unwrap();
            let digits = id.replace('-', "");
            let at = i64::from_str_radix(&digits[..12], 16).unwrap();
            let after: i64 = sqlx::query_scalar(clock).fetch_one(&bed.pool).await.unwrap();
            assert!((before..=after).contains(&at), "{id} is of {before} to {after}");
            // Within one millisecond the order is left to chance.
            while sqlx::query_scalar::<_, i64>(clock).fetch_one(&bed.pool).await.unwrap() <= at {}
            assert_eq!(&digits[12..13], "7", "the version of {id}");
            assert!("89ab".contains(&digits[16..17]), "the variant of {id}");
            assert!(last < id, "{last} was before {id}");
            last = id;
        }
    });
}

const CLAIM: &str = include_str!("../../src/adapters/postgres/claim.sql");
const RENEW: &str = include_str!("../../src/adapters/postgres/renew.sql");
/// The beginning of the queue, and of the leases.
const START: &str = "null, 0, 0";
const SETTLE: &str = include_str!("../../src/adapters/postgres/settle.sql");
const LOOK: &str = include_str!("../../src/adapters/postgres/look.sql");

fn claim_query(
    bed: &Pg,
    claim: String,
    owner: &str,
    limit: i32,
) -> sqlx::query::Query<'static, sqlx::Postgres, sqlx::postgres::PgArguments> {
    sqlx::query(AssertSqlSafe(claim))
        .bind(owner.to_owned())
        .bind(i64::try_from(LEASE.as_micros()).unwrap())
        .bind(i64::try_from(GRACE.as_micros()).unwrap())
        .bind(false)
        .bind(Some(bed.incarnation().as_str().to_owned()))
        .bind(100_i32)
        .bind(0_i32)
        .bind(limit)
        .bind(1_i32)
        .bind(1_000_i32)
        .bind(Vec::<String>::new())
        .bind(Vec::<i32>::new())
        .bind(i64::try_from(MAX_PAYLOAD).unwrap())
        .bind(8_i64 * 1024 * 1024)
        .bind(ClaimFailure::AttemptsSpent.last_error())
        .bind(ClaimFailure::ReclaimsSpent.last_error())
        .bind(None::<i64>)
        .bind(0_i64)
        .bind(0_i64)
        .bind(None::<i64>)
        .bind(String::new())
        .bind(String::new())
        .bind(1_000_i32)
}

/// Thousands of delivered, leased and future rows; a few that are due.
async fn fill(bed: &Pg) {
    bed.run(
        "insert into leasehold.outbox_events (event_type, destination_url, payload, delivery_status, next_attempt_at,
             lease_owner, lease_until, lease_token)
         select 't', 'https://h' || n % 50 || '.example/x', '{}',
             case when n % 3 = 0 then 'delivered' else 'pending' end,
             leasehold.early_now() + case when n % 3 = 2 then interval '1 day' else interval '-1 minute' end,
             case when n % 3 = 1 then 'other' end, case when n % 3 = 1 then leasehold.early_now() + interval '1 hour' end,
             1
         from generate_series(1, 15000) as n",
    )
    .await
    .unwrap();
    for _ in 0..20 {
        bed.due().await;
    }
}

fn nodes<'a>(plan: &'a Value, into: &mut Vec<&'a Value>) {
    into.push(plan);
    for child in plan["Plans"].as_array().into_iter().flatten() {
        nodes(child, into);
    }
}

/// How much of the statement runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Claim {
    Front,
    Whole,
    Search,
}

/// The plan of a claim as it ran, made as on the connections of a worker: once, whatever the arguments.
async fn explain_claim(bed: &Pg, limit: u32, share: u32, full: &str, claim: Claim, from: &str) -> Value {
    let mut connection = session(bed).await;
    for (name, value) in PLANS {
        sqlx::raw_sql(AssertSqlSafe(format!("set {name} = {value}"))).execute(&mut connection).await.unwrap();
    }
    let search = claim == Claim::Search;
    let claim = if claim == Claim::Front { claim_of_front(CLAIM) } else { CLAIM.to_owned() };
    let prepare = format!(
        "prepare claim (text, bigint, bigint, bool, text, int, int, int, int, int, text[], int[], bigint, bigint, text,
             text, bigint, bigint, bigint, bigint, text, text, int) as {claim}"
    );
    sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut connection).await.unwrap();
    let execute = format!(
        "explain (analyze, buffers, format json) execute claim ('w', 2000000, 200000, {search}, '{}', 100, 0, {limit}, 1,
             {share}, '{{{full}}}', '{{{}}}', {MAX_PAYLOAD}, 8388608, 'attempts', 'reclaims',
             {from}, null, '', '', 1000)",
        bed.incarnation().as_str(),
        if full.is_empty() { "" } else { "0" },
    );
    let row = sqlx::raw_sql(AssertSqlSafe(execute)).fetch_one(&mut connection).await.unwrap();
    let plan: Value = serde_json::from_str(&row.try_get_unchecked::<String, _>(0).unwrap()).expect("JSON");
    plan[0]["Plan"].clone()
}

/// The most rows that a node of a plan produced or threw away, over all of its turns.
fn most_rows(node: &Value) -> f64 {
    let number = |name: &str| node[name].as_f64().unwrap_or(0.0);
    let own =
        (number("Actual Rows") + number("Rows Removed by Join Filter") + number("Rows Removed by Filter"))
            * number("Actual Loops");
    let children = node["Plans"].as_array().into_iter().flatten().map(most_rows);
    children.fold(own, f64::max)
}

/// A renewal and a settle of many rows look at each a few times, not at each for each.
#[test]
fn heartbeats_and_settles_are_linear() {
    const ROWS: i64 = 500;
    on_postgres(async |bed: &Pg| {
        // More than are asked for, and known to the statistics.
        bed.run(
            "insert into leasehold.outbox_events
                 (event_type, destination_url, payload, lease_owner, lease_token, lease_until)
             select 'test', 'https://a.example', '{}', 'w', 1, now() from generate_series(1, 20000);
             analyze leasehold.outbox_events",
        )
        .await
        .unwrap();
        let ids: Vec<String> = (1..=ROWS).map(|id| id.to_string()).collect();
        let many = |text: &str| format!("'{{{}}}'", vec![text; ROWS as usize].join(","));
        let ids = format!("'{{{}}}'", ids.join(","));
        let renew = RENEW.replace("/* skip locked */", "skip locked");
        let calls = [
            ("text, bigint[], bigint[], bigint", renew.as_str(), format!("{ids}, {}, 60000000", many("1"))),
            (
                "text, bigint[], bigint[], text[], bigint[], text[], int[]",
                SETTLE,
                format!(
                    "{ids}, {}, {}, {}, {}, {}",
                    many("1"),
                    many("delivered"),
                    many("null"),
                    many("null"),
                    many("200")
                ),
            ),
        ];
        let mut connection = bed.pool.acquire().await.unwrap();
        for (types, sql, values) in calls {
            let plans = PLANS.map(|(name, value)| format!("set {name} = {value};")).concat();
            let prepare = format!("deallocate all; {plans} prepare call ({types}) as {sql}");
            sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *connection).await.unwrap();
            let explain = format!("explain (analyze, format json) execute call ('w', {values})");
            let row = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_one(&mut *connection).await.unwrap();
            let plan: Value =
                serde_json::from_str(&row.try_get_unchecked::<String, _>(0).unwrap()).expect("JSON");
            let most = most_rows(&plan[0]["Plan"]);
            assert!(most >= ROWS as f64 && most <= 2.0 * ROWS as f64, "{most} rows for {ROWS}: {plan:#}");
        }
    });
}

/// How many rows of the outbox a plan's node read, to keep or to throw away.
fn rows_read(node: &Value) -> f64 {
    let number = |name: &str| node[name].as_f64().unwrap_or(0.0);
    let each =
        number("Actual Rows") + number("Rows Removed by Filter") + number("Rows Removed by Index Recheck");
    each * number("Actual Loops")
}

/// How many pages a plan touched, some of them several times.
fn buffers(root: &Value) -> f64 {
    root["Shared Hit Blocks"].as_f64().unwrap() + root["Shared Read Blocks"].as_f64().unwrap()
}

async fn assert_the_claim_touches_only_what_it_takes(bed: &Pg, claim: Claim) {
    // More than is due, so that it must end at what is due and not at its limit.
    let root = explain_claim(bed, 30, 1_000, "", claim, START).await;
    let mut all = Vec::new();
    nodes(&root, &mut all);
    for node in &all {
        let kind = node["Node Type"].as_str().unwrap();
        if node["Relation Name"] == "outbox_events" {
            assert!(kind != "Seq Scan" || node["Actual Loops"] == 0, "{node:#}");
            for removed in ["Rows Removed by Filter", "Rows Removed by Index Recheck"] {
                // The front of the queue is sought behind what was taken, which this statement still sees.
                assert!(node[removed].as_f64().unwrap_or(0.0) <= 20.0, "{removed}: {node:#}");
            }
        }
    }
    let updated = all.iter().find(|node| node["Node Type"] == "ModifyTable").expect("an update");
    assert_eq!(updated["Actual Rows"].as_f64(), Some(20.0));
    let touched = buffers(&root);
    // 20 rows through 6 indexes; the table alone has far more than this in pages and hundreds of times in rows.
    assert!(touched < 2_000.0, "{touched} buffers");
    bed.run(
        "update leasehold.outbox_events set lease_owner = null, lease_until = null where lease_owner = 'w'",
    )
    .await
    .unwrap();
}

#[test]
fn a_claim_touches_only_what_it_takes() {
    on_postgres(async |bed| {
        fill(bed).await;
        bed.run("analyze leasehold.outbox_events").await.unwrap();
        assert_the_claim_touches_only_what_it_takes(bed, Claim::Front).await;
        assert_the_claim_touches_only_what_it_takes(bed, Claim::Whole).await;
    });
}

/// Claims after 20,000 events were leased and delivered under a transaction that is left open, which keeps their index
/// entries. How many buffers one touches from the beginning, and how many from `from`, made with the time a second ago.
async fn beside_an_open_transaction(bed: &Pg, search: bool, from: impl Fn(DbTime) -> String) -> (f64, f64) {
    let mut other = session(bed).await;
    exec(&mut other, "begin isolation level repeatable read; select count(*) from leasehold.outbox_events")
        .await;
    bed.run(
        "insert into leasehold.outbox_events (event_type, destination_url, payload, next_attempt_at)
         select 't', 'https://a.example', '{}', leasehold.early_now() - interval '1 minute'
         from generate_series(1, 20000);
         update leasehold.outbox_events set lease_owner = 'w', lease_until = leasehold.early_now(), lease_token = 1
         where delivery_status = 'pending';
         update leasehold.outbox_events set lease_owner = null, lease_until = null, delivery_status = 'delivered'",
    )
    .await
    .unwrap();
    for _ in 0..20 {
        bed.due().await;
    }
    let from = from(bed.now().before(Duration::from_secs(1)));
    let claim = if search { Claim::Search } else { Claim::Front };
    let whole = buffers(&explain_claim(bed, 10, 1_000, "", claim, START).await);
    let plan = explain_claim(bed, 10, 1_000, "", claim, &from).await;
    let mut all = Vec::new();
    nodes(&plan, &mut all);
    let updated = all.iter().find(|node| node["Node Type"] == "ModifyTable").expect("an update");
    assert_eq!(updated["Actual Rows"].as_f64(), Some(10.0), "{claim:?} took something else");
    let front = buffers(&plan);
    exec(&mut other, "commit").await;
    (front, whole)
}

#[test]
fn a_claim_does_not_step_over_what_was_claimed_before_it() {
    on_postgres(async |bed| {
        let from = |time: DbTime| format!("{}, 0, 0", time.as_micros());
        let (front, whole) = beside_an_open_transaction(bed, false, from).await;
        assert!(front * 2.0 < whole, "{front} buffers from the front, {whole} from the beginning");
    });
}

#[test]
fn a_search_does_not_step_over_what_was_leased_before_it() {
    on_postgres(async |bed| {
        let from = |time: DbTime| format!("{}, 0, {}", time.as_micros(), Token::of(time).0);
        let (front, whole) = beside_an_open_transaction(bed, true, from).await;
        assert!(front * 4.0 < whole, "{front} buffers from the front, {whole} from the beginning");
        let from = |time: DbTime| format!("{}, 0, 0", time.as_micros());
        let (leases, _) = beside_an_open_transaction(bed, true, from).await;
        assert!(front * 2.0 < leases, "{front} buffers from both fronts, {leases} from the first lease");
    });
}

#[test]
fn a_claim_touches_only_what_it_takes_without_statistics() {
    on_postgres(async |bed| {
        bed.run("alter table leasehold.outbox_events set (autovacuum_enabled = off)").await.unwrap();
        fill(bed).await;
        assert_the_claim_touches_only_what_it_takes(bed, Claim::Front).await;
        assert_the_claim_touches_only_what_it_takes(bed, Claim::Whole).await;
    });
}

async fn assert_a_backlog_of_a_full_destination_is_not_read(bed: &Pg) {
    let root = explain_claim(bed, 30, 20, "https://full.example", Claim::Whole, START).await;
    let mut all = Vec::new();
    nodes(&root, &mut all);
    let updated = all.iter().find(|node| node["Node Type"] == "ModifyTable").expect("an update");
    assert_eq!(updated["Actual Rows"].as_f64(), Some(10.0));
    // The front of the queue, and what is taken: to be found, locked and updated.
    let read: f64 =
        all.iter().filter(|node| node["Relation Name"] == "outbox_events").map(|node| rows_read(node)).sum();
    assert!(read < 100.0, "{read} rows: {root:#}");
}

/// One destination that is full, with a large backlog, and with `between` executed another one behind it.
async fn fill_one(bed: &Pg, between: &'static str) {
    let insert = |url: &str, from: u32, to: u32| {
        format!(
            "insert into leasehold.outbox_events (event_type, destination_url, payload, next_attempt_at)
             select 't', '{url}', '{{}}', leasehold.early_now() - interval '1 hour' + n * interval '1 millisecond'
             from generate_series({from}, {to}) as n"
        )
    };
    bed.run(&insert("https://full.example/x", 1, 15_000)).await.unwrap();
    bed.run(between).await.unwrap();
    bed.run(&insert("https://other.example/x", 15_001, 15_010)).await.unwrap();
}

#[test]
fn a_claim_reaches_past_a_full_destination_without_reading_its_backlog() {
    on_postgres(async |bed| {
        // By these statistics there is one destination, and an index on it is of no use.
        fill_one(bed, "analyze leasehold.outbox_events").await;
        assert_a_backlog_of_a_full_destination_is_not_read(bed).await;
    });
}

#[test]
fn a_claim_reaches_past_a_full_destination_without_statistics() {
    on_postgres(async |bed| {
        fill_one(bed, "alter table leasehold.outbox_events set (autovacuum_enabled = off)").await;
        assert_a_backlog_of_a_full_destination_is_not_read(bed).await;
    });
}

/// As it is planned while nothing was ever in the queue, and for as long as its connection lives.
#[test]
fn a_look_reads_the_queue_by_due_time_alone() {
    on_postgres(async |bed| {
        let mut connection = session(bed).await;
        for (name, value) in PLANS {
            let set = format!("set {name} = {value}");
            sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut connection).await.unwrap();
        }
        let prepare = format!("prepare look (bigint, bigint) as {LOOK}");
        sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut connection).await.unwrap();
        let explain = sqlx::raw_sql("explain (format json) execute look (null, 0)");
        let row = explain.fetch_one(&mut connection).await.unwrap();
        let plan: Value =
            serde_json::from_str(&row.try_get_unchecked::<String, _>(0).unwrap()).expect("JSON");
        let mut all = Vec::new();
        nodes(&plan[0]["Plan"], &mut all);
        let indexes: Vec<_> = all.iter().filter_map(|node| node["Index Name"].as_str()).collect();
        assert!(indexes.contains(&"outbox_events_due"), "{indexes:?}");
        assert!(!indexes.contains(&"outbox_events_due_by_destination"), "{indexes:?}");
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
