//! The outbox on Postgres 13 and later, through sqlx.
//!
//! Each statement is a transaction of its own, and a call is one statement, but that a claim may be several, one after the
//! other; no session state; no transaction and no connection is held between calls. Renewals have connections of their
//! own (rule P5). A call whose future is dropped, or that fails, closes its connection; on direct connections
//! the server then cancels the statement by `statement_timeout`.

mod commands;
mod connect;
mod error;
mod replies;
mod retire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgListener, PgRow, Postgres as Database};
use sqlx::query::Query;
use sqlx::{Connection, Row as _};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

pub use self::connect::PLANS;
use self::connect::{BEGIN, Hosts, Lane};
use self::error::{after_send, not_connected, text};
use self::replies::{beyond_front, read_answers, read_claim, read_owned, read_walk};
use super::store::{CLAIM_BYTES, LONGEST_URL, StoreError, WALK, Walk, clean, micros};
use crate::machine::{
    ClaimFailure, ClaimRequest, LeaseKey, OwnedReply, OwnedRequest, Place, RenewReply, RenewRequest, Settle,
    SettleReply, SettleRequest, StoreFault, WorkerId,
};
use crate::ports::{Claimed, Outbox};

/// Sent by the insert trigger while a worker sleeps, and listened to by workers.
const CHANNEL: &str = "leasehold_events";
/// How long a worker that said so counts as asleep, beyond two of its polls. A dead one is forgotten after that, and what
/// sleepers said within it is what a producer may have to step over.
const SLEEP_FOR: Duration = Duration::from_secs(10);

/// After that long without a notification the connection that listens is tried.
const SILENCE: Duration = Duration::from_secs(60);

const CLAIM: &str = include_str!("claim.sql");
const LOOK: &str = include_str!("look.sql");
const PENDING: &str = include_str!("pending.sql");
const RENEW: &str = include_str!("renew.sql");
const SETTLE: &str = include_str!("settle.sql");
const SLEEP: &str = "insert into leasehold.sleepers (worker, until) values ($1, clock_timestamp() + $2 * interval '1 microsecond')
     on conflict (worker) do update set until = excluded.until";
const AWAKE: &str = "delete from leasehold.sleepers where worker = $1 or until < clock_timestamp()";
const OWNED: &str =
    "select (extract(epoch from leasehold.late_now()) * 1000000)::bigint as db_now, id, lease_token as token
     from (select) as always left join leasehold.outbox_events on lease_owner = $1";

/// How to reach the outbox.
#[derive(Clone, Debug)]
pub struct PostgresOptions {
    /// `R`: bounds getting a connection, and, somewhat shorter, each statement.
    pub store_timeout: Duration,
    /// The largest payload that is returned, in bytes.
    pub max_payload: u64,
    /// Named prepared statements and startup options; off for poolers in transaction mode. Off, each call is a
    /// transaction of its own with unnamed statements, and there is no `LISTEN`.
    pub prepared_statements: bool,
}

impl PostgresOptions {
    /// Less than `R`, so that its error still comes: what the server gave up is surely not applied, what brought no
    /// answer may be (rule P7). In whole milliseconds, of which none would be no bound.
    fn statement_timeout(&self) -> Duration {
        (self.store_timeout * 9 / 10).max(Duration::from_millis(1))
    }
}

/// The outbox on Postgres.
#[derive(Debug)]
pub struct Postgres {
    hosts: Arc<Hosts>,
    /// Claims and looks: one is under way at a time.
    claims: Lane,
    /// Settles: one is under way at a time.
    settles: Lane,
    /// Heartbeats: one connection, and a spare (rule P5).
    renewals: Lane,
    /// Moving and deleting what was delivered: never in the way of the others.
    retiring: Lane,
    options: PostgresOptions,
    listener: Mutex<Option<PgListener>>,
    /// Until when what the table of sleepers says of this worker needn't be said again; `None` if it doesn't sleep.
    asleep_until: Mutex<Option<Instant>>,
    /// Whether the last claim left nothing that was due: then the next one looks first.
    caught_up: AtomicBool,
    /// Whether there was more to be claimed, last time, than the front of the queue.
    beyond_front: AtomicBool,
    walk: Mutex<Walk<String>>,
    claim: Arc<str>,
    claim_front: Arc<str>,
    renew: Arc<str>,
    renew_waiting: Arc<str>,
}

