//! A store with a clock of its own, and a way past the port to its rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use leasehold::adapters::postgres::{Postgres, PostgresOptions};
use leasehold::adapters::sqlite::{Sqlite, SqliteOptions};
use leasehold::adapters::store::{NewEvent, Page, Retain, Retired, Status, StoreError};
use leasehold::machine::{
    Answer, ClaimRequest, ClaimTerms, DbTime, Incarnation, Lease, LeaseKey, OwnedRequest, RenewRequest,
    Row as Model, RowId, Settle, SettleRequest, Status as RowStatus, Token, WorkerId,
};
use leasehold::ports::{Claimed, Outbox};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::sqlite::{SqlitePool, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Row as _};

pub(crate) const LEASE: Duration = Duration::from_secs(30);
pub(crate) const GRACE: Duration = Duration::from_secs(3);
pub(crate) const MAX_PAYLOAD: u64 = 1024 * 1024;
/// `R` of the stores under test: long, since nothing here measures it, and a loaded machine is slow.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// A row with the columns that the row machine doesn't have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) id: i64,
    pub(crate) url: String,
    pub(crate) destination: String,
    pub(crate) row: Model,
}

pub(crate) trait Bed {
    type Store: Outbox;
    const POSTGRES: bool;

    fn store(&self) -> &Self::Store;
    fn incarnation(&self) -> Incarnation;
    async fn set_clock(&self, now: DbTime);
    fn now(&self) -> DbTime;
    /// Inserts a row as it is and returns its id.
    async fn insert(&self, url: &str, payload: &str, row: &Model) -> i64;
    /// All rows by id.
    async fn rows(&self) -> Vec<Stored>;
    /// Runs SQL past the store.
    async fn run(&self, sql: &str) -> Result<(), sqlx::Error>;
    /// `outbox_events` as this store calls it.
    fn table(&self) -> &'static str;
    async fn enqueue(&self, events: &[NewEvent]) -> Result<Vec<String>, StoreError>;
    async fn status(&self) -> Result<Status, StoreError>;
    async fn retire(&self, retain: Retain, page: Page) -> Result<Retired, StoreError>;
    async fn migrate(&self) -> Result<(), StoreError>;
    async fn check_schema(&self) -> Result<(), StoreError>;
    /// Opens the same database once more.
    async fn again(&self) -> Self::Store;
    /// Runs the migrations of several stores at once.
    async fn migrate_all(stores: Vec<Self::Store>) -> Vec<Result<(), StoreError>>;
    /// Ends with an error of the schema kind on an empty database.
    async fn check_schema_of_an_empty_database(&self) -> Result<(), StoreError>;

    async fn pass(&self, time: Duration) {
        self.set_clock(self.now().after(time)).await;
    }
    async fn row(&self, id: i64) -> Model {
        self.rows().await.into_iter().find(|stored| stored.id == id).expect("the row is there").row
    }
    /// A fresh event that is due.
    async fn due(&self) -> i64 {
        self.insert(A, "{}", &Model::new(20, self.now())).await
    }
    async fn claim(&self, request: ClaimRequest) -> Claimed {
        self.store().claim(request).await.expect("the claim is answered")
    }
    fn request(&self, owner: &str) -> ClaimRequest {
        ClaimRequest {
            owner: WorkerId::new(owner),
            terms: ClaimTerms {
                lease: LEASE,
                grace: GRACE,
                expired: true,
                reclaim_limit: 0,
                retry_budget: 0,
                valid_until: None,
            },
            limit: 100,
            incarnation: Some(self.incarnation()),
            probation: 1,
            share: 100,
            shares: Vec::new(),
            from: None,
            leases_from: None,
            count_pending: false,
            asleep: None,
        }
    }
    /// Claims with nothing special, and returns the leases.
    async fn take(&self, owner: &str) -> Vec<LeaseKey> {
        keys(&self.claim(self.request(owner)).await)
    }
    async fn renew(&self, owner: &str, key: LeaseKey) -> Answer {
        let request = renewal(owner, vec![key]);
        let reply = self.store().renew(request).await.expect("the renewal is answered");
        assert_eq!(reply.db_now, self.now());
        one(&reply.answers, key)
    }
    async fn settle(&self, owner: &str, key: LeaseKey, settle: Settle) -> Answer {
        let request = SettleRequest { owner: WorkerId::new(owner), entries: vec![(key, settle)] };
        let reply = self.store().settle(request).await.expect("the settle is answered");
        assert_eq!(reply.db_now, self.now());
        one(&reply.answers, key)
    }
    async fn owned(&self, owner: &str) -> Vec<LeaseKey> {
        let reply = self.store().owned(OwnedRequest { owner: WorkerId::new(owner) }).await;
        let reply = reply.expect("the look is answered");
        assert_eq!(reply.db_now, self.now());
        let mut keys = reply.keys;
        keys.sort();
        keys
    }
}

