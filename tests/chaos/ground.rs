//! What every chaos test stands on: a folder, a migrated server of its own, settings, and workers' logs.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::bed::{FENCE_MARGIN, GRACE, LEASE, POLL, STORE_TIMEOUT};
use crate::common::{SECRET, Worker, leasehold, start_worker};
use crate::server::Server;

pub(crate) struct Ground {
    pub(crate) folder: tempfile::TempDir,
    settings: BTreeMap<String, String>,
}

/// The receivers and proxies are in this process.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .expect("a limit up to the hard one");
}

fn millis(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

impl Ground {
    pub(crate) async fn new() -> (Self, Server) {
        allow_many_files();
        let folder = tempfile::tempdir().expect("a folder");
        let server = Server::start_new(folder.path(), "first").await;
        let mut ground = Self { folder, settings: BTreeMap::new() };
        ground.set(&[
            ("SIGNING_SECRETS", SECRET),
            ("ALLOW_DESTINATIONS", "127.0.0.0/8"),
            ("ALLOW_HTTP", "true"),
            ("LEASE", &millis(LEASE)),
            ("FENCE_MARGIN", &millis(FENCE_MARGIN)),
            ("RECLAIM_GRACE", &millis(GRACE)),
            ("STORE_TIMEOUT", &millis(STORE_TIMEOUT)),
            ("POLL_INTERVAL", &millis(POLL)),
            ("RETRY_INITIAL", "100ms"),
            ("RETRY_MAX", "1s"),
        ]);
        let mut migrate = leasehold(ground.folder.path(), &server.url(), &ground.settings);
        let output = migrate.arg("migrate").output().await.expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (ground, server)
    }

    pub(crate) fn set(&mut self, settings: &[(&str, &str)]) {
        self.settings.extend(settings.iter().map(|(name, value)| ((*name).into(), (*value).into())));
    }

    pub(crate) fn worker(&self, name: &str, url: &str) -> Worker {
        let mut command = leasehold(self.folder.path(), url, &self.settings);
        command.arg("run");
        start_worker(command, self.folder.path(), name)
    }

    /// No worker panicked, and nothing needs an operator.
    pub(crate) fn assert_logs_are_clean(&self) {
        for entry in std::fs::read_dir(self.folder.path()).expect("the folder").flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = std::fs::read_to_string(&path).unwrap_or_default();
                let bad = log.lines().find(|line| line.contains("panicked") || line.contains("ERROR"));
                assert_eq!(bad, None, "in {}", path.display());
            }
        }
    }
}