impl Postgres {
    /// Reads the URL; connects when first used.
    ///
    /// # Errors
    /// When the URL can't be read; the text shows no password.
    pub fn new(url: &str, options: PostgresOptions) -> Result<Self, StoreError> {
        let hosts = Hosts::parse(url, &options);
        let hosts = hosts.map_err(|error| StoreError::Database { doing: "reading DATABASE_URL", error })?;
        let hosts = Arc::new(hosts);
        Ok(Self {
            claims: Lane::new(&hosts, 1, options.store_timeout),
            settles: Lane::new(&hosts, 1, options.store_timeout),
            renewals: Lane::new(&hosts, 2, options.store_timeout),
            retiring: Lane::new(&hosts, 1, options.store_timeout),
            hosts,
            options,
            listener: Mutex::new(None),
            asleep_until: Mutex::new(None),
            caught_up: AtomicBool::new(false),
            beyond_front: AtomicBool::new(false),
            walk: Mutex::default(),
            claim: CLAIM.into(),
            claim_front: claim_of_front(CLAIM).into(),
            renew: RENEW.replace("/* skip locked */", "skip locked").into(),
            renew_waiting: RENEW.replace("/* skip locked */", "").into(),
        })
    }

    /// Whether a URL can be read, without connecting.
    ///
    /// # Errors
    /// What is wrong with it; no password.
    pub fn check_url(url: &str) -> Result<(), String> {
        let any = PostgresOptions { store_timeout: SILENCE, max_payload: 0, prepared_statements: true };
        Hosts::parse(url, &any).map(drop)
    }

    /// Says in the table of sleepers whether this worker sleeps, if that isn't what it says there already. Should it
    /// fail, new events are found by polling.
    async fn say_asleep(&self, owner: &WorkerId, asleep: Option<Duration>) {
        if !self.options.prepared_statements {
            // Without a listener nothing could wake it.
            return;
        }
        let mut said = self.asleep_until.lock().await;
        let query = match (asleep, *said) {
            (None, None) => return,
            (Some(_), Some(until)) if Instant::now() < until => return,
            (Some(poll), _) => {
                let sleep_for = poll.saturating_mul(2).saturating_add(SLEEP_FOR);
                sqlx::query(SLEEP).bind(owner.as_str().to_owned()).bind(micros(sleep_for))
            }
            (None, Some(_)) => sqlx::query(AWAKE).bind(owner.as_str().to_owned()),
        };
        *said = asleep.map(|_| Instant::now() + SLEEP_FOR / 2);
        if let Err(fault) = self.call(&self.claims, query).await {
            tracing::debug!(%fault, "could not say whether this worker sleeps; it polls all the same");
        }
    }

    async fn claim_or_look(&self, request: ClaimRequest) -> Result<Claimed, StoreFault> {
        if self.caught_up.load(Ordering::Relaxed) && !request.terms.expired {
            let look = sqlx::query(LOOK)
                .bind(request.from.map(|place| place.due.as_micros()))
                .bind(request.from.map_or(i64::MIN, |place| place.row.0));
            let rows = self.call(&self.claims, look).await?;
            if !rows.is_empty() {
                return read_claim(&rows).map_err(|error| unreadable(&error));
            }
        }
        let mut walk = self.walk.lock().await;
        let mut front = !request.terms.expired && !self.beyond_front.load(Ordering::Relaxed);
        let claimed = loop {
            let rows = self.call(&self.claims, self.claim_query(&request, front, &walk)).await?;
            let beyond = beyond_front(&rows).map_err(|error| unreadable(&error))?;
            self.beyond_front.store(beyond, Ordering::Relaxed);
            if !front {
                let (last, found) = read_walk(&rows).map_err(|error| unreadable(&error))?;
                walk.went(last, found);
            }
            if !front || !beyond {
                break read_claim(&rows).map_err(|error| unreadable(&error))?;
            }
            front = false;
        };
        // What it left, a look would see and not bring.
        let left = claimed.reply.front.is_some_and(|front| front != Place::behind(front.due));
        self.caught_up.store(!left, Ordering::Relaxed);
        Ok(claimed)
    }

