//! What becomes of delivered events.

use std::time::Duration;

use leasehold::adapters::postgres::Postgres;
use leasehold::adapters::store::{Page, Retain, Retired, SETTLED_FOR};
use leasehold::machine::{DbTime, Row as Model, Status};

use crate::bed::{A, B, Bed, Pg, on_postgres, on_sqlite, options};
use crate::contract::on_both;
use crate::postgres::{exec, locking, session, until_waiting};

on_both! {
    only_delivered_events_of_that_age_are_deleted
    a_walk_goes_from_page_to_page_and_ends_where_events_are_too_young
    what_the_database_does_not_let_go_stays_and_keeps_no_other
    an_id_does_not_come_again
}

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
const WHOLE: Page = Page { after: 0, rows: 100 };

fn delivered_at(time: DbTime) -> Model {
    let delivered = Model { status: Status::Delivered, delivered_at: Some(time), ..Model::new(20, time) };
    Model { attempts: 2, last_status: Some(204), ..delivered }
}

fn before(time: DbTime, age: Duration) -> DbTime {
    DbTime::from_micros(time.as_micros() - i64::try_from(age.as_micros()).unwrap())
}

/// Sets when the events of a condition were created or changed.
async fn set_time<B: Bed>(bed: &B, column: &str, time: DbTime, condition: &str) {
    let time = if B::POSTGRES {
        format!("timestamptz 'epoch' + {} * interval '1 microsecond'", time.as_micros())
    } else {
        time.as_micros().to_string()
    };
    bed.run(&format!("update {} set {column} = {time} where {condition}", bed.table())).await.unwrap();
}

async fn only_delivered_events_of_that_age_are_deleted<B: Bed>(bed: &B) {
    let ripe = before(bed.now(), HOUR);
    let young = before(bed.now(), HOUR - Duration::from_micros(1));
    let mut gone = Vec::new();
    for row in [
        delivered_at(ripe),
        delivered_at(young),
        Model { status: Status::Failed, ..delivered_at(ripe) },
        Model { status: Status::Pending, ..delivered_at(ripe) },
        delivered_at(before(ripe, DAY)),
        // As from a table of another kind: the last change stands for the delivery.
        Model { delivered_at: None, ..delivered_at(ripe) },
        Model { delivered_at: None, ..delivered_at(ripe) },
    ] {
        gone.push(bed.insert(A, "{}", &row).await);
    }
    set_time(bed, "updated_at", ripe, &format!("id <> {}", gone[6])).await;
    set_time(bed, "updated_at", young, &format!("id = {}", gone[6])).await;
    gone = vec![gone[0], gone[4], gone[5]];
    let left: Vec<_> = bed.rows().await.into_iter().filter(|stored| !gone.contains(&stored.id)).collect();
    let nothing = bed.retire(Retain::Keep, WHOLE).await.unwrap();
    assert_eq!((nothing, bed.rows().await.len()), (Retired { events: 0, kept: None, next: 0 }, 7));
    let retired = bed.retire(Retain::Delete(HOUR), WHOLE).await.unwrap();
    assert_eq!(retired, Retired { events: 3, kept: None, next: 0 });
    assert_eq!(bed.rows().await, left);
    assert_eq!(bed.retire(Retain::Delete(HOUR), WHOLE).await.unwrap().events, 0);
}

async fn a_walk_goes_from_page_to_page_and_ends_where_events_are_too_young<B: Bed>(bed: &B) {
    let (ripe, young) = (before(bed.now(), HOUR), bed.now());
    let mut ids = Vec::new();
    for time in [ripe, young, young, ripe, ripe, young, young, young] {
        ids.push(bed.insert(A, "{}", &delivered_at(time)).await);
    }
    set_time(bed, "created_at", ripe, "true").await;
    set_time(bed, "created_at", young, &format!("id > {}", ids[4])).await;
    let walk = async |after| bed.retire(Retain::Delete(HOUR), Page { after, rows: 2 }).await.unwrap();
    assert_eq!(walk(0).await, Retired { events: 1, kept: None, next: ids[1] });
    assert_eq!(walk(ids[1]).await, Retired { events: 1, kept: None, next: ids[3] });
    // One of the page is old, though the other one isn't: what follows may be old as well.
    assert_eq!(walk(ids[3]).await, Retired { events: 1, kept: None, next: ids[5] });
    assert_eq!(walk(ids[5]).await, Retired { events: 0, kept: None, next: 0 });
    set_time(bed, "created_at", ripe, "true").await;
    assert_eq!(walk(ids[5]).await, Retired { events: 0, kept: None, next: ids[7] });
    assert_eq!(walk(ids[7]).await, Retired { events: 0, kept: None, next: 0 });
    let left: Vec<i64> = bed.rows().await.iter().map(|stored| stored.id).collect();
    assert_eq!(left, [ids[1], ids[2], ids[5], ids[6], ids[7]]);
}

