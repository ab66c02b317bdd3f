//! Postgres servers of the tests' own, with fsync on, to be crashed and promoted.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use crate::common::{MS, PATIENCE};
use crate::postgres_binaries::{command, find_binaries, server_user};

pub(crate) struct Server {
    home: PathBuf,
    child: Option<Child>,
    /// The address beside its socket at which it listens from the next start on; none if empty.
    pub(crate) address: &'static str,
}

fn program(name: &str, home: &Path) -> Command {
    let binaries = find_binaries().expect("server binaries of Postgres (initdb, postgres) on this machine");
    // In `PATH` there may be links to some of them alone.
    let initdb = binaries.join("initdb").canonicalize().expect("it is there");
    let mut command = command(&initdb.with_file_name(name), home, server_user());
    command.kill_on_drop(true);
    command
}

/// A folder that belongs to the server's user.
pub(crate) fn home(folder: &Path, name: &str) -> PathBuf {
    let home = folder.join(name);
    std::fs::create_dir(&home).expect("a folder");
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).expect("an open folder");
    if let Some((uid, gid)) = server_user() {
        chown(&home, Some(uid), Some(gid)).expect("a folder of the server's user");
    }
    home
}

async fn run(mut command: Command) {
    let output = command.output().await.expect("it can be run");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Server {
    pub(crate) async fn start_new(folder: &Path, name: &str) -> Self {
        let home = home(folder, name);
        let mut initdb = program("initdb", &home);
        initdb.args(["-D", "data", "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", "-N"]);
        run(initdb).await;
        let mut server = Self { home, child: None, address: "" };
        server.start().await;
        server
    }

    /// A streaming standby of the server at an address.
    pub(crate) async fn start_standby(folder: &Path, name: &str, primary: SocketAddr) -> Self {
        let home = home(folder, name);
        let mut backup = program("pg_basebackup", &home);
        backup.args(["-D", "data", "-R", "-U", "postgres", "-X", "stream", "-c", "fast", "-h", "127.0.0.1"]);
        backup.args(["-p", &primary.port().to_string()]);
        run(backup).await;
        let mut server = Self { home, child: None, address: "" };
        server.start().await;
        server
    }

    pub(crate) async fn start(&mut self) {
        let log = self.home.join("log");
        let log = OpenOptions::new().create(true).append(true).open(log).expect("a log file");
        let mut postgres = program("postgres", &self.home);
        postgres.args(["-D", "data", "-c", "max_connections=300", "-c"]);
        postgres.arg(format!("listen_addresses={}", self.address)).arg("-k").arg(&self.home).stderr(log);
        self.child = Some(postgres.spawn().expect("postgres starts"));
        let start = Instant::now();
        while self.connect().await.is_err() {
            assert!(start.elapsed() < PATIENCE, "the server does not start:\n{}", self.log());
            sleep(10 * MS).await;
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.home.join("log")).unwrap_or_default()
    }

    /// Immediate shutdown: no checkpoint, open transactions are lost, the next start recovers from the log.
    pub(crate) async fn crash(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it runs");
        kill_process(pid, Signal::QUIT).expect("a signal to an own child");
        child.wait().await.expect("it ends");
    }

    /// Waits until the standby has all events.
    pub(crate) async fn until_it_has(&self, events: u32) {
        let mut connection = self.admin().await;
        let start = Instant::now();
        loop {
            let count = sqlx::query_scalar("select count(*) from leasehold.outbox_events");
            if count.fetch_one(&mut connection).await.is_ok_and(|count: i64| count == i64::from(events)) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the standby does not follow:\n{}", self.log());
            sleep(20 * MS).await;
        }
    }

    /// Waits until a primary's commits wait for this standby.
    pub(crate) async fn until_synchronous(&self, primary: &Self) {
        let mut connection = primary.admin().await;
        let start = Instant::now();
        let synchronous = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        while sqlx::query_scalar::<_, i64>(synchronous).fetch_one(&mut connection).await.expect("a count")
            == 0
        {
            assert!(start.elapsed() < PATIENCE, "the standby is not synchronous:\n{}", self.log());
            sleep(20 * MS).await;
        }
    }

    pub(crate) async fn promote(&self) {
        self.run("select pg_promote()").await;
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.home
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.home.join(".s.PGSQL.5432")
    }

    /// A URL past every proxy.
    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@localhost/postgres?host={}", self.home.display())
    }

    /// An application's connection.
    pub(crate) async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        self.options().connect().await
    }

    fn options(&self) -> PgConnectOptions {
        PgConnectOptions::new()
            .socket(&self.home)
            .username("postgres")
            .database("postgres")
            .disable_statement_logging()
    }

    /// A connection that the faults don't hold up.
    pub(crate) async fn admin(&self) -> PgConnection {
        let options = [("default_transaction_read_only", "off"), ("synchronous_commit", "local")];
        self.options().application_name("admin").options(options).connect().await.expect("the server answers")
    }

    pub(crate) async fn run(&self, sql: &'static str) {
        let mut connection = self.admin().await;
        connection.execute(sql).await.expect(sql);
        let _ = connection.close().await;
    }

    /// Changes a setting of the running server.
    pub(crate) async fn set(&self, sql: &'static str) {
        let mut connection = self.admin().await;
        connection.execute(sql).await.expect(sql);
        connection.execute("select pg_reload_conf()").await.expect("a reload");
        let _ = connection.close().await;
    }
}

/// pgbouncer in transaction mode before a server.
pub(crate) struct Pooler {
    home: PathBuf,
    child: Child,
}

impl Pooler {
    pub(crate) async fn start(folder: &Path, server: &Server) -> Self {
        let home = home(folder, "pooler");
        let settings = format!(
            "[databases]\npostgres = host={} port=5432 user=postgres\n[pgbouncer]\nlisten_addr =\nunix_socket_dir = {}\n\
             auth_type = any\npool_mode = transaction\ndefault_pool_size = 12\nserver_login_retry = 1\n",
            server.folder().display(),
            home.display()
        );
        std::fs::write(home.join("pgbouncer.ini"), settings).expect("settings");
        let child = Self::spawn(&home).await;
        Self { home, child }
    }

    async fn spawn(home: &Path) -> Child {
        let binary = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.is_file())
            .expect("pgbouncer is installed (`apt-get install pgbouncer`)");
        let log = File::options().create(true).append(true).open(home.join("log")).expect("a log file");
        let mut pgbouncer = command(binary, home, server_user());
        let child = pgbouncer.arg("pgbouncer.ini").stderr(log).kill_on_drop(true).spawn();
        let child = child.expect("pgbouncer starts");
        let start = Instant::now();
        while tokio::net::UnixStream::connect(home.join(".s.PGSQL.6432")).await.is_err() {
            let log = || std::fs::read_to_string(home.join("log")).unwrap_or_default();
            assert!(start.elapsed() < PATIENCE, "pgbouncer does not start:\n{}", log());
            sleep(10 * MS).await;
        }
        child
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.home.join(".s.PGSQL.6432")
    }

    /// Kills it.
    pub(crate) async fn crash(&mut self) {
        self.child.kill().await.expect("SIGKILL");
        let _ = std::fs::remove_file(self.socket());
    }

    pub(crate) async fn restart(&mut self) {
        self.child = Self::spawn(&self.home).await;
    }
}