    /// The claim, or what there is of it at the front of the queue.
    fn claim_query(
        &self,
        request: &ClaimRequest,
        front: bool,
        walk: &Walk<String>,
    ) -> Query<'static, Database, PgArguments> {
        let (keys, rooms): (Vec<String>, Vec<i32>) =
            request.shares.iter().map(|(key, room)| (key.as_str().to_owned(), count(*room))).unzip();
        let claim = if front { &self.claim_front } else { &self.claim };
        sqlx::query(sqlx::AssertSqlSafe(Arc::clone(claim)))
            .bind(request.owner.as_str().to_owned())
            .bind(micros(request.terms.lease))
            .bind(micros(request.terms.grace))
            .bind(request.terms.expired)
            .bind(request.incarnation.as_ref().map(|known| known.as_str().to_owned()))
            .bind(count(request.terms.reclaim_limit))
            .bind(count(request.terms.retry_budget))
            .bind(count(request.limit))
            .bind(count(request.probation))
            .bind(count(request.share))
            .bind(keys)
            .bind(rooms)
            .bind(i64::try_from(self.options.max_payload).unwrap_or(i64::MAX))
            .bind(CLAIM_BYTES)
            .bind(ClaimFailure::AttemptsSpent.last_error())
            .bind(ClaimFailure::ReclaimsSpent.last_error())
            .bind(request.from.map(|place| place.due.as_micros()))
            .bind(request.from.map_or(i64::MIN, |place| place.row.0))
            .bind(request.leases_from.unwrap_or_default().0)
            .bind(request.terms.valid_until.map(|until| until.as_micros()))
            .bind(walk.last.clone())
            .bind(walk.end.clone())
            .bind(count(WALK))
            .bind(i32::try_from(LONGEST_URL).unwrap_or(i32::MAX))
            .bind(ClaimFailure::AtBound.last_error())
    }

    async fn any_pending(&self) -> Result<bool, StoreFault> {
        let rows = self.call(&self.claims, sqlx::query(PENDING)).await?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound);
        row.and_then(|row| row.try_get(0)).map_err(|error| unreadable(&error))
    }

    /// One call on a connection of `lane`, which is closed unless the call ends well.
    async fn call(
        &self,
        lane: &Lane,
        query: Query<'static, Database, PgArguments>,
    ) -> Result<Vec<PgRow>, StoreFault> {
        let mut connection = lane.acquire().await.map_err(|error| not_connected(&error))?;
        let reply = if self.options.prepared_statements {
            query.fetch_all(connection.get()).await
        } else {
            self.in_transaction(connection.get(), query).await
        };
        match reply {
            Ok(rows) => {
                connection.put_back();
                Ok(rows)
            }
            Err(error) => {
                let fault = after_send(&error);
                match fault {
                    // The server answered on a sound connection.
                    StoreFault::Permanent { .. } if self.options.prepared_statements => connection.put_back(),
                    _ => self.hosts.look_elsewhere(connection.host, &error),
                }
                Err(fault)
            }
        }
    }

    async fn answers(&self, listener: &mut PgListener) -> bool {
        let question = sqlx::raw_sql("select").execute(listener);
        matches!(timeout(self.options.store_timeout, question).await, Ok(Ok(_)))
    }

    /// Bounds the statements of a transaction where the connection doesn't, and how long its rows stay locked when this
    /// side is cut off in the middle of it.
    async fn bound(&self, connection: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        let idle = self.options.store_timeout.as_millis();
        let statement = self.options.statement_timeout().as_millis();
        let bounds = format!(
            "set local statement_timeout = {statement}; set local idle_in_transaction_session_timeout = {idle}"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(bounds)).execute(connection).await.map(|_| ())
    }

    /// For poolers in transaction mode: nothing outlives the transaction.
    async fn in_transaction(
        &self,
        connection: &mut sqlx::PgConnection,
        query: Query<'static, Database, PgArguments>,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        let mut transaction = connection.begin_with(BEGIN).await?;
        self.bound(&mut transaction).await?;
        let rows = query.persistent(false).fetch_all(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(rows)
    }
}

/// The part of `claim.sql` that claims from the front of the queue only: a statement of far fewer steps.
pub fn claim_of_front(claim: &str) -> String {
    let mut beyond = false;
    let lines = claim.lines().filter_map(|line| {
        let mark = matches!(line.trim(), "--[" | "--]");
        if mark {
            beyond = line.trim() == "--[";
        }
        (!beyond && !mark).then(|| line.trim_start().strip_prefix("--|").unwrap_or(line))
    });
    let front: Vec<&str> = lines.collect();
    front.join("\n")
}