async fn what_the_database_does_not_let_go_stays_and_keeps_no_other<B: Bed>(bed: &B) {
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(bed.insert(A, "{}", &delivered_at(before(bed.now(), HOUR))).await);
    }
    let deferred = if B::POSTGRES { "deferrable initially deferred" } else { "" };
    let table = bed.table();
    bed.run(&format!("create table orders (event bigint references {table} (id) {deferred})")).await.unwrap();
    bed.run(&format!("insert into orders values ({}), ({})", ids[1], ids[3])).await.unwrap();
    let retired = bed.retire(Retain::Delete(HOUR), WHOLE).await.unwrap();
    let kept = retired.kept.expect("two");
    assert!(
        kept.starts_with(&format!("2 events; of row {}: ", ids[1]))
            && kept.to_lowercase().contains("foreign key"),
        "{kept}"
    );
    assert_eq!((retired.events, retired.next), (3, 0));
    assert_eq!(bed.rows().await.iter().map(|stored| stored.id).collect::<Vec<_>>(), [ids[1], ids[3]]);
}

async fn an_id_does_not_come_again<B: Bed>(bed: &B) {
    let first = bed.insert(A, "{}", &delivered_at(before(bed.now(), HOUR))).await;
    assert_eq!(bed.retire(Retain::Delete(HOUR), WHOLE).await.unwrap().events, 1);
    assert!(bed.due().await > first);
}

/// What the archive keeps of its events, in order.
async fn contents(bed: &Pg, table: &str) -> Vec<String> {
    let sql = format!(
        "select to_jsonb(event)::text from (
             select id, event_id, event_type, destination_url, payload, attempts, max_attempts, lease_token, last_status,
                 extract(epoch from delivered_at) as delivered_at, extract(epoch from created_at) as created_at
             from leasehold.{table} order by id
         ) as event"
    );
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_all(&bed.pool).await.unwrap()
}

async fn days(bed: &Pg) -> Vec<String> {
    let mut session = bed.pool.acquire().await.unwrap();
    exec(&mut session, "set timezone = 'UTC'").await;
    sqlx::query_scalar(
        "select relname::text || ' ' || pg_get_expr(relpartbound, pg_class.oid) from pg_inherits
         join pg_class on pg_class.oid = inhrelid
         where inhparent = 'leasehold.outbox_archive'::regclass order by relname",
    )
    .fetch_all(&mut *session)
    .await
    .unwrap()
}

/// A moment of a day in March 2031, UTC. Far from the clock of the host.
fn march(day: i64, hours: i64) -> DbTime {
    DbTime::from_micros((1_930_089_600 + (day - 1) * 86_400 + hours * 3_600) * 1_000_000)
}

#[test]
fn the_archive_has_the_same_contents_by_day() {
    on_postgres(async |bed| {
        // Days are those of UTC, wherever a session is.
        bed.run(&format!("alter database {} set timezone = 'America/New_York'", bed.database)).await.unwrap();
        bed.set_clock(march(9, 12)).await;
        let times = [march(8, 0), march(9, 0), before(march(9, 0), Duration::from_micros(1))];
        for (number, time) in times.into_iter().enumerate() {
            bed.insert(B, &format!("{{\"number\": {number}}}"), &delivered_at(time)).await;
        }
        let expected = contents(bed, "outbox_events").await;
        let young = bed
            .insert(A, "{}", &delivered_at(before(bed.now(), SETTLED_FOR - Duration::from_micros(1))))
            .await;
        let failed =
            bed.insert(A, "{}", &Model { status: Status::Failed, ..delivered_at(march(1, 0)) }).await;
        // The bed's own sessions are older than that.
        assert_eq!(bed.again().await.retire(Retain::Archive(30 * DAY), WHOLE).await.unwrap().events, 3);
        assert_eq!(contents(bed, "outbox_archive").await, expected);
        let left: Vec<i64> = bed.rows().await.iter().map(|stored| stored.id).collect();
        assert_eq!(left, [young, failed]);
        assert_eq!(
            days(bed).await,
            [
                "outbox_archive_20310308 FOR VALUES FROM ('2031-03-08 00:00:00+00') TO ('2031-03-09 00:00:00+00')",
                "outbox_archive_20310309 FOR VALUES FROM ('2031-03-09 00:00:00+00') TO ('2031-03-10 00:00:00+00')",
            ]
        );
    });
}

