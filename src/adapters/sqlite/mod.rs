//! The outbox on SQLite: the demo's default, and good for an application that lives on one host.
//!
//! One writer at a time: every write is `BEGIN IMMEDIATE` and reads the host's clock after that, so early and late clock
//! are one, and no row is ever found locked. WAL with `synchronous=FULL`. No `LISTEN`: waking is by polling.

mod claim;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::error::DatabaseError;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Row as _, Sqlite as Database, SqliteConnection, Transaction};
use tokio::sync::{Mutex, MutexGuard};

use super::store::{NewEvent, Page, Retain, Retired, Status, StoreError, Walk, clean, micros};
use crate::machine::{
    Answer, ClaimRequest, DbTime, LeaseKey, OwnedReply, OwnedRequest, RenewReply, RenewRequest, RowId,
    Settle, SettleReply, SettleRequest, StoreFault, Token, WorkerId,
};
use crate::ports::{Claimed, Outbox};

/// A file has no server that restarts: its incarnation is always this one, and always up.
const INCARNATION: &str = "sqlite";

const MIGRATIONS: [(i64, &str); 1] =
    [(1, include_str!("../../../migrations/sqlite/0001_create_outbox_events.sql"))];

type HostClock = Arc<dyn Fn() -> DbTime + Send + Sync>;

/// How to open the outbox.
#[derive(Clone)]
pub struct SqliteOptions {
    /// `R`: the busy timeout.
    pub store_timeout: Duration,
    /// The largest payload that is returned, in bytes.
    pub max_payload: u64,
    /// The clock that grants and expires leases; tests put their own in its place.
    pub clock: HostClock,
}

impl SqliteOptions {
    /// With the host's wall clock.
    pub fn new(store_timeout: Duration, max_payload: u64) -> Self {
        let clock = || {
            let since =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            DbTime::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
        };
        Self { store_timeout, max_payload, clock: Arc::new(clock) }
    }
}

impl fmt::Debug for SqliteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteOptions").field("store_timeout", &self.store_timeout).finish_non_exhaustive()
    }
}

/// The outbox on SQLite.
#[derive(Debug)]
pub struct Sqlite {
    writer: SqlitePool,
    readers: SqlitePool,
    options: SqliteOptions,
    /// Whose turn it is to write. Renewals queue here directly, everything else behind `others`: so a renewal waits
    /// for one write at most.
    turn: Mutex<()>,
    others: Mutex<()>,
    walk: Mutex<Walk<claim::Key>>,
}

fn text(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => {
            format!("SQLite {} {}", error.code().as_deref().unwrap_or("?"), error.message())
        }
        sqlx::Error::ColumnDecode { index, .. } => format!("column {index} can't be decoded"),
        other => other.to_string(),
    }
}

/// The primary result code of what a constraint refuses, or a trigger.
const CONSTRAINT: u32 = 19;

/// The primary result code is the low byte of SQLite's extended one.
fn primary_code(error: &dyn DatabaseError) -> u32 {
    error.code().and_then(|code| code.parse::<u32>().ok()).unwrap_or(0) & 0xff
}

/// What a failed call means.
fn fault(error: &sqlx::Error) -> StoreFault {
    let error_text = text(error);
    match error {
        sqlx::Error::Database(database) => {
            match primary_code(database.as_ref()) {
                // BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL: rolled back.
                5..=10 | 13..=15 => StoreFault::NotApplied { error: error_text },
                _ => StoreFault::Permanent { error: error_text },
            }
        }
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => StoreFault::NotApplied { error: error_text },
        _ => StoreFault::Unknown { error: error_text },
    }
}

fn database(doing: &'static str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(refused) if refused.message().starts_with("no such table") => {
            StoreError::Schema { missing: refused.message().to_owned() }
        }
        _ => StoreError::Database { doing, error: text(error) },
    }
}

/// A write under way: the turn to write, and the transaction.
struct Write<'a> {
    transaction: Transaction<'static, Database>,
    /// The clock, read once the write lock was held.
    now: DbTime,
    _turn: MutexGuard<'a, ()>,
    _others: Option<MutexGuard<'a, ()>>,
}

