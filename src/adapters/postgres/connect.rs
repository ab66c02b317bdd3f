//! Connections: several hosts, of which one takes writes, and calls that close what they leave behind.

use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Row as _};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::PostgresOptions;

/// How transactions begin that are more than one statement, whatever the database's default: a claim that meets another at
/// a row is to see it as it is now, not to fail.
pub(super) const BEGIN: &str = "begin isolation level read committed";

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
}

/// Where the host list of a URL stands: after the user info, before path and query.
fn host_list(url: &str) -> Option<Range<usize>> {
    let start = url.find("://")? + 3;
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    let start = url[start..end].rfind('@').map_or(start, |at| start + at + 1);
    Some(start..end)
}

const PERCENT_ENCODE: &str = " (in a user name or password, write # / ? @ as %23 %2F %3F %40)";

/// Whether there is an `@` behind the host list: then a password may have ended it.
fn cut_short(url: &str, list: &Range<usize>) -> bool {
    url[list.end..].contains('@')
}

impl Hosts {
    /// What is wrong is said without the URL, which may hold a password.
    pub(super) fn parse(url: &str, options: &PostgresOptions) -> Result<Self, String> {
        let list = host_list(url).ok_or("no `://` in it")?;
        let unreadable = |error: &sqlx::Error| {
            let error = super::text(error);
            let error = error.trim_start_matches("error with configuration: ");
            let hint = match error {
                "empty host" => {
                    " (a socket's folder is named by postgres:///database?host=/folder&user=name)"
                }
                _ if cut_short(url, &list) => PERCENT_ENCODE,
                _ => "",
            };
            format!("{error}{hint}")
        };
        if url[list.end..].starts_with('#') && cut_short(url, &list) {
            // What is before it can look like a host and a port.
            return Err(format!("a # ends what is read of it{PERCENT_ENCODE}"));
        }
        let mut plain = Vec::new();
        for host in url[list.clone()].split(',') {
            let one = format!("{}{host}{}", &url[..list.start], &url[list.end..]);
            let one = one.replace("target_session_attrs=read-write", "");
            let parsed = PgConnectOptions::from_str(&one).map_err(|error| unreadable(&error))?;
            // sqlx would look an address with its brackets up as a name.
            let host = parsed.get_host().trim_matches(['[', ']']).to_owned();
            let parsed = parsed.host(&host).application_name("leasehold").disable_statement_logging();
            // A pooler refuses what it doesn't know by default; no statement sends a float as text.
            let parsed = parsed.extra_float_digits(None);
            plain.push(if options.prepared_statements { parsed } else { parsed.statement_cache_capacity(0) });
        }
        let millis = options.statement_timeout().as_millis().to_string();
        // A server that can't send the rest of an answer does not look at the clock: until TCP gives up, after a quarter of
        // an hour, the rows stay locked of a claim whose worker is gone or stands still.
        let unsent = options.store_timeout.as_millis().to_string();
        let bounded = plain.iter().cloned().map(|host| {
            if options.prepared_statements {
                let bounds = [
                    ("statement_timeout", millis.as_str()),
                    ("tcp_user_timeout", unsent.as_str()),
                    ("default_transaction_isolation", "read committed"),
                ];
                host.options(bounds).options(PLANS)
            } else {
                host
            }
        });
        Ok(Self { bounded: bounded.collect(), plain, current: AtomicUsize::new(0) })
    }

