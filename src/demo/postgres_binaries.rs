//! Where Postgres lies on this machine, and as whom it runs.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

/// Where server binaries lie: `PATH`, then Debian's and Homebrew's places, newest version first.
pub(super) fn find_binaries() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for pattern in ["/usr/lib/postgresql", "/usr/local/opt", "/opt/homebrew/opt"] {
        let mut found: Vec<PathBuf> = std::fs::read_dir(pattern)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join("bin"))
            .collect();
        let version = |path: &PathBuf| {
            let name = path.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or("");
            name.trim_start_matches("postgresql@").parse::<u32>().unwrap_or(0)
        };
        found.sort_by_key(|path| std::cmp::Reverse(version(path)));
        folders.extend(found);
    }
    folders.into_iter().find(|folder| folder.join("initdb").is_file() && folder.join("postgres").is_file())
}

/// Postgres refuses to run as root: then it runs as `postgres`, else as `nobody`.
pub(super) fn server_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let ids = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    ids("postgres").or_else(|| ids("nobody"))
}

/// A program of the server's, run as its user, without settings from the environment.
pub(super) fn command(program: &Path, folder: &Path, user: Option<(u32, u32)>) -> Command {
    let mut command = std::process::Command::new(program);
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command.into()
}