impl Sqlite {
    /// Whether a URL can be read, without opening the file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_url(url: &str) -> Result<(), String> {
        SqliteConnectOptions::from_str(url).map(drop).map_err(|error| text(&error))
    }

    /// Opens the file; only with `create` is it made if it is not there.
    ///
    /// # Errors
    /// When the URL can't be read or the file can't be opened.
    pub async fn open(url: &str, options: SqliteOptions, create: bool) -> Result<Self, StoreError> {
        let connect = SqliteConnectOptions::from_str(url)
            .map_err(|error| database("reading DATABASE_URL", &error))?
            .create_if_missing(create)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(options.store_timeout)
            .disable_statement_logging();
        let file = connect.get_filename();
        if !create && !file.exists() {
            return Err(StoreError::Schema { missing: format!("there is no file {}", file.display()) });
        }
        let open = |connections, connect| {
            let pool =
                SqlitePoolOptions::new().max_connections(connections).acquire_timeout(options.store_timeout);
            pool.idle_timeout(None).max_lifetime(None).connect_with(connect)
        };
        let doing = |error| database("opening the SQLite file", &error);
        let writer = open(1, connect.clone()).await.map_err(doing)?;
        let readers = open(2, connect).await.map_err(doing)?;
        Ok(Self {
            writer,
            readers,
            options,
            turn: Mutex::default(),
            others: Mutex::default(),
            walk: Mutex::default(),
        })
    }

    async fn write(&self, renewal: bool) -> Result<Write<'_>, sqlx::Error> {
        let others = if renewal { None } else { Some(self.others.lock().await) };
        let turn = self.turn.lock().await;
        let transaction = self.writer.begin_with("BEGIN IMMEDIATE").await?;
        Ok(Write { transaction, now: (self.options.clock)(), _turn: turn, _others: others })
    }

    /// Applies what is missing of the migrations. Safe to run twice and from several processes at once.
    ///
    /// # Errors
    /// When the file can't be written.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        const DOING: &str = "migrating";
        let doing = |error| database(DOING, &error);
        let mut write = self.write(false).await.map_err(doing)?;
        let connection = &mut *write.transaction;
        sqlx::raw_sql("create table if not exists leasehold_migrations (version integer primary key)")
            .execute(&mut *connection)
            .await
            .map_err(doing)?;
        for (version, sql) in MIGRATIONS {
            let applied: Option<i64> =
                sqlx::query_scalar("select version from leasehold_migrations where version = ?")
                    .bind(version)
                    .fetch_optional(&mut *connection)
                    .await
                    .map_err(doing)?;
            if applied.is_none() {
                sqlx::raw_sql(sql).execute(&mut *connection).await.map_err(doing)?;
                sqlx::query("insert into leasehold_migrations (version) values (?)")
                    .bind(version)
                    .execute(&mut *connection)
                    .await
                    .map_err(doing)?;
            }
        }
        // Dropped or never restored: the commands that miss it send here.
        let table =
            sqlx::query_scalar("select exists (select 1 from sqlite_schema where name = 'outbox_events')");
        if !table.fetch_one(&mut *connection).await.map_err(doing)? {
            let error = "the schema is damaged: leasehold_migrations says that it is set up, and outbox_events is \
                missing. Restore the file from a backup; or `drop table leasehold_migrations`, and migrate again";
            return Err(StoreError::Database { doing: DOING, error: error.into() });
        }
        write.transaction.commit().await.map_err(doing)
    }

    /// Fails with what to do if the schema is missing or older than this program.
    ///
    /// # Errors
    /// [`StoreError::Schema`] or what kept it from looking.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        let version: Option<i64> = sqlx::query_scalar("select max(version) from leasehold_migrations")
            .fetch_one(&self.readers)
            .await
            .map_err(|error| database("looking for the schema", &error))?;
        match MIGRATIONS.last() {
            Some((newest, _)) if version.unwrap_or(0) < *newest => Err(StoreError::Schema {
                missing: format!("schema version {}, needed {newest}", version.unwrap_or(0)),
            }),
            _ => Ok(()),
        }
    }

    /// Inserts events in one transaction: all or none. Returns their ids, in order.
    ///
    /// # Errors
    /// When the database refuses any of them.
    pub async fn enqueue(&self, events: &[NewEvent]) -> Result<Vec<String>, StoreError> {
        self.check_schema().await?;
        let doing = |error| database("enqueueing", &error);
        let mut write = self.write(false).await.map_err(doing)?;
        let mut ids = Vec::with_capacity(events.len());
        for event in events {
            // A column that is left out takes the table's default.
            let mut columns = vec!["event_type", "destination_url", "payload", "next_attempt_at"];
            columns.extend(event.event_id.is_some().then_some("event_id"));
            columns.extend(event.max_attempts.is_some().then_some("max_attempts"));
            let marks = vec!["?"; columns.len()].join(", ");
            let sql = format!(
                "insert into outbox_events ({}) values ({marks}) returning event_id",
                columns.join(", ")
            );
            let mut query = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                .bind(&event.event_type)
                .bind(&event.destination_url)
                .bind(&event.payload)
                .bind(event.next_attempt_at.unwrap_or(write.now.as_micros()));
            if let Some(id) = &event.event_id {
                query = query.bind(id);
            }
            if let Some(max) = event.max_attempts {
                query = query.bind(max);
            }
            let id = query.fetch_one(&mut *write.transaction).await.map_err(|error| match &error {
                sqlx::Error::Database(refused) if refused.is_unique_violation() => {
                    StoreError::duplicate(ids.len(), &text(&error))
                }
                sqlx::Error::Database(refused) if primary_code(refused.as_ref()) == CONSTRAINT => {
                    StoreError::Refused { place: ids.len(), problem: text(&error) }
                }
                _ => doing(error),
            })?;
            ids.push(id);
        }
        write.transaction.commit().await.map_err(doing)?;
        Ok(ids)
    }

    /// Counts the events.
    ///
    /// # Errors
    /// When the file can't be read or has no schema.
    pub async fn status(&self) -> Result<Status, StoreError> {
        self.check_schema().await?;
        let now = (self.options.clock)().as_micros();
        let read = async || -> Result<Status, sqlx::Error> {
            let row = sqlx::query(
                "select
                     count(*) filter (where delivery_status = 'pending') as pending,
                     count(*) filter (where delivery_status = 'pending' and lease_owner is null
                         and next_attempt_at <= ?1) as due,
                     count(*) filter (where delivery_status = 'pending' and attempts > 0) as retrying,
                     count(*) filter (where lease_owner is not null) as leased,
                     count(*) filter (where delivery_status = 'delivered') as delivered,
                     count(*) filter (where delivery_status = 'failed') as failed,
                     min(next_attempt_at) filter (where delivery_status = 'pending' and lease_owner is null
                         and next_attempt_at <= ?1) as oldest
                 from outbox_events",
            )
            .bind(now)
            .fetch_one(&self.readers)
            .await?;
            let count = |name: &str| row.try_get::<i64, _>(name).map(i64::unsigned_abs);
            let oldest: Option<i64> = row.try_get("oldest")?;
            Ok(Status {
                pending: count("pending")?,
                due: count("due")?,
                retrying: count("retrying")?,
                leased: count("leased")?,
                delivered: count("delivered")?,
                failed: count("failed")?,
                oldest_due_age_seconds: oldest.map(|oldest| (now - oldest) as f64 / 1e6),
            })
        };
        read().await.map_err(|error| database("counting events", &error))
    }

    /// Deletes the delivered events of a page that are old enough.
    ///
    /// # Errors
    /// When the file can't be written, or there should be an archive: SQLite has none.
    pub async fn retire(&self, retain: Retain, page: Page) -> Result<Retired, StoreError> {
        const DOING: &str = "retiring delivered events";
        let keep_for = match retain {
            Retain::Keep => return Ok(Retired { events: 0, kept: None, next: 0 }),
            Retain::Delete(keep_for) => keep_for,
            Retain::Archive(_) => {
                return Err(StoreError::Database { doing: DOING, error: "no archive on SQLite".to_owned() });
            }
        };
        let retire = async || -> Result<Retired, sqlx::Error> {
            let mut write = self.write(false).await?;
            let too_young = write.now.as_micros().saturating_sub(micros(keep_for));
            let (rows, last, oldest): (i64, Option<i64>, Option<i64>) = sqlx::query_as(
                "select count(*), max(id), min(created_at)
                 from (select id, created_at from outbox_events where id > ? order by id limit ?)",
            )
            .bind(page.after)
            .bind(page.rows)
            .fetch_one(&mut *write.transaction)
            .await?;
            let ripe: Vec<i64> = sqlx::query_scalar(
                "select id from outbox_events
                 where id > ? and id <= ? and delivery_status = 'delivered'
                     and coalesce(delivered_at, updated_at) <= ? order by id",
            )
            .bind(page.after)
            .bind(last)
            .bind(too_young)
            .fetch_all(&mut *write.transaction)
            .await?;
            let (mut events, mut kept, mut why) = (0, 0, None);
            for id in ripe {
                // What is refused is undone by itself.
                let delete = sqlx::query("delete from outbox_events where id = ?").bind(id);
                match delete.execute(&mut *write.transaction).await {
                    Err(sqlx::Error::Database(error)) if primary_code(error.as_ref()) == CONSTRAINT => {
                        kept += 1;
                        why.get_or_insert_with(|| {
                            format!("of row {id}: {}", text(&sqlx::Error::Database(error)))
                        });
                    }
                    gone => events += gone?.rows_affected(),
                }
            }
            write.transaction.commit().await?;
            // Ids rise with time: behind a page that is too young as a whole there is nothing to be found.
            let more = rows == i64::from(page.rows) && oldest.is_some_and(|oldest| oldest <= too_young);
            let next = last.filter(|_| more).unwrap_or(0);
            Ok(Retired { events, kept: why.map(|why| format!("{kept} events; {why}")), next })
        };
        retire().await.map_err(|error| database(DOING, &error))
    }

    async fn renew_all(&self, request: &RenewRequest) -> Result<RenewReply, sqlx::Error> {
        let mut write = self.write(true).await?;
        let until = write.now.after(request.lease).as_micros();
        let mut answers = Vec::with_capacity(request.keys.len());
        for key in &request.keys {
            let renewed = sqlx::query(
                "update outbox_events set lease_until = max(lease_until, ?)
                 where id = ? and lease_token = ? and lease_owner = ?",
            )
            .bind(until)
            .bind(key.row.0)
            .bind(key.token.0)
            .bind(request.owner.as_str())
            .execute(&mut *write.transaction)
            .await?;
            answers.push((*key, answer(&mut write.transaction, *key, renewed.rows_affected()).await?));
        }
        let db_now = write.now;
        write.transaction.commit().await?;
        Ok(RenewReply { db_now, answers })
    }

    async fn settle_all(&self, request: &SettleRequest) -> Result<SettleReply, sqlx::Error> {
        let mut write = self.write(false).await?;
        let now = write.now;
        let mut answers = Vec::with_capacity(request.entries.len());
        for (key, settle) in &request.entries {
            let settled = settle_one(&mut write.transaction, now, &request.owner, *key, settle).await?;
            answers.push((*key, answer(&mut write.transaction, *key, settled).await?));
        }
        write.transaction.commit().await?;
        Ok(SettleReply { db_now: now, answers })
    }
}