    fn index(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    async fn connect(&self, host: usize) -> Result<PgConnection, sqlx::Error> {
        let mut connection = PgConnection::connect_with(&self.bounded[host]).await?;
        if self.bounded.len() > 1 {
            refuse_standby(&mut connection).await?;
        }
        Ok(connection)
    }

    /// A connection outside of the lanes, to the first host that takes writes; each has its share of `within`. Only a
    /// `bounded` one has a `statement_timeout`.
    pub(super) async fn connect_to_any(
        &self,
        bounded: bool,
        within: Duration,
    ) -> Result<PgConnection, sqlx::Error> {
        let hosts = if bounded { &self.bounded } else { &self.plain };
        let share = within / u32::try_from(hosts.len()).unwrap_or(u32::MAX);
        let silence = || {
            let error = format!("no answer within {share:?}");
            sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, error))
        };
        let mut last = silence();
        for host in hosts {
            let connecting = async {
                let mut connection = PgConnection::connect_with(host).await?;
                refuse_standby(&mut connection).await?;
                Ok(connection)
            };
            match timeout(share, connecting).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = error,
                Err(_) => last = silence(),
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
        let _ = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

async fn refuse_standby(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let row = sqlx::raw_sql("show transaction_read_only").fetch_one(connection).await?;
    if row.try_get::<&str, _>(0)? == "off" {
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

/// How long a connection may lie idle. What lies between here and the server forgets connections after some minutes
/// without telling anybody.
const IDLE: Duration = Duration::from_secs(180);

/// The connections for one kind of calls, made when they are needed. A pool of sqlx's pings each connection that comes
/// back: a round trip more for every call, and in a network that went dead the place stays taken until TCP gives up.
#[derive(Debug)]
pub(super) struct Lane {
    hosts: Arc<Hosts>,
    places: Semaphore,
    idle: Mutex<Vec<Idle>>,
    /// Bounds the wait for a place and the connecting.
    timeout: Duration,
}

#[derive(Debug)]
struct Idle {
    connection: PgConnection,
    host: usize,
    since: Instant,
}

impl Lane {
    pub(super) fn new(hosts: &Arc<Hosts>, places: usize, timeout: Duration) -> Self {
        Self { hosts: Arc::clone(hosts), places: Semaphore::new(places), idle: Mutex::default(), timeout }
    }

    /// A connection to the host that is looked at now.
    pub(super) async fn acquire(&self) -> Result<Borrowed<'_>, sqlx::Error> {
        let host = self.hosts.index();
        let mut looking = Looking { hosts: &self.hosts, from: host, found: false };
        let connecting = async {
            let place = self.places.acquire().await.map_err(|_| sqlx::Error::PoolClosed)?;
            let connection = match self.idle(host) {
                Some(connection) => connection,
                None => self.hosts.connect(host).await?,
            };
            Ok(Borrowed { connection: Some(connection), lane: self, host, _place: place })
        };
        let borrowed = timeout(self.timeout, connecting).await.map_err(|_| sqlx::Error::PoolTimedOut)?;
        // A server that is full is the right one all the same, and others of its connections may be good.
        let full = |error: &sqlx::Error| {
            let code = error.as_database_error().and_then(|error| error.code());
            code.is_some_and(|code| code.starts_with("53"))
        };
        looking.found = borrowed.as_ref().map_or_else(full, |_| true);
        borrowed
    }

    /// One that is worth keeping; the others are closed.
    fn idle(&self, host: usize) -> Option<PgConnection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|idle| idle.host == host && idle.since.elapsed() < IDLE);
        idle.pop().map(|idle| idle.connection)
    }
}

/// A connection that is closed when dropped, unless it was put back: what a call left on it is not known.
pub(super) struct Borrowed<'a> {
    connection: Option<PgConnection>,
    lane: &'a Lane,
    /// The host that it is connected to.
    pub(super) host: usize,
    _place: SemaphorePermit<'a>,
}

impl Borrowed<'_> {
    pub(super) fn get(&mut self) -> &mut PgConnection {
        self.connection.as_mut().expect("a connection is there until it is put back")
    }

    pub(super) fn put_back(mut self) {
        if let Some(connection) = self.connection.take() {
            let idle = Idle { connection, host: self.host, since: Instant::now() };
            self.lane.idle.lock().unwrap_or_else(PoisonError::into_inner).push(idle);
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
        assert!(given.contains("tcp_user_timeout=5000"), "{given}");
    }

    #[test]
    fn the_shortest_store_timeout_bounds_a_statement() {
        let shortest = PostgresOptions { store_timeout: Duration::from_millis(1), ..options() };
        assert_eq!(shortest.statement_timeout().as_millis(), 1);
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
        assert_eq!(
            hosts("postgres://u@[::1]:5433,b/shop"),
            [("::1".to_owned(), 5433), ("b".to_owned(), 5432)]
        );
    }

    #[test]
    fn a_bad_url_is_refused_without_showing_its_password() {
        let error = Hosts::parse("postgres://u:secret@a:notaport/shop", &options()).expect_err("a bad port");
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said_once_and_with_what_helps() {
        for (url, says) in [
            ("postgres://u@/shop?host=/tmp/x", "empty host (a socket's folder is named by postgres:///"),
            ("postgres://u:secret@a/shop?sslmode=bogus", "unknown value \"bogus\" for `ssl_mode`"),
            ("postgres://u:secret@a:notaport/shop", "invalid port number"),
            ("postgres://u:sec#ret@a/shop", "a # ends what is read of it (in a user name or password"),
            ("postgres://u:1#secret@a/shop", "a # ends what is read of it (in a user name or password"),
            ("postgres://u:sec/ret@a/shop", "invalid port number (in a user name or password"),
            ("postgres://u:sec@r/et@a/shop", ""),
            ("postgres://u:sec?ret@a/shop", "invalid port number (in a user name or password"),
        ] {
            let error = Hosts::parse(url, &options()).err().unwrap_or_default();
            assert!(error.starts_with(says) && !error.contains("sec"), "{url}: {error}");
        }
        let socket = Hosts::parse("postgres:///shop?host=/tmp/x&user=u", &options());
        assert!(socket.is_ok(), "{socket:?}");
    }

    #[tokio::test]
    async fn a_server_that_does_not_answer_is_given_up_with_the_limit_that_was_kept() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = silent.local_addr().expect("bound").port();
        let hosts = Hosts::parse(&format!("postgres://u@127.0.0.1:{port}/shop"), &options()).expect("a URL");
        let error = hosts.connect_to_any(true, Duration::from_millis(200)).await.expect_err("no answer");
        assert_eq!(crate::adapters::postgres::text(&error), "connection: no answer within 200ms");
    }
}
