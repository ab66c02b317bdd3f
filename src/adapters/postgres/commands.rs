//! What the commands ask of the outbox beside a worker's calls: its schema, new events, counts.

use std::future::Future;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection as _, Row as _};
use tokio::time::timeout;

use super::Postgres;
use super::connect::BEGIN;
use super::error::{after_send, database, is_of_an_event, text};
use crate::adapters::store::{NewEvent, Retain, Status, StoreError};
use crate::machine::StoreFault;

/// What an `enqueue` was doing whose commit had no answer.
const UNCERTAIN: &str =
    "committing the events (they may be in the outbox or not: look before you enqueue them again)";

const MIGRATIONS: [(i32, &str); 1] =
    [(1, include_str!("../../../migrations/postgres/0001_create_outbox_events.sql"))];

/// How many events one statement inserts at most,
const BATCH: usize = 1_000;

/// and how many bytes, unless a single event has more. What a message to the server can hold is bounded by a gibibyte.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

/// How many of the first events one statement inserts.
fn batch(events: &[NewEvent]) -> usize {
    let mut bytes = 0;
    let fit = events.iter().take(BATCH).take_while(|event| {
        bytes += event.destination_url.len() + event.payload.len();
        bytes <= BATCH_BYTES
    });
    fit.count().max(1)
}

/// The ids that the events got, and their sizes as the database keeps them.
async fn insert(
    connection: &mut PgConnection,
    events: &[NewEvent],
) -> Result<Vec<(String, i32)>, sqlx::Error> {
    let column = |of: fn(&NewEvent) -> Option<String>| events.iter().map(of).collect::<Vec<_>>();
    sqlx::query_as(
        "insert into leasehold.outbox_events
             (event_id, event_type, destination_url, payload, max_attempts, next_attempt_at)
         select coalesce(event_id, leasehold.new_event_id()), event_type, destination_url, payload::jsonb,
             coalesce(max_attempts, 20), coalesce(to_timestamp(next_attempt_at / 1e6), now())
         from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::int[], $6::bigint[]) with ordinality
             as event (event_id, event_type, destination_url, payload, max_attempts, next_attempt_at, place)
         order by place
         returning event_id, payload_bytes",
    )
    .persistent(false)
    .bind(column(|event| event.event_id.clone()))
    .bind(column(|event| Some(event.event_type.clone())))
    .bind(column(|event| Some(event.destination_url.clone())))
    .bind(column(|event| Some(event.payload.clone())))
    .bind(events.iter().map(|event| event.max_attempts).collect::<Vec<_>>())
    .bind(events.iter().map(|event| event.next_attempt_at).collect::<Vec<_>>())
    .fetch_all(connection)
    .await
}

fn refused(place: usize, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(refused) if refused.is_unique_violation() => {
            StoreError::duplicate(place, &text(error))
        }
        _ if is_of_an_event(error) => StoreError::Refused { place, problem: text(error) },
        _ => database("enqueueing", error),
    }
}