#[test]
fn an_event_without_a_time_of_delivery_is_archived_by_its_last_change() {
    on_postgres(async |bed| {
        bed.set_clock(march(9, 12)).await;
        bed.insert(A, "{}", &Model { delivered_at: None, ..delivered_at(march(9, 0)) }).await;
        set_time(bed, "updated_at", march(8, 3), "true").await;
        assert_eq!(bed.retire(Retain::Archive(30 * DAY), WHOLE).await.unwrap().events, 1);
        let archived = "select (extract(epoch from delivered_at) * 1000000)::bigint
            from leasehold.outbox_archive_20310308";
        let archived: Vec<i64> = sqlx::query_scalar(archived).fetch_all(&bed.pool).await.unwrap();
        assert_eq!(archived, [march(8, 3).as_micros()]);
    });
}

/// Rows that a trigger doesn't let go with the SQLSTATE in `last_error`.
async fn hold_back(bed: &Pg) {
    bed.run(
        "create function leasehold.hold_back() returns trigger language plpgsql as $$ begin
             if old.last_error is not null then
                 raise exception 'on legal hold' using errcode = old.last_error;
             end if;
             return old;
         end $$;
         create trigger hold_back before delete on leasehold.outbox_events
             for each row execute function leasehold.hold_back()",
    )
    .await
    .unwrap();
}

#[test]
fn what_is_held_back_for_a_reason_of_its_own_keeps_no_other() {
    on_postgres(async |bed| {
        hold_back(bed).await;
        for retain in [Retain::Archive(DAY), Retain::Delete(SETTLED_FOR)] {
            for code in ["LH001", "42501"] {
                let free = delivered_at(before(bed.now(), HOUR));
                let held = Model { last_error: Some(code.to_owned()), ..free.clone() };
                let held = bed.insert(A, "{}", &held).await;
                for _ in 0..2 {
                    bed.insert(A, "{}", &free).await;
                }
                let kept = Some(format!("1 events; of row {held}: {code} on legal hold"));
                // The walk goes on behind it.
                let alone = bed.retire(retain, Page { after: 0, rows: 1 }).await.unwrap();
                assert_eq!(alone, Retired { events: 0, kept: kept.clone(), next: held }, "{retain:?}");
                let all = bed.retire(retain, WHOLE).await.unwrap();
                assert_eq!(all, Retired { events: 2, kept, next: 0 }, "{retain:?}");
                bed.run("update leasehold.outbox_events set last_error = null").await.unwrap();
                assert_eq!(bed.retire(retain, WHOLE).await.unwrap().events, 1);
            }
        }
    });
}

/// What may end at once is tried again, and not taken for the fault of each event.
#[test]
fn what_is_not_for_the_event_ends_the_page() {
    on_postgres(async |bed| {
        hold_back(bed).await;
        let free = delivered_at(before(bed.now(), HOUR));
        for code in ["08006", "25006", "40001", "53100", "55P03", "57014", "58030", "XX000"] {
            bed.insert(A, "{}", &free).await;
            bed.insert(A, "{}", &Model { last_error: Some(code.to_owned()), ..free.clone() }).await;
            let error = bed.retire(Retain::Delete(SETTLED_FOR), WHOLE).await.unwrap_err().to_string();
            assert!(error.contains(code), "{error}");
            assert_eq!(bed.rows().await.len(), 2, "nothing of the page is done");
            // Once the server has rolled back.
            let again = "select pg_advisory_xact_lock(7311846112204518258); truncate leasehold.outbox_events";
            bed.run(again).await.unwrap();
        }
    });
}

