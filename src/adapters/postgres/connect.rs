//! Connections: several hosts, of which one takes writes, and calls that close what they leave behind.

use std::ops::Range;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions, Postgres};
use sqlx::{ConnectOptions, Connection};

use super::PostgresOptions;
use crate::adapters::store::StoreError;

/// Settings of the connections that calls are made on. Plans are made once a connection, as planning a claim took a
/// quarter of the time of its execution. A plan that is kept must not depend on how little was in the table when it was
/// made, so that what is good for a small table only is ruled out.
pub const PLANS: [(&str, &str); 4] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("jit", "off"),
];

/// The servers that a URL names. With several, the one that takes writes is looked for (`target_session_attrs` is
/// always `read-write`: a worker can do nothing else).
#[derive(Debug)]
pub(super) struct Hosts {
    /// For calls: with `statement_timeout` on direct connections.
    bounded: Vec<PgConnectOptions>,
    /// For migrations and `LISTEN`.
    plain: Vec<PgConnectOptions>,
    current: AtomicUsize,
    pools: Mutex<Vec<PgPool>>,
}

/// Where the host list of a URL stands: after the user info, before path and query.
fn host_list(url: &str) -> Option<Range<usize>> {
    let start = url.find("://")? + 3;
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    let start = url[start..end].rfind('@').map_or(start, |at| start + at + 1);
    Some(start..end)
}

impl Hosts {
    pub(super) fn parse(url: &str, options: &PostgresOptions) -> Result<Self, StoreError> {
        // What is wrong is said without the URL, which may hold a password.
        let wrong = |error: String| StoreError::Database { doing: "reading DATABASE_URL", error };
        let list = host_list(url).ok_or_else(|| wrong("no `://` in it".into()))?;
        let mut plain = Vec::new();
        for host in url[list.clone()].split(',') {
            let one = format!("{}{host}{}", &url[..list.start], &url[list.end..]);
            let one = one.replace("target_session_attrs=read-write", "");
            let parsed = PgConnectOptions::from_str(&one).map_err(|error| wrong(super::text(&error)))?;
            let parsed = parsed.application_name("leasehold").disable_statement_logging();
            plain.push(if options.prepared_statements { parsed } else { parsed.statement_cache_capacity(0) });
        }
        let millis = options.statement_timeout().as_millis().to_string();
        let bounded = plain.iter().cloned().map(|host| {
            if options.prepared_statements {
                host.options([("statement_timeout", millis.as_str())]).options(PLANS)
            } else {
                host
            }
        });
        Ok(Self { bounded: bounded.collect(), plain, current: AtomicUsize::new(0), pools: Mutex::default() })
    }

    fn index(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// A pool that connects when first used, and follows [`Self::look_elsewhere`].
    pub(super) fn pool(&self, connections: u32, timeout: Duration) -> PgPool {
        let several = self.plain.len() > 1;
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(timeout)
            // A ping before each call would double the round trips; a dead connection shows itself in the call.
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                Box::pin(async move { if several { refuse_standby(connection).await } else { Ok(()) } })
            })
            .connect_lazy_with(self.bounded[self.index()].clone());
        self.pools.lock().unwrap_or_else(PoisonError::into_inner).push(pool.clone());
        pool
    }

    /// A connection outside of the pools, without `statement_timeout`.
    pub(super) async fn connect_plain(&self) -> Result<PgConnection, sqlx::Error> {
        let mut last = sqlx::Error::PoolTimedOut;
        for host in &self.plain {
            match PgConnection::connect_with(host).await {
                Ok(mut connection) => match refuse_standby(&mut connection).await {
                    Ok(()) => return Ok(connection),
                    Err(error) => last = error,
                },
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(super) async fn listen(&self, channel: &str) -> Result<PgListener, sqlx::Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .connect_lazy_with(self.plain[self.index()].clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.listen(channel).await?;
        Ok(listener)
    }

    pub(super) async fn acquire(&self, pool: &PgPool) -> Result<Borrowed, sqlx::Error> {
        let mut looking = Looking { hosts: self, from: self.index(), found: false };
        let connection = pool.acquire().await?;
        looking.found = true;
        Ok(Borrowed { connection: Some(connection), from: looking.from })
    }

    /// After an error that another host might not give.
    pub(super) fn look_elsewhere(&self, from: usize, error: &sqlx::Error) {
        let standby = |code: &str| matches!(code, "25006" | "55000" | "57P03");
        match error {
            sqlx::Error::Database(error) if !error.code().as_deref().is_some_and(standby) => {}
            _ => self.turn(from),
        }
    }

    /// Turns away from a host, unless another call that failed there has done so: two turns would pass one over.
    fn turn(&self, from: usize) {
        let next = (from + 1) % self.bounded.len();
        let turned = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
        if next != from && turned.is_ok() {
            for pool in self.pools.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                pool.set_connect_options(self.bounded[next].clone());
            }
        }
    }
}

async fn refuse_standby(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let read_only: String =
        sqlx::query_scalar("show transaction_read_only").persistent(false).fetch_one(connection).await?;
    if read_only == "off" {
        return Ok(());
    }
    Err(sqlx::Error::Io(std::io::Error::other("the server is a standby or read-only")))
}

/// Turns to the next host if a connection was not got, be it that the caller stopped waiting.
struct Looking<'a> {
    hosts: &'a Hosts,
    from: usize,
    found: bool,
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        if !self.found {
            self.hosts.turn(self.from);
        }
    }
}

/// A connection that is closed when dropped, unless it was put back: what a call left on it is not known.
pub(super) struct Borrowed {
    connection: Option<PoolConnection<Postgres>>,
    /// The host that was looked at when it was asked for.
    pub(super) from: usize,
}

impl Borrowed {
    pub(super) fn get(&mut self) -> &mut PgConnection {
        self.connection.as_mut().expect("a connection is there until it is put back")
    }

    pub(super) fn put_back(mut self) {
        drop(self.connection.take());
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(connection.detach());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> PostgresOptions {
        PostgresOptions { store_timeout: Duration::from_secs(5), max_payload: 1, prepared_statements: true }
    }

    #[test]
    fn the_server_gives_a_statement_up_before_the_worker_does() {
        let hosts = Hosts::parse("postgres://a/shop", &options()).expect("a URL");
        let given = hosts.bounded[0].get_options().expect("options of the connection");
        assert!(given.contains("statement_timeout=4500"), "{given}");
    }

    #[test]
    fn calls_that_fail_together_turn_once() {
        let hosts = Hosts::parse("postgres://a,b/shop", &options()).expect("a URL");
        hosts.turn(0);
        hosts.turn(0);
        assert_eq!(hosts.index(), 1);
        hosts.turn(1);
        assert_eq!(hosts.index(), 0);
    }

    fn hosts(url: &str) -> Vec<(String, u16)> {
        let hosts = Hosts::parse(url, &options()).expect("a URL");
        hosts.plain.iter().map(|host| (host.get_host().to_owned(), host.get_port())).collect()
    }

    #[test]
    fn a_url_may_name_several_hosts() {
        let url = "postgres://u:p%40@a:5433,b/shop?target_session_attrs=read-write&sslmode=disable";
        assert_eq!(hosts(url), [("a".to_owned(), 5433), ("b".to_owned(), 5432)]);
        assert_eq!(hosts("postgres://a/shop"), [("a".to_owned(), 5432)]);
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_its_password() {
        let error = Hosts::parse("postgres://u:secret@a:notaport/shop", &options()).expect_err("a bad port");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
