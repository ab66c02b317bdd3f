//! Worker processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use rustix::process::Signal;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::{MS, PATIENCE};

/// The binary with these settings and nothing else of the environment.
pub(crate) fn leasehold(folder: &Path, url: &str, settings: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold"));
    command
        .env_clear()
        .env("DATABASE_URL", url)
        .envs(settings.iter().map(|(name, value)| (format!("LEASEHOLD_{name}"), value)))
        .current_dir(folder)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Starts `leasehold run` with its log in `NAME.log`.
pub(crate) fn start_worker(mut command: Command, folder: &Path, name: &str) -> Worker {
    let path = folder.join(format!("{name}.log"));
    let log = std::fs::File::create(&path).expect("a log file");
    let child = command
        .env("LEASEHOLD_WORKER_NAME", name)
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log)
        .spawn()
        .expect("the binary starts");
    Worker { child, log: path }
}

pub(crate) struct Worker {
    pub(crate) child: Child,
    log: PathBuf,
}

impl Worker {
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        rustix::process::kill_process(pid.expect("still running"), signal).expect("a signal to an own child");
    }

    /// Waits for its end; returns the exit code.
    pub(crate) async fn end(&mut self) -> Option<i32> {
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        status.expect("the worker ends").expect("it was started").code()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) async fn logs(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} in the log:\n{}", self.log());
            sleep(20 * MS).await;
        }
    }
}