pub(crate) const A: &str = "https://a.example/hook";
pub(crate) const B: &str = "https://b.example/hook";
pub(crate) const C: &str = "https://c.example/hook";

pub(crate) fn renewal(owner: &str, keys: Vec<LeaseKey>) -> RenewRequest {
    RenewRequest { owner: WorkerId::new(owner), lease: LEASE, keys, wait: false }
}

pub(crate) fn keys(claimed: &Claimed) -> Vec<LeaseKey> {
    claimed.reply.grants.iter().map(|grant| grant.key).collect()
}

pub(crate) fn ids(claimed: &Claimed) -> Vec<i64> {
    let mut ids: Vec<i64> = claimed.reply.grants.iter().map(|grant| grant.key.row.0).collect();
    ids.sort_unstable();
    ids
}

pub(crate) fn one(answers: &[(LeaseKey, Answer)], key: LeaseKey) -> Answer {
    assert_eq!(answers.len(), 1, "one answer a lease");
    assert_eq!(answers[0].0, key);
    answers[0].1
}

pub(crate) fn delivered() -> Settle {
    Settle::Delivered { status: 200 }
}

pub(crate) fn leased(owner: &str, until: DbTime) -> Option<Lease> {
    Some(Lease { owner: WorkerId::new(owner), until })
}

fn status_text(status: RowStatus) -> &'static str {
    match status {
        RowStatus::Pending => "pending",
        RowStatus::Delivered => "delivered",
        RowStatus::Failed => "failed",
    }
}

fn status_of(text: &str) -> RowStatus {
    match text {
        "pending" => RowStatus::Pending,
        "delivered" => RowStatus::Delivered,
        "failed" => RowStatus::Failed,
        other => panic!("an unknown status: {other}"),
    }
}

const COLUMNS: &str = "event_type, destination_url, payload, delivery_status, attempts, max_attempts, \
    next_attempt_at, lease_owner, lease_until, lease_token, reclaims, last_error, last_status, delivered_at";

macro_rules! stored {
    ($row:expr) => {{
        let row = $row;
        let time = |name: &str| row.get::<Option<i64>, _>(name).map(DbTime::from_micros);
        let number = |name: &str| u32::try_from(row.get::<i64, _>(name)).unwrap();
        let owner: Option<String> = row.get("lease_owner");
        let until = time("lease_until");
        assert_eq!(owner.is_some(), until.is_some());
        Stored {
            id: row.get("id"),
            url: row.get("destination_url"),
            destination: row.get("destination_key"),
            row: Model {
                status: status_of(&row.get::<String, _>("delivery_status")),
                attempts: number("attempts"),
                max_attempts: number("max_attempts"),
                next_attempt_at: time("next_attempt_at").unwrap(),
                lease: owner.map(|owner| Lease { owner: WorkerId::new(owner), until: until.unwrap() }),
                token: Token(row.get("lease_token")),
                reclaims: number("reclaims"),
                last_error: row.get("last_error"),
                last_status: row
                    .get::<Option<i64>, _>("last_status")
                    .map(|status| u16::try_from(status).unwrap()),
                delivered_at: time("delivered_at"),
            },
        }
    }};
}