/// And not once for each event.
#[test]
fn a_right_that_is_missing_altogether_is_said() {
    on_postgres(async |bed| {
        let user = format!("user_of_{}", bed.database);
        bed.run(&format!(
            "create role {user} login; grant usage on schema leasehold to {user};
             grant select, update on leasehold.outbox_events to {user}; grant select on leasehold.test_clock to {user}"
        ))
        .await
        .unwrap();
        let mut url = url::Url::parse(&bed.url).unwrap();
        url.query_pairs_mut().append_pair("options", &format!("-c role={user}"));
        let store = Postgres::new(url.as_str(), options()).unwrap();
        bed.insert(A, "{}", &delivered_at(before(bed.now(), HOUR))).await;
        let retired = store.retire(Retain::Delete(SETTLED_FOR), WHOLE).await;
        bed.run(&format!("drop owned by {user}; drop role {user}")).await.unwrap();
        let error = retired.unwrap_err().to_string();
        assert!(error.contains("42501 permission denied for table outbox_events"), "{error}");
    });
}

#[test]
fn a_day_is_dropped_when_all_of_it_is_old_enough() {
    on_postgres(async |bed| {
        bed.set_clock(march(9, 12)).await;
        for day in [7, 8, 9] {
            bed.insert(A, "{}", &delivered_at(march(day, 1))).await;
        }
        let retain = Retain::Archive(2 * DAY);
        assert_eq!(bed.retire(retain, WHOLE).await.unwrap().events, 3);
        let walk = async |time| {
            bed.set_clock(time).await;
            bed.store().drop_days(2 * DAY).await.unwrap();
            days(bed).await.len()
        };
        // The 7th ends as the 8th begins.
        assert_eq!(walk(before(march(10, 0), Duration::from_micros(1))).await, 3);
        assert_eq!(walk(march(10, 0)).await, 2);
        assert_eq!(contents(bed, "outbox_archive").await.len(), 2);
        // A table of the operator's own is let be, however old.
        bed.run(
            "create table leasehold.outbox_archive_before partition of leasehold.outbox_archive
                 for values from (minvalue) to ('2031-03-08 00:00+00')",
        )
        .await
        .unwrap();
        assert_eq!(walk(march(20, 0)).await, 1);
        assert_eq!(walk(march(20, 0)).await, 1);
    });
}

#[test]
fn a_day_that_can_not_be_dropped_keeps_no_other() {
    on_postgres(async |bed| {
        bed.set_clock(march(9, 12)).await;
        for day in [7, 8] {
            bed.insert(A, "{}", &delivered_at(march(day, 1))).await;
        }
        assert_eq!(bed.retire(Retain::Archive(DAY), WHOLE).await.unwrap().events, 2);
        bed.run("create view kept as select from leasehold.outbox_archive_20310307").await.unwrap();
        bed.set_clock(march(20, 0)).await;
        let error = bed.store().drop_days(DAY).await.unwrap_err().to_string();
        assert!(error.contains("2BP01") && error.contains("outbox_archive_20310307"), "{error}");
        let left = days(bed).await;
        assert!(left.len() == 1 && left[0].starts_with("outbox_archive_20310307"), "{left:?}");
    });
}

#[test]
fn a_locked_event_is_skipped_and_holds_up_no_other() {
    on_postgres(async |bed| {
        for retain in [Retain::Archive(DAY), Retain::Delete(SETTLED_FOR)] {
            let mut ids = Vec::new();
            for _ in 0..3 {
                ids.push(bed.insert(A, "{}", &delivered_at(before(bed.now(), HOUR))).await);
            }
            let mut other = locking(bed, ids[1]).await;
            assert_eq!(bed.retire(retain, WHOLE).await.unwrap().events, 2, "{retain:?}");
            exec(&mut other, "commit").await;
            assert_eq!(bed.rows().await[0].id, ids[1]);
            assert_eq!(bed.retire(retain, WHOLE).await.unwrap().events, 1, "{retain:?}");
        }
    });
}

#[test]
fn an_event_that_is_set_back_meanwhile_stays() {
    on_postgres(async |bed| {
        let store = bed.again().await;
        let retain = Retain::Delete(SETTLED_FOR);
        // Who asks for the time once more than a plan is made with waits at a gate: by then the statement sees the events
        // as they were.
        let mut gate = session(bed).await;
        exec(
            &mut gate,
            "create sequence leasehold.calls;
             create or replace function leasehold.early_now() returns timestamptz language plpgsql stable as $$ begin
                 if nextval('leasehold.calls') > 1000 then
                     perform pg_advisory_lock_shared(1), pg_advisory_unlock_shared(1);
                 end if;
                 return (select early from leasehold.test_clock);
             end $$",
        )
        .await;
        store.retire(retain, WHOLE).await.unwrap();
        let id = bed.insert(A, "{}", &delivered_at(before(bed.now(), HOUR))).await;
        exec(
            &mut gate,
            "select setval('leasehold.calls', 1000 - last_value) from leasehold.calls; select pg_advisory_lock(1)",
        )
        .await;
        let retiring = tokio::spawn(async move { store.retire(retain, WHOLE).await });
        until_waiting(bed, 1).await;
        let again =
            "update leasehold.outbox_events set delivery_status = 'pending', delivered_at = null where id = ";
        exec(&mut gate, &format!("{again}{id}; select pg_advisory_unlock(1)")).await;
        assert_eq!(retiring.await.unwrap().unwrap().events, 0);
        assert_eq!(bed.rows().await.len(), 1);
    });
}