impl Postgres {
    /// Applies what is missing of the migrations. Safe to run twice and from several processes at once.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        const DOING: &str = "migrating";
        let mut connection = self.connect(false).await?;
        let encoding = sqlx::raw_sql("show server_encoding").fetch_one(&mut connection).await;
        let encoding = encoding.and_then(|row| row.try_get::<String, _>(0));
        let encoding = encoding.map_err(|error| database(DOING, &error))?;
        if encoding != "UTF8" {
            // A text without a form in UTF-8 would make the server refuse the whole reply that it is in.
            let error = format!("the database's encoding is {encoding}: leasehold needs UTF8");
            return Err(StoreError::Database { doing: DOING, error });
        }
        // One transaction with a lock of its own, so that it works through poolers and two first runs don't collide.
        let mut transaction = connection.begin_with(BEGIN).await.map_err(|error| database(DOING, &error))?;
        let run = |sql: &'static str| sqlx::raw_sql(sql);
        run("select pg_advisory_xact_lock(7311846112204518257)")
            .execute(&mut *transaction)
            .await
            .map_err(|error| database(DOING, &error))?;
        // `if not exists` would ask for the right to create whether it is there or not.
        run("do $$ begin
                 if to_regnamespace('leasehold') is null then
                     create schema leasehold;
                 end if;
                 if to_regclass('leasehold.migrations') is null then
                     create table leasehold.migrations (
                         version int primary key, applied_at timestamptz not null default now());
                 end if;
             end $$")
        .execute(&mut *transaction)
        .await
        .map_err(|error| database(DOING, &error))?;
        let applied: Vec<i32> = sqlx::query_scalar("select version from leasehold.migrations")
            .persistent(false)
            .fetch_all(&mut *transaction)
            .await
            .map_err(|error| database(DOING, &error))?;
        for (version, sql) in MIGRATIONS.iter().filter(|(version, _)| !applied.contains(version)) {
            run(sql).execute(&mut *transaction).await.map_err(|error| database(DOING, &error))?;
            sqlx::query("insert into leasehold.migrations (version) values ($1)")
                .persistent(false)
                .bind(version)
                .execute(&mut *transaction)
                .await
                .map_err(|error| database(DOING, &error))?;
        }
        // Dropped or never restored: the commands that miss it send here.
        let table = run("select to_regclass('leasehold.outbox_events') is not null")
            .fetch_one(&mut *transaction)
            .await;
        if !table.and_then(|row| row.try_get::<bool, _>(0)).map_err(|error| database(DOING, &error))? {
            let error = "the schema is damaged: leasehold.migrations says that it is set up, and \
                leasehold.outbox_events is missing. Restore that table from a backup; or, if nothing in the schema is \
                needed any more (its archive included), `drop schema leasehold cascade`, and migrate again";
            return Err(StoreError::Database { doing: DOING, error: error.into() });
        }
        transaction.commit().await.map_err(|error| database(DOING, &error))
    }