macro_rules! bind_row {
    ($query:expr, $url:expr, $payload:expr, $row:expr) => {{
        let row = $row;
        $query
            .bind("test.event")
            .bind($url.to_owned())
            .bind($payload.to_owned())
            .bind(status_text(row.status))
            .bind(i64::from(row.attempts))
            .bind(i64::from(row.max_attempts))
            .bind(row.next_attempt_at.as_micros())
            .bind(row.lease.as_ref().map(|lease| lease.owner.as_str().to_owned()))
            .bind(row.lease.as_ref().map(|lease| lease.until.as_micros()))
            .bind(row.token.0)
            .bind(i64::from(row.reclaims))
            .bind(row.last_error.clone())
            .bind(row.last_status.map(i64::from))
            .bind(row.delivered_at.map(DbTime::as_micros))
    }};
}

// ---- Postgres

pub(crate) struct Pg {
    pub(crate) url: String,
    pub(crate) database: String,
    pub(crate) pool: PgPool,
    store: Postgres,
    incarnation: Incarnation,
    now: AtomicI64,
}

fn server() -> url::Url {
    let url = std::env::var("LEASEHOLD_TEST_POSTGRES").expect(
        "LEASEHOLD_TEST_POSTGRES names no Postgres server: run the tests through `.ci/postgres cargo nextest run`",
    );
    url::Url::parse(&url).expect("LEASEHOLD_TEST_POSTGRES is a URL")
}

pub(crate) fn options() -> PostgresOptions {
    PostgresOptions { store_timeout: TIMEOUT, max_payload: MAX_PAYLOAD, prepared_statements: true }
}

async fn admin(sql: String) {
    let pool = PgPoolOptions::new().max_connections(1).connect(server().as_str()).await;
    let pool = pool.expect("the server of LEASEHOLD_TEST_POSTGRES answers");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.expect("an administrative statement");
    pool.close().await;
}

async fn create_database() -> (String, String) {
    let mut bytes = [0_u8; 8];
    getrandom::fill(&mut bytes).expect("random bytes");
    let name = format!("leasehold_test_{:016x}", u64::from_le_bytes(bytes));
    admin(format!("create database {name}")).await;
    // What is lost in a crash is no test's matter.
    admin(format!("alter database {name} set synchronous_commit = off")).await;
    let mut url = server();
    url.set_path(&name);
    (name, url.into())
}

impl Pg {
    async fn new() -> Self {
        let (database, url) = create_database().await;
        let pool = PgPoolOptions::new().max_connections(8).connect(&url).await.expect("the new database");
        let store = Postgres::new(&url, options()).expect("a store");
        store.migrate().await.expect("migrations");
        let clock = "
            create table leasehold.test_clock (early timestamptz not null, late timestamptz not null);
            insert into leasehold.test_clock select t, t from (
                select date_trunc('seconds', clock_timestamp()) + interval '1 hour' as t) as start;
            create or replace function leasehold.early_now() returns timestamptz language sql stable
                as 'select early from leasehold.test_clock';
            create or replace function leasehold.late_now() returns timestamptz language sql volatile
                as 'select late from leasehold.test_clock';";
        sqlx::raw_sql(clock).execute(&pool).await.expect("the test's clock");
        let now = sqlx::query_scalar(
            "select (extract(epoch from late) * 1000000)::bigint from leasehold.test_clock",
        );
        let now: i64 = now.fetch_one(&pool).await.expect("the time");
        let mut bed =
            Self { url, database, pool, store, incarnation: Incarnation::new(""), now: AtomicI64::new(now) };
        bed.incarnation = bed.claim(bed.request("nobody")).await.reply.incarnation;
        bed
    }

