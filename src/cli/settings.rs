//! Settings: defaults < `leasehold.toml` < environment < flags.
//!
//! One table, [`SETTINGS`], names them all; keys, variables, flags, errors and help derive from it. [`parse`] is a pure
//! function and reports every mistake at once.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use crate::adapters::http::HttpSettings;
use crate::adapters::store::Retain;
use crate::machine::WorkerSettings;

mod database;
mod reader;
mod table;
#[cfg(test)]
mod tests;

pub use database::{Database, DatabaseUrl};
pub use reader::parse;
pub use table::{Kind, SETTINGS, Setting};

/// The file that is read if it is there and no other is named.
pub const DEFAULT_FILE: &str = "leasehold.toml";

/// Where a value came from, the weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The table.
    Default,
    /// The file.
    File,
    /// A variable of the environment.
    Environment,
    /// A flag.
    Flag,
}

/// Reads a whole file.
pub type ReadFile = dyn Fn(&Path) -> io::Result<String>;

/// What settings are parsed from.
#[derive(Clone, Default)]
pub struct Sources<'a> {
    /// The file's name, for messages, and its text.
    pub file: Option<(String, String)>,
    /// The environment, all of it.
    pub environment: BTreeMap<String, String>,
    /// Flags by the setting's name.
    pub flags: BTreeMap<String, String>,
    /// The name of this host.
    pub host_name: String,
    /// Reads the file of secrets. `None`: it can't be read.
    pub read: Option<&'a ReadFile>,
}

/// Which settings a command can't do without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// `DATABASE_URL`.
    pub database: bool,
    /// `SIGNING_SECRETS` or `SIGNING_SECRETS_FILE`.
    pub secrets: bool,
}

impl Needs {
    /// `run` and `check`.
    pub const RUN: Self = Self { database: true, secrets: true };
    /// `migrate`, `enqueue` and `status`.
    pub const STORE: Self = Self { database: true, secrets: false };
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// A level, or directives of `tracing_subscriber::EnvFilter`. Parses.
    pub filter: String,
    /// How.
    pub format: LogFormat,
}

/// All settings, parsed.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the outbox is; present whenever it was needed.
    pub database: Option<DatabaseUrl>,
    /// Whether statements are prepared on the server.
    pub prepared_statements: bool,
    /// Without the random suffix; 1 to 200 visible ASCII characters.
    pub worker_name: String,
    /// What the machine decides by. The seed is 0: give it a random one.
    pub worker: WorkerSettings,
    /// How requests are made. Without secrets if none were needed.
    pub http: HttpSettings,
    /// Attempts of an event, for `enqueue`.
    pub max_attempts: i32,
    /// The largest payload in bytes, at most 8 MiB.
    pub max_payload: u32,
    /// What becomes of delivered events.
    pub retain: Retain,
    /// Where health, metrics and status are served.
    pub admin_addr: Option<SocketAddr>,
    /// What is logged.
    pub log: LogSettings,
    /// Each setting's name, value (a secret's is not shown) and origin, for `check`.
    pub shown: Vec<(&'static str, String, Origin)>,
}

/// Everything that is wrong with the settings, one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SettingsError(pub Vec<String>);

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for SettingsError {}

/// Reads file, environment and host name, and parses them with these flags (by the setting's name).
///
/// # Errors
/// As [`parse`], or a file that was named but can't be read.
pub fn load(
    config: Option<&Path>,
    flags: BTreeMap<String, String>,
    needs: Needs,
) -> Result<Settings, SettingsError> {
    let path = config.unwrap_or(Path::new(DEFAULT_FILE));
    let file = match std::fs::read_to_string(path) {
        Ok(text) => Some((path.display().to_string(), text)),
        Err(error) if config.is_none() && error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(SettingsError(vec![format!("{} can't be read: {error}", path.display())]));
        }
    };
    // What isn't UTF-8 is no valid value of any setting; its replacement characters are reported like other mistakes.
    let environment = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .collect();
    let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let read = |path: &Path| std::fs::read_to_string(path);
    parse(&Sources { file, environment, flags, host_name, read: Some(&read) }, needs)
}
