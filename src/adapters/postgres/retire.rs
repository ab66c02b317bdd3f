//! Delivered events leave the queue: page by page, in transactions of their own.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};

use super::connect::{BEGIN, Borrowed};
use super::error::{database, is_of_a_row, text};
use super::{Postgres, micros};
use crate::adapters::store::{Page, Retain, Retired, SETTLED_FOR, StoreError};

/// Held by the one who retires, in the whole database.
const ALONE: &str = "select pg_try_advisory_xact_lock(7311846112204518258)";
const RIPE: &str = include_str!("ripe.sql");
const DELETE: &str = "delete from leasehold.outbox_events where id = any ($1)";
const MOVE: &str = "with retired as (delete from leasehold.outbox_events where id = any ($1) returning *)
     insert into leasehold.outbox_archive (id, event_id, event_type, destination_url, payload, attempts, max_attempts,
         lease_token, last_status, delivered_at, created_at)
     select id, event_id, event_type, destination_url, payload, attempts, max_attempts,
         lease_token, last_status, coalesce(delivered_at, updated_at), created_at
     from retired";
/// The days of the archive that are over for longer than $1 microseconds.
const OVER: &str = "select relname::text from pg_inherits join pg_class on pg_class.oid = inhrelid
     where inhparent = 'leasehold.outbox_archive'::regclass and case
         when relname ~ '^outbox_archive_[0-9]{8}$'
         then (right(relname, 8) || ' 00:00+00')::timestamptz + interval '24 hours'
             <= leasehold.early_now() - $1 * interval '1 microsecond'
     end
     order by relname";

impl Postgres {
    /// Moves or deletes the delivered events of a page that are old enough, unless another worker is at it. What can't go
    /// for what it is stays, and keeps no other.
    ///
    /// # Errors
    /// When the database refuses; nothing of the page has been done then.
    pub async fn retire(&self, retain: Retain, page: Page) -> Result<Retired, StoreError> {
        let age = match retain {
            Retain::Keep => return Ok(Retired { events: 0, kept: None, next: 0 }),
            Retain::Delete(keep_for) => keep_for,
            Retain::Archive(_) => SETTLED_FOR,
        };
        let mut connection = self.retiring.acquire().await.map_err(|error| database("connecting", &error))?;
        let retired = self.retire_page(&mut connection, retain, age, page).await;
        let retired =
            retired.map_err(|error| self.failed(connection.host, "retiring delivered events", &error))?;
        connection.put_back();
        Ok(retired)
    }

    /// Drops the days of the archive that are over for longer than `keep_for`, unless another worker is at it. A day that
    /// can't be dropped, or that somebody reads, stays, and keeps no other.
    ///
    /// # Errors
    /// When the database refuses; of several days the first one's.
    pub async fn drop_days(&self, keep_for: Duration) -> Result<(), StoreError> {
        let mut connection = self.retiring.acquire().await.map_err(|error| database("connecting", &error))?;
        let dropped = self.drop_days_over(connection.get(), keep_for).await;
        dropped.map_err(|error| self.failed(connection.host, "dropping a day of the archive", &error))?;
        connection.put_back();
        Ok(())
    }

    fn failed(&self, host: usize, doing: &'static str, error: &sqlx::Error) -> StoreError {
        self.hosts.look_elsewhere(host, error);
        StoreError::Database { doing, error: text(error) }
    }

    async fn retire_page(
        &self,
        connection: &mut Borrowed<'_>,
        retain: Retain,
        age: Duration,
        page: Page,
    ) -> Result<Retired, sqlx::Error> {
        let mut transaction = connection.get().begin_with(BEGIN).await?;
        self.bound(&mut transaction).await?;
        if !alone(&mut transaction).await? {
            // Dropped, it would stay open until the connection is used again.
            transaction.rollback().await?;
            return Ok(Retired { events: 0, kept: None, next: page.after });
        }
        let row = sqlx::query(RIPE)
            .persistent(false)
            .bind(page.after)
            .bind(i64::from(page.rows))
            .bind(micros(age))
            .fetch_one(&mut *transaction)
            .await?;
        let ids: Vec<i64> = row.try_get("ids")?;
        if matches!(retain, Retain::Archive(_)) {
            for day in row.try_get::<Vec<String>, _>("days")? {
                create_day(&mut transaction, &day).await?;
            }
        }
        let retire = if matches!(retain, Retain::Archive(_)) { MOVE } else { DELETE };
        // What is refused at the end would be so for all of them.
        run(&mut transaction, "set constraints all immediate".to_owned()).await?;
        let (events, kept) = let_go(&mut transaction, retire, &ids).await?;
        transaction.commit().await?;
        Ok(Retired { events, kept, next: row.try_get("next")? })
    }