    pub(crate) async fn set_clocks(&self, early: DbTime, late: DbTime) {
        self.now.store(late.as_micros(), Ordering::SeqCst);
        sqlx::query(
            "update leasehold.test_clock set early = timestamptz 'epoch' + $1 * interval '1 microsecond',
                 late = timestamptz 'epoch' + $2 * interval '1 microsecond'",
        )
        .bind(early.as_micros())
        .bind(late.as_micros())
        .execute(&self.pool)
        .await
        .expect("the clock is set");
    }
}

impl Bed for Pg {
    type Store = Postgres;
    const POSTGRES: bool = true;

    fn store(&self) -> &Postgres {
        &self.store
    }
    fn incarnation(&self) -> Incarnation {
        self.incarnation.clone()
    }
    async fn set_clock(&self, now: DbTime) {
        self.set_clocks(now, now).await;
    }
    fn now(&self) -> DbTime {
        DbTime::from_micros(self.now.load(Ordering::SeqCst))
    }
    async fn insert(&self, url: &str, payload: &str, row: &Model) -> i64 {
        let time = |place: u32| format!("timestamptz 'epoch' + ${place}::bigint * interval '1 microsecond'");
        let sql = format!(
            "insert into leasehold.outbox_events ({COLUMNS})
             values ($1, $2, $3::text::jsonb, $4, $5, $6, {}, $8, {}, $10, $11, $12, $13, {}) returning id",
            time(7),
            time(9),
            time(14)
        );
        bind_row!(sqlx::query_scalar(AssertSqlSafe(sql)), url, payload, row)
            .fetch_one(&self.pool)
            .await
            .expect("a row is inserted")
    }
    async fn rows(&self) -> Vec<Stored> {
        let sql = "select id, destination_url, destination_key, delivery_status, attempts::bigint,
                max_attempts::bigint, lease_owner, lease_token, reclaims::bigint, last_error, last_status::bigint,
                (extract(epoch from next_attempt_at) * 1000000)::bigint as next_attempt_at,
                (extract(epoch from lease_until) * 1000000)::bigint as lease_until,
                (extract(epoch from delivered_at) * 1000000)::bigint as delivered_at
            from leasehold.outbox_events order by id";
        let rows = sqlx::query(sql).fetch_all(&self.pool).await.expect("the rows");
        rows.iter().map(|row| stored!(row)).collect()
    }
    async fn run(&self, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.pool).await.map(|_| ())
    }
    fn table(&self) -> &'static str {
        "leasehold.outbox_events"
    }
    async fn enqueue(&self, events: &[NewEvent]) -> Result<Vec<String>, StoreError> {
        self.store.enqueue(events).await
    }
    async fn status(&self) -> Result<Status, StoreError> {
        self.store.status(TIMEOUT).await
    }
    async fn retire(&self, retain: Retain, page: Page) -> Result<Retired, StoreError> {
        self.store.retire(retain, page).await
    }
    async fn migrate(&self) -> Result<(), StoreError> {
        self.store.migrate().await
    }
    async fn check_schema(&self) -> Result<(), StoreError> {
        self.store.check_schema().await
    }
    async fn again(&self) -> Postgres {
        Postgres::new(&self.url, options()).expect("a store")
    }
    async fn migrate_all(stores: Vec<Postgres>) -> Vec<Result<(), StoreError>> {
        let tasks: Vec<_> =
            stores.into_iter().map(|store| tokio::spawn(async move { store.migrate().await })).collect();
        let mut results = Vec::new();
        for task in tasks {
            results.push(task.await.expect("a migration ends"));
        }
        results
    }
    async fn check_schema_of_an_empty_database(&self) -> Result<(), StoreError> {
        self.run("drop schema leasehold cascade").await.expect("the schema is dropped");
        self.again().await.check_schema().await
    }
}

/// Runs a test on a database of its own, which is dropped at the end.
pub(crate) fn on_postgres(test: impl AsyncFnOnce(&Pg)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let bed = runtime.block_on(Pg::new());
    // What hangs fails, some day.
    let limit = Duration::from_secs(300);
    let run = std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async { tokio::time::timeout(limit, test(&bed)).await.expect("the test ends") });
    });
    let result = std::panic::catch_unwind(run);
    runtime.block_on(admin(format!("drop database {} with (force)", bed.database)));
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