    /// Fails with what to do if the schema is missing or older than this program.
    ///
    /// # Errors
    /// [`StoreError::Schema`] or what kept it from looking.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        check_schema(&mut self.connect(true).await?).await
    }

    /// Inserts events in one transaction: all or none. Returns their ids, in order.
    ///
    /// # Errors
    /// When the database refuses any of them, or one would never be sent: as it is kept, JSON may be larger than as it was
    /// written.
    pub async fn enqueue(&self, events: &[NewEvent]) -> Result<Vec<String>, StoreError> {
        let mut connection = self.connect(true).await?;
        check_schema(&mut connection).await?;
        let doing = |error: sqlx::Error| database("enqueueing", &error);
        let mut transaction = self.within(connection.begin_with(BEGIN)).await.map_err(doing)?;
        let mut ids = Vec::with_capacity(events.len());
        let mut left = events;
        while !left.is_empty() {
            let (batch, rest) = left.split_at(batch(left));
            left = rest;
            let mut whole = self.within(transaction.begin()).await.map_err(doing)?;
            let rows = match self.within(insert(&mut whole, batch)).await {
                Err(error) if is_of_an_event(&error) => {
                    self.within(whole.rollback()).await.map_err(doing)?;
                    // One by one, to say which of them it is.
                    for (place, event) in batch.iter().enumerate() {
                        let one = insert(&mut transaction, std::slice::from_ref(event));
                        self.within(one).await.map_err(|error| refused(ids.len() + place, &error))?;
                    }
                    return Err(doing(error));
                }
                rows => rows.map_err(doing)?,
            };
            self.within(whole.commit()).await.map_err(doing)?;
            for (id, bytes) in rows {
                if u64::try_from(bytes).unwrap_or(0) > self.options.max_payload {
                    let allowed = self.options.max_payload;
                    let problem = format!(
                        "payload has {bytes} bytes as the database keeps it; allowed is max_payload, {allowed}"
                    );
                    return Err(StoreError::Refused { place: ids.len(), problem });
                }
                ids.push(id);
            }
        }
        self.within(transaction.commit()).await.map_err(|error| match after_send(&error) {
            StoreFault::Unknown { error } => StoreError::Database { doing: UNCERTAIN, error },
            _ => doing(error),
        })?;
        Ok(ids)
    }

    /// A network that is dead says nothing.
    async fn within<T>(&self, call: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
        let silence = || sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
        timeout(self.options.store_timeout, call).await.unwrap_or_else(|_| Err(silence()))
    }

    /// Counts the events. The server gives up a little before `within`: nobody may be there any more that waits for it.
    ///
    /// # Errors
    /// When the database can't be read or has no schema.
    pub async fn status(&self, within: Duration) -> Result<Status, StoreError> {
        // All of the table is read: with its plans for calls that would be by way of an index.
        let mut connection = self.connect(false).await?;
        check_schema(&mut connection).await?;
        let millis = (within * 9 / 10).as_millis().max(1);
        // One message, and so one transaction: behind a pooler as well the bound is that of this statement alone.
        let row = sqlx::raw_sql(AssertSqlSafe(format!(
            "set local statement_timeout = {millis};
             select
                 count(*) filter (where delivery_status = 'pending') as pending,
                 count(*) filter (where delivery_status = 'pending' and lease_owner is null
                     and next_attempt_at <= leasehold.early_now()) as due,
                 count(*) filter (where delivery_status = 'pending' and attempts > 0) as retrying,
                 count(*) filter (where lease_owner is not null) as leased,
                 count(*) filter (where delivery_status = 'delivered') as delivered,
                 count(*) filter (where delivery_status = 'failed') as failed,
                 extract(epoch from leasehold.early_now() - min(next_attempt_at) filter (
                     where delivery_status = 'pending' and lease_owner is null
                     and next_attempt_at <= leasehold.early_now()))::float8 as age
             from leasehold.outbox_events"
        )))
        .fetch_one(&mut connection)
        .await
        .map_err(|error| database("counting events", &error))?;
        let count = |name: &str| row.try_get::<i64, _>(name).map(i64::unsigned_abs);
        let read = || -> Result<Status, sqlx::Error> {
            Ok(Status {
                pending: count("pending")?,
                due: count("due")?,
                retrying: count("retrying")?,
                leased: count("leased")?,
                delivered: count("delivered")?,
                failed: count("failed")?,
                oldest_due_age_seconds: row.try_get("age")?,
            })
        };
        read().map_err(|error| database("counting events", &error))
    }

    /// The server's version, for `check`.
    ///
    /// # Errors
    /// When the database can't be reached.
    pub async fn server_version(&self) -> Result<String, StoreError> {
        let row = ask(&mut self.connect(true).await?, "show server_version").await;
        row.and_then(|row| row.try_get(0)).map_err(|error| database("connecting", &error))
    }

    /// The rights that retiring delivered events needs and this role doesn't have.
    ///
    /// # Errors
    /// When the database can't be asked.
    pub async fn lacks_to_retire(&self, retain: Retain) -> Result<Option<String>, StoreError> {
        let question = match retain {
            Retain::Keep => return Ok(None),
            Retain::Delete(_) => {
                "select string_agg(need, ', ') from (values
                     ('delete on leasehold.outbox_events',
                         has_table_privilege('leasehold.outbox_events', 'delete'))
                 ) as needs (need, there) where not there"
            }
            Retain::Archive(_) => {
                "select string_agg(need, ', ') from (values
                     ('delete on leasehold.outbox_events',
                         has_table_privilege('leasehold.outbox_events', 'delete')),
                     ('insert on leasehold.outbox_archive',
                         has_table_privilege('leasehold.outbox_archive', 'insert')),
                     ('ownership of leasehold.outbox_archive',
                         (select pg_has_role(relowner, 'usage') from pg_class
                          where oid = 'leasehold.outbox_archive'::regclass)),
                     ('create on schema leasehold',
                         has_schema_privilege('leasehold', 'create'))
                 ) as needs (need, there) where not there"
            }
        };
        let row = ask(&mut self.connect(true).await?, question).await;
        row.and_then(|row| row.try_get(0)).map_err(|error| database("looking for rights", &error))
    }

    /// A command has but one try, so that it asks every host.
    async fn connect(&self, bounded: bool) -> Result<PgConnection, StoreError> {
        let connection = self.hosts.connect_to_any(bounded, self.options.store_timeout).await;
        connection.map_err(|error| database("connecting", &error))
    }
}

async fn check_schema(connection: &mut PgConnection) -> Result<(), StoreError> {
    let row = ask(connection, "select max(version) from leasehold.migrations").await;
    let version = row.and_then(|row| row.try_get::<Option<i32>, _>(0));
    let version = version.map_err(|error| database("looking for the schema", &error))?.unwrap_or_default();
    match MIGRATIONS.last() {
        Some((newest, _)) if version < *newest => {
            Err(StoreError::Schema { missing: format!("schema version {version}, needed {newest}") })
        }
        _ => Ok(()),
    }
}

/// The one row of a question without parameters, as one message: a pooler in transaction mode may give two messages that
/// are in no transaction to two servers.
async fn ask(connection: &mut PgConnection, question: &'static str) -> Result<PgRow, sqlx::Error> {
    sqlx::raw_sql(question).fetch_one(connection).await
}