    async fn drop_days_over(
        &self,
        connection: &mut PgConnection,
        keep_for: Duration,
    ) -> Result<(), sqlx::Error> {
        let over = sqlx::query_scalar::<_, String>(OVER).persistent(false).bind(micros(keep_for));
        let mut first = Ok(());
        for day in over.fetch_all(&mut *connection).await? {
            match self.drop_day(connection, &day).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error @ sqlx::Error::Database(_)) => first = first.and(Err(error)),
                Err(error) => return Err(error),
            }
        }
        first
    }

    /// Answers whether another day may be tried: not while another worker is at it, or somebody reads the archive.
    async fn drop_day(&self, connection: &mut PgConnection, day: &str) -> Result<bool, sqlx::Error> {
        let mut transaction = connection.begin_with(BEGIN).await?;
        self.bound(&mut transaction).await?;
        if alone(&mut transaction).await? {
            // Who waits for this lock holds up all that come to read the archive.
            let drop = format!("set local lock_timeout = '100ms'; drop table if exists leasehold.{day}");
            match run(&mut transaction, drop).await {
                Ok(()) => return transaction.commit().await.map(|()| true),
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03") => {
                    tracing::debug!(day, "somebody reads the archive: its oldest days stay for now");
                }
                Err(error) => {
                    transaction.rollback().await?;
                    return Err(error);
                }
            }
        }
        transaction.rollback().await.map(|()| false)
    }
}

/// Deletes or moves events, all at once or, where the database refuses that for what one of them is, each by itself.
/// Answers how many are gone, and what stays.
async fn let_go(
    connection: &mut PgConnection,
    retire: &'static str,
    ids: &[i64],
) -> Result<(u64, Option<String>), sqlx::Error> {
    match try_to(connection, retire, ids).await {
        Err(error) if is_of_a_row(&error) => {}
        gone => return Ok((gone?, None)),
    }
    // What is refused of no event at all, as for a right that is missing, is not for one of them.
    try_to(connection, retire, &[]).await?;
    let (mut events, mut kept, mut why) = (0, 0, None);
    for id in ids {
        match try_to(connection, retire, std::slice::from_ref(id)).await {
            Err(error) if is_of_a_row(&error) => {
                kept += 1;
                why.get_or_insert_with(|| format!("of row {id}: {}", text(&error)));
            }
            gone => events += gone?,
        }
    }
    Ok((events, why.map(|why| format!("{kept} events; {why}"))))
}

/// In a savepoint: what was done before stays if this is refused.
async fn try_to(
    connection: &mut PgConnection,
    retire: &'static str,
    ids: &[i64],
) -> Result<u64, sqlx::Error> {
    let mut savepoint = connection.begin().await?;
    match sqlx::query(retire).persistent(false).bind(ids).execute(&mut *savepoint).await {
        Ok(done) => {
            savepoint.commit().await?;
            Ok(done.rows_affected())
        }
        Err(error) => {
            savepoint.rollback().await?;
            Err(error)
        }
    }
}

async fn alone(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(ALONE).persistent(false).fetch_one(connection).await
}

/// Makes the partition of a day (`YYYYMMDD`, UTC) if it is missing. Attached, and not created in place, since that would
/// lock out who reads the archive.
async fn create_day(connection: &mut PgConnection, day: &str) -> Result<(), sqlx::Error> {
    let table = format!("leasehold.outbox_archive_{day}");
    let there = sqlx::query_scalar("select to_regclass($1) is not null").persistent(false).bind(&table);
    if there.fetch_one(&mut *connection).await? {
        return Ok(());
    }
    let create = format!(
        "create table {table} (like leasehold.outbox_archive including all);
         alter table leasehold.outbox_archive attach partition {table}
             for values from (timestamptz '{day} 00:00+00') to (timestamptz '{day} 00:00+00' + interval '24 hours')"
    );
    run(connection, create).await
}

async fn run(connection: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(|_| ())
}