#[test]
fn several_at_once_move_each_event_once() {
    on_postgres(async |bed| {
        bed.set_clock(march(20, 0)).await;
        let mut expected = Vec::new();
        for number in 0..300 {
            expected.push(bed.insert(A, "{}", &delivered_at(march(1 + number % 15, 0))).await);
        }
        let workers = (0..4).map(|_| {
            let store = Postgres::new(&bed.url, options()).unwrap();
            let pool = bed.pool.clone();
            tokio::spawn(async move {
                let (mut moved, mut after) = (0, 0);
                while sqlx::query_scalar("select exists (select from leasehold.outbox_events)")
                    .fetch_one(&pool)
                    .await
                    .unwrap()
                {
                    let page = Page { after, rows: 7 };
                    let retired = store.retire(Retain::Archive(30 * DAY), page).await.unwrap();
                    moved += retired.events;
                    after = retired.next;
                }
                moved
            })
        });
        let mut moved = 0;
        for worker in workers.collect::<Vec<_>>() {
            moved += worker.await.unwrap();
        }
        assert_eq!(moved, 300);
        let archived: Vec<i64> = sqlx::query_scalar("select id from leasehold.outbox_archive order by id")
            .fetch_all(&bed.pool)
            .await
            .unwrap();
        assert_eq!(archived, expected);
    });
}

#[test]
fn who_reads_the_archive_does_not_hold_up_a_new_day() {
    on_postgres(async |bed| {
        bed.set_clock(march(9, 12)).await;
        let mut reader = locking(bed, 0).await;
        exec(&mut reader, "select from leasehold.outbox_archive").await;
        bed.insert(A, "{}", &delivered_at(march(9, 0))).await;
        assert_eq!(bed.retire(Retain::Archive(DAY), WHOLE).await.unwrap().events, 1);
        exec(&mut reader, "commit").await;
    });
}

#[test]
fn who_reads_the_archive_keeps_its_oldest_day_and_holds_up_nothing_else() {
    on_postgres(async |bed| {
        bed.set_clock(march(9, 12)).await;
        bed.insert(A, "{}", &delivered_at(march(7, 1))).await;
        let retain = Retain::Archive(DAY);
        assert_eq!(bed.retire(retain, WHOLE).await.unwrap().events, 1);
        let mut reader = locking(bed, 0).await;
        exec(&mut reader, "select from leasehold.outbox_archive").await;
        bed.set_clock(march(20, 0)).await;
        bed.insert(A, "{}", &delivered_at(march(19, 1))).await;
        bed.store().drop_days(DAY).await.unwrap();
        assert_eq!(bed.retire(retain, WHOLE).await.unwrap().events, 1);
        assert_eq!(days(bed).await.len(), 2);
        exec(&mut reader, "commit").await;
        bed.store().drop_days(DAY).await.unwrap();
        assert_eq!(days(bed).await.len(), 1);
    });
}

#[test]
fn who_finds_another_at_it_leaves_no_transaction_open() {
    on_postgres(async |bed| {
        bed.insert(A, "{}", &delivered_at(before(bed.now(), HOUR))).await;
        let mut other = locking(bed, 0).await;
        exec(&mut other, "select pg_advisory_xact_lock(7311846112204518258)").await;
        let store = bed.again().await;
        assert_eq!(store.retire(Retain::Delete(SETTLED_FOR), WHOLE).await.unwrap().events, 0);
        let open = "select count(*) from pg_stat_activity where datname = current_database()
            and application_name = 'leasehold' and state = 'idle in transaction'";
        assert_eq!(sqlx::query_scalar::<_, i64>(open).fetch_one(&bed.pool).await.unwrap(), 0);
        exec(&mut other, "commit").await;
        assert_eq!(store.retire(Retain::Delete(SETTLED_FOR), WHOLE).await.unwrap().events, 1);
    });
}
