//! A private Postgres from the server binaries found on the machine, for `demo --postgres`.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::Child;
use tokio::time::sleep;

use super::postgres_binaries::{command, find_binaries, server_user};

/// Names the socket; said to both sides, as `PGPORT` may say something else.
const PORT: &str = "5432";

/// A running server; its data lie in the demo's temporary folder.
pub(super) struct Server {
    child: Child,
    url: String,
}

/// Makes a cluster and starts it on a Unix socket in `folder`.
pub(super) async fn start(folder: &Path) -> anyhow::Result<Server> {
    let binaries = find_binaries().context(
        "no Postgres server binaries (initdb, postgres) found on PATH or in /usr/lib/postgresql: install them, for \
         instance with `apt-get install postgresql`, or run the demo without --postgres",
    )?;
    let user = server_user();
    let home = folder.join("postgres");
    std::fs::create_dir(&home).context("a folder for the private Postgres")?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).context("opening the folder")?;
    if let Some((uid, gid)) = user {
        std::os::unix::fs::chown(&home, Some(uid), Some(gid))
            .context("handing the folder to the server's user")?;
    }
    let data = home.join("data");
    let initdb = command(&binaries.join("initdb"), &home, user)
        .arg("-D")
        .arg(&data)
        .args(["-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", "-N"])
        .stderr(Stdio::piped())
        .output()
        .await
        .context("initdb could not be run")?;
    if !initdb.status.success() {
        bail!("initdb failed: {}", String::from_utf8_lossy(&initdb.stderr).trim());
    }
    let log = std::fs::File::create(home.join("log")).context("a log file for the private Postgres")?;
    let child = command(&binaries.join("postgres"), &home, user)
        .arg("-D")
        .arg(&data)
        .arg("-k")
        .arg(&home)
        .args(["-p", PORT, "-c", "listen_addresses="])
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .context("postgres could not be started")?;
    let url =
        format!("postgres://postgres@localhost:{PORT}/postgres?host={}&sslmode=disable", home.display());
    let server = Server { child, url };
    for _ in 0..200 {
        let pid = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        if pid.lines().nth(7).is_some_and(|line| line.trim() == "ready") {
            return Ok(server);
        }
        sleep(Duration::from_millis(50)).await;
    }
    let log = std::fs::read_to_string(home.join("log")).unwrap_or_default();
    bail!("the private Postgres did not become ready: {}", log.trim())
}

impl Server {
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Fast shutdown (SIGINT), so that nothing of it stays behind.
    pub(super) async fn stop(mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            let _ = tokio::time::timeout(Duration::from_secs(10), self.child.wait()).await;
        }
    }
}

impl Drop for Server {
    /// Immediate shutdown (SIGQUIT). Killed itself, it would leave a session behind that waits for a lock of another one
    /// which is gone: such a wait does not notice the server's death.
    fn drop(&mut self) {
        let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()))
        else {
            return;
        };
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        // It kills after 5 s what has not ended by then.
        for _ in 0..300 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