/// Rule P2: what a guard that matched no row means.
async fn answer(
    connection: &mut SqliteConnection,
    key: LeaseKey,
    changed: u64,
) -> Result<Answer, sqlx::Error> {
    if changed > 0 {
        return Ok(Answer::Applied);
    }
    let ended: Option<i64> = sqlx::query_scalar(
        "select 1 from outbox_events where id = ? and lease_token = ? and lease_owner is null",
    )
    .bind(key.row.0)
    .bind(key.token.0)
    .fetch_optional(connection)
    .await?;
    Ok(if ended.is_some() { Answer::Ended } else { Answer::Refused })
}

/// Rules P6 and P9. Returns how many rows matched the guard.
async fn settle_one(
    connection: &mut SqliteConnection,
    now: DbTime,
    owner: &WorkerId,
    key: LeaseKey,
    settle: &Settle,
) -> Result<u64, sqlx::Error> {
    let sql = match settle {
        Settle::Delivered { .. } => {
            "update outbox_events set lease_owner = null, lease_until = null, updated_at = ?1, attempts = attempts + 1,
                 reclaims = 0, delivery_status = 'delivered', delivered_at = ?1, last_error = null, last_status = ?5
             where id = ?2 and lease_token = ?3 and lease_owner = ?4 and ?6 is null and ?7 is null"
        }
        Settle::Retry { .. } => {
            "update outbox_events set lease_owner = null, lease_until = null, updated_at = ?1, attempts = attempts + 1,
                 reclaims = 0, next_attempt_at = ?7, last_error = ?6, last_status = ?5
             where id = ?2 and lease_token = ?3 and lease_owner = ?4"
        }
        Settle::Failed { tried: true, .. } => {
            "update outbox_events set lease_owner = null, lease_until = null, updated_at = ?1, attempts = attempts + 1,
                 reclaims = 0, delivery_status = 'failed', last_error = ?6, last_status = ?5
             where id = ?2 and lease_token = ?3 and lease_owner = ?4 and ?7 is null"
        }
        Settle::Failed { tried: false, .. } => {
            "update outbox_events set lease_owner = null, lease_until = null, updated_at = ?1,
                 reclaims = 0, delivery_status = 'failed', last_error = ?6, last_status = ?5
             where id = ?2 and lease_token = ?3 and lease_owner = ?4 and ?7 is null"
        }
        Settle::Release { .. } => {
            "update outbox_events set lease_owner = null, lease_until = null, updated_at = ?1,
                 next_attempt_at = coalesce(?7, next_attempt_at)
             where id = ?2 and lease_token = ?3 and lease_owner = ?4 and ?5 is null and ?6 is null"
        }
    };
    let (status, error, due) = match settle {
        Settle::Delivered { status } => (Some(*status), None, None),
        Settle::Retry { delay, error, status } => (*status, Some(clean(error)), Some(now.after(*delay))),
        Settle::Failed { error, status, .. } => (*status, Some(clean(error)), None),
        Settle::Release { delay } => (None, None, delay.map(|delay| now.after(delay))),
    };
    let done = sqlx::query(sql)
        .bind(now.as_micros())
        .bind(key.row.0)
        .bind(key.token.0)
        .bind(owner.as_str())
        .bind(status.map(i64::from))
        .bind(error)
        .bind(due.map(DbTime::as_micros))
        .execute(connection)
        .await?;
    Ok(done.rows_affected())
}

impl Outbox for Sqlite {
    async fn claim(&self, request: ClaimRequest) -> Result<Claimed, StoreFault> {
        claim::claim(self, &request).await.map_err(|error| fault(&error))
    }

    async fn renew(&self, request: RenewRequest) -> Result<RenewReply, StoreFault> {
        self.renew_all(&request).await.map_err(|error| fault(&error))
    }

    async fn settle(&self, request: SettleRequest) -> Result<SettleReply, StoreFault> {
        self.settle_all(&request).await.map_err(|error| fault(&error))
    }

    async fn owned(&self, request: OwnedRequest) -> Result<OwnedReply, StoreFault> {
        let db_now = (self.options.clock)();
        let rows: Vec<(i64, i64)> =
            sqlx::query_as("select id, lease_token from outbox_events where lease_owner = ?")
                .bind(request.owner.as_str())
                .fetch_all(&self.readers)
                .await
                .map_err(|error| fault(&error))?;
        let keys = rows.into_iter().map(|(id, token)| LeaseKey { row: RowId(id), token: Token(token) });
        Ok(OwnedReply { db_now, keys: keys.collect() })
    }

    async fn hint(&self) {
        std::future::pending().await
    }
}