// ---- SQLite

pub(crate) struct Lite {
    url: String,
    pool: SqlitePool,
    store: Sqlite,
    now: Arc<AtomicI64>,
    folder: tempfile::TempDir,
}

impl Lite {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let url = format!("sqlite://{}", folder.path().join("outbox.db").display());
        let now = Arc::new(AtomicI64::new(1_800_000_000_000_000));
        let store = Self::open(&url, &now).await;
        store.migrate().await.expect("migrations");
        let pool = SqlitePoolOptions::new().max_connections(1).connect(&url).await.expect("the file");
        Self { url, pool, store, now, folder }
    }

    async fn open(url: &str, now: &Arc<AtomicI64>) -> Sqlite {
        let now = Arc::clone(now);
        let clock = Arc::new(move || DbTime::from_micros(now.load(Ordering::SeqCst)));
        let options = SqliteOptions { clock, ..SqliteOptions::new(TIMEOUT, MAX_PAYLOAD) };
        Sqlite::open(url, options, true).await.expect("a store")
    }
}

impl Bed for Lite {
    type Store = Sqlite;
    const POSTGRES: bool = false;

    fn store(&self) -> &Sqlite {
        &self.store
    }
    fn incarnation(&self) -> Incarnation {
        Incarnation::new("sqlite")
    }
    async fn set_clock(&self, now: DbTime) {
        self.now.store(now.as_micros(), Ordering::SeqCst);
    }
    fn now(&self) -> DbTime {
        DbTime::from_micros(self.now.load(Ordering::SeqCst))
    }
    async fn insert(&self, url: &str, payload: &str, row: &Model) -> i64 {
        let sql = format!(
            "insert into outbox_events ({COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) returning id"
        );
        bind_row!(sqlx::query_scalar(AssertSqlSafe(sql)), url, payload, row)
            .fetch_one(&self.pool)
            .await
            .expect("a row is inserted")
    }
    async fn rows(&self) -> Vec<Stored> {
        let rows = sqlx::query("select * from outbox_events order by id").fetch_all(&self.pool).await;
        rows.expect("the rows").iter().map(|row| stored!(row)).collect()
    }
    async fn run(&self, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.pool).await.map(|_| ())
    }
    fn table(&self) -> &'static str {
        "outbox_events"
    }
    async fn enqueue(&self, events: &[NewEvent]) -> Result<Vec<String>, StoreError> {
        self.store.enqueue(events).await
    }
    async fn status(&self) -> Result<Status, StoreError> {
        self.store.status().await
    }
    async fn retire(&self, retain: Retain, page: Page) -> Result<Retired, StoreError> {
        self.store.retire(retain, page).await
    }
    async fn migrate(&self) -> Result<(), StoreError> {
        self.store.migrate().await
    }
    async fn check_schema(&self) -> Result<(), StoreError> {
        self.store.check_schema().await
    }
    async fn again(&self) -> Sqlite {
        Self::open(&self.url, &self.now).await
    }
    async fn migrate_all(stores: Vec<Sqlite>) -> Vec<Result<(), StoreError>> {
        let tasks: Vec<_> =
            stores.into_iter().map(|store| tokio::spawn(async move { store.migrate().await })).collect();
        let mut results = Vec::new();
        for task in tasks {
            results.push(task.await.expect("a migration ends"));
        }
        results
    }
    async fn check_schema_of_an_empty_database(&self) -> Result<(), StoreError> {
        let url = format!("sqlite://{}", self.folder.path().join("empty.db").display());
        Self::open(&url, &self.now).await.check_schema().await
    }
}

/// Runs a test on a file of its own.
pub(crate) fn on_sqlite(test: impl AsyncFnOnce(&Lite)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { test(&Lite::new().await).await });
}

/// The key of a row under a token.
pub(crate) fn key(row: i64, token: Token) -> LeaseKey {
    LeaseKey { row: RowId(row), token }
}