fn count(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn unreadable(error: &sqlx::Error) -> StoreFault {
    StoreFault::Unknown { error: text(error) }
}

impl Outbox for Postgres {
    async fn claim(&self, request: ClaimRequest) -> Result<Claimed, StoreFault> {
        self.say_asleep(&request.owner, request.asleep).await;
        let count_pending = request.count_pending;
        let mut claimed = self.claim_or_look(request).await?;
        if count_pending {
            // What was granted is pending.
            let any = !claimed.reply.grants.is_empty() || self.any_pending().await?;
            claimed.reply.any_pending = Some(any);
        }
        Ok(claimed)
    }

    async fn renew(&self, request: RenewRequest) -> Result<RenewReply, StoreFault> {
        let (ids, tokens) = guards(&request.keys);
        let sql = if request.wait { &self.renew_waiting } else { &self.renew };
        let query = sqlx::query(sqlx::AssertSqlSafe(Arc::clone(sql)))
            .bind(request.owner.as_str().to_owned())
            .bind(ids)
            .bind(tokens)
            .bind(micros(request.lease));
        let rows = self.call(&self.renewals, query).await?;
        let (db_now, answers) = read_answers(&rows, request.keys).map_err(|error| unreadable(&error))?;
        Ok(RenewReply { db_now, answers })
    }

    async fn settle(&self, request: SettleRequest) -> Result<SettleReply, StoreFault> {
        let keys: Vec<LeaseKey> = request.entries.iter().map(|(key, _)| *key).collect();
        let (ids, tokens) = guards(&keys);
        let settles: Vec<Flat> = request.entries.into_iter().map(|(_, settle)| flatten(settle)).collect();
        let query = sqlx::query(SETTLE)
            .bind(request.owner.as_str().to_owned())
            .bind(ids)
            .bind(tokens)
            .bind(settles.iter().map(|settle| settle.kind).collect::<Vec<_>>())
            .bind(settles.iter().map(|settle| settle.delay).collect::<Vec<_>>())
            .bind(settles.iter().map(|settle| settle.error.clone()).collect::<Vec<_>>())
            .bind(settles.iter().map(|settle| settle.status).collect::<Vec<_>>());
        let rows = self.call(&self.settles, query).await?;
        let (db_now, answers) = read_answers(&rows, keys).map_err(|error| unreadable(&error))?;
        Ok(SettleReply { db_now, answers })
    }

    async fn owned(&self, request: OwnedRequest) -> Result<OwnedReply, StoreFault> {
        let query = sqlx::query(OWNED).bind(request.owner.as_str().to_owned());
        let rows = self.call(&self.claims, query).await?;
        read_owned(&rows).map_err(|error| unreadable(&error))
    }

    async fn hint(&self) {
        if !self.options.prepared_statements {
            return std::future::pending().await;
        }
        let mut pause = Duration::from_millis(500);
        let mut listener = self.listener.lock().await;
        loop {
            if listener.is_none() {
                let listening = timeout(self.options.store_timeout, self.hosts.listen(CHANNEL)).await;
                *listener = listening.ok().and_then(Result::ok);
            }
            if let Some(listening) = listener.as_mut() {
                match timeout(SILENCE, listening.try_recv()).await {
                    // A notification, or a connection made anew, before which some may have been lost.
                    Ok(Ok(_)) => return,
                    // A dead network says nothing: only an answer shows that the connection stands.
                    Err(_) if self.answers(listening).await => continue,
                    _ => {}
                }
            }
            // Polling is the truth; a wake-up that fails is no failure.
            *listener = None;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(30));
        }
    }
}

fn guards(keys: &[LeaseKey]) -> (Vec<i64>, Vec<i64>) {
    keys.iter().map(|key| (key.row.0, key.token.0)).unzip()
}

/// A settle as the statement's columns.
struct Flat {
    kind: &'static str,
    delay: Option<i64>,
    error: Option<String>,
    status: Option<i32>,
}

fn flatten(settle: Settle) -> Flat {
    let status = |status: Option<u16>| status.map(i32::from);
    match settle {
        Settle::Delivered { status: code } => {
            Flat { kind: "delivered", delay: None, error: None, status: status(Some(code)) }
        }
        Settle::Retry { delay, error, status: code } => Flat {
            kind: "retry",
            delay: Some(micros(delay)),
            error: Some(clean(&error)),
            status: status(code),
        },
        Settle::Failed { error, status: code, tried } => Flat {
            kind: if tried { "failed" } else { "untried" },
            delay: None,
            error: Some(clean(&error)),
            status: status(code),
        },
        Settle::Release { delay } => {
            Flat { kind: "release", delay: delay.map(micros), error: None, status: None }
        }
    }
}
