//! How Postgres stores the rows, and which of them a statement reads.

use std::time::Duration;

use leasehold::adapters::postgres::{PLANS, claim_of_front};
use leasehold::machine::{Answer, ClaimFailure, DbTime, LeaseKey, Row as Model, Token};
use leasehold::ports::Outbox as _;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Row as _};

use crate::bed::{A, Bed, GRACE, LEASE, MAX_PAYLOAD, Pg, on_postgres, renewal};
use crate::postgres::{exec, session};

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

pub(crate) const CLAIM: &str = include_str!("../../src/adapters/postgres/claim.sql");
const RENEW: &str = include_str!("../../src/adapters/postgres/renew.sql");
/// The beginning of the queue, and of the leases.
const START: &str = "null, 0, 0";
const SETTLE: &str = include_str!("../../src/adapters/postgres/settle.sql");
const LOOK: &str = include_str!("../../src/adapters/postgres/look.sql");

pub(crate) fn claim_query(
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
        .bind(65_536_i32)
        .bind(ClaimFailure::AtBound.last_error())
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
             text, bigint, bigint, bigint, bigint, text, text, int, int, text) as {claim}"
    );
    sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut connection).await.unwrap();
    let execute = format!(
        "explain (analyze, buffers, format json) execute claim ('w', 2000000, 200000, {search}, '{}', 100, 0, {limit}, 1,
             {share}, '{{{full}}}', '{{{}}}', {MAX_PAYLOAD}, 8388608, 'attempts', 'reclaims',
             {from}, null, '', '', 1000, 65536, 'bound')",
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
