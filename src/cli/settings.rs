//! Settings: defaults < `leasehold.toml` < environment < flags.
//!
//! One table, [`SETTINGS`], names them all; keys, variables, flags, errors and help derive from it. [`parse`] is a pure
//! function and reports every mistake at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use tracing_subscriber::EnvFilter;

use crate::adapters::http::{AllowRule, HttpGateway, HttpSettings, HttpSettingsError, Secret};
use crate::adapters::store::{Retain, SETTLED_FOR};
use crate::machine::{LimitError, Limits, RawTiming, RetryPolicy, Timing, TimingError, WorkerSettings};

/// The file that is read if it is there and no other is named.
pub const DEFAULT_FILE: &str = "leasehold.toml";
const PREFIX: &str = "LEASEHOLD_";

/// What a setting's value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `postgres://…` or `sqlite://file`; it may hold a password.
    DatabaseUrl,
    /// Any text that its own rule allows.
    Text,
    /// `250ms`, `30s`, `5m`, `1h`.
    Duration,
    /// `65536`, `64KiB`, `1MiB`.
    Size,
    /// A whole number.
    Number,
    /// `true` or `false`.
    Bool,
    /// Values with commas between them.
    List,
    /// The same, and never shown.
    Secrets,
}

impl Kind {
    const fn allowed(self) -> &'static str {
        match self {
            Self::DatabaseUrl => "postgres://user@host/database or sqlite://file",
            Self::Text => "a text",
            Self::Duration => "a duration such as 250ms, 30s, 5m or 1h",
            Self::Size => "a size such as 65536, 64KiB or 1MiB",
            Self::Number => "a whole number",
            Self::Bool => "true or false",
            Self::List => "values with commas between them",
            Self::Secrets => "whsec_<base64>, several with commas between them",
        }
    }

    const fn is_secret(self) -> bool {
        matches!(self, Self::DatabaseUrl | Self::Secrets)
    }
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The key in the file. Flag and variable derive from it.
    pub name: &'static str,
    /// What its value looks like.
    pub kind: Kind,
    /// The default as it would be written; `None` if there is none or it is computed.
    pub default: Option<&'static str>,
    /// What it does, and a computed default.
    pub help: &'static str,
}

impl Setting {
    /// The variable of the environment.
    pub fn variable(&self) -> String {
        let name = self.name.to_ascii_uppercase();
        if self.name == "database_url" { name } else { format!("{PREFIX}{name}") }
    }

    /// The flag, without its hyphens in front.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }
}

const fn setting(
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    help: &'static str,
) -> Setting {
    Setting { name, kind, default, help }
}

/// Every setting.
#[rustfmt::skip]
pub const SETTINGS: &[Setting] = &[
    setting("database_url", Kind::DatabaseUrl, None, "Where the outbox is: postgres://… (several hosts allowed) or sqlite://file"),
    setting("prepared_statements", Kind::Bool, Some("true"), "Off for poolers in transaction mode that don't keep them"),
    setting("worker_name", Kind::Text, None, "Names the worker; default: the host name. The worker id is this and a random suffix"),
    setting("lease", Kind::Duration, Some("30s"), "L: how long a claim holds; 1s to 24h, on SQLite at least 2s"),
    setting("heartbeat", Kind::Duration, None, "H: how often a held lease is renewed; default: lease / 3"),
    setting("store_timeout", Kind::Duration, None, "R: bounds each call of the database; default: the lesser of lease / 6 and 5s"),
    setting("fence_margin", Kind::Duration, None, "M: how long before its end a lease is fenced; default: lease / 10"),
    setting("reclaim_grace", Kind::Duration, None, "G: how long a lease that ran out is left alone; default: lease / 10"),
    setting("max_in_flight", Kind::Number, Some("256"), "Open requests of this worker"),
    setting("max_in_flight_per_destination", Kind::Number, Some("32"), "Open requests of this worker to one scheme and authority"),
    setting("max_leased", Kind::Number, None, "Leases that this worker holds; default: max_in_flight + claim_batch"),
    setting("claim_batch", Kind::Number, Some("500"), "Events asked for in one claim"),
    setting("poll_interval", Kind::Duration, Some("250ms"), "The slowest polling"),
    setting("connect_timeout", Kind::Duration, Some("5s"), "Bounds DNS, connect and TLS of a request"),
    setting("request_timeout", Kind::Duration, Some("15s"), "Bounds DNS, connect, TLS and the wait for the status; may outlast the lease"),
    setting("retry_initial", Kind::Duration, Some("5s"), "The delay after the first failed attempt; doubles with each further one"),
    setting("retry_max", Kind::Duration, Some("1h"), "The longest such delay"),
    setting("retry_jitter_bps", Kind::Number, Some("2000"), "Jitter of the delays in basis points, 0 to 10000"),
    setting("retry_budget", Kind::Number, Some("0"), "Attempts beyond the first whatever the event says; 0 is off"),
    setting("retry_after_max", Kind::Duration, Some("24h"), "The longest Retry-After that is honoured"),
    setting("max_attempts", Kind::Number, Some("20"), "Attempts of an event, for enqueue"),
    setting("max_payload", Kind::Size, Some("1MiB"), "The largest payload that is sent; at most 8MiB"),
    setting("response_cap", Kind::Size, Some("64KiB"), "How much of a response's body is read, to reuse the connection; never stored"),
    setting("fail_statuses", Kind::List, None, "Statuses that fail an event at once; default: none"),
    setting("reclaim_limit", Kind::Number, Some("100"), "Lost leases in a row after which an event fails; 0 is off, else more than 3"),
    setting("signing_secrets", Kind::Secrets, None, "whsec_<base64>, with commas; all sign, the first one first: that is rotation"),
    setting("signing_secrets_file", Kind::Text, None, "A file with the same, one a line"),
    setting("sign_hex", Kind::Bool, Some("false"), "Signs by the hex scheme besides"),
    setting("hex_prefix", Kind::Text, Some("X-Webhook"), "What the headers of the hex scheme begin with"),
    setting("allow_destinations", Kind::List, None, "CIDRs and host patterns allowed besides public addresses; default: none"),
    setting("allow_http", Kind::Bool, Some("false"), "Allows http:// destinations"),
    setting("drain_timeout", Kind::Duration, Some("28s"), "How long a shutdown may take; more than 2 * store_timeout"),
    setting("retain", Kind::Text, Some("keep"), "What becomes of delivered events: keep, archive (Postgres) or delete; one that left no longer guards its id against being enqueued again"),
    setting("retain_for", Kind::Duration, Some("720h"), "How long a delivered event is kept: in the outbox before delete, in the archive before its day is dropped; 1m to 876000h"),
    setting("admin_addr", Kind::Text, None, "Address and port of health, metrics and status; default: off"),
    setting("log", Kind::Text, Some("info"), "Log filter: a level for leasehold's own lines, or target=level with commas"),
    setting("log_format", Kind::Text, Some("text"), "text, or json for machines"),
];

fn lookup(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

/// A table of all settings in Markdown, for the documentation.
pub fn reference() -> String {
    let mut text = String::from("| variable | default | |\n|---|---|---|\n");
    for setting in SETTINGS {
        let default = setting.default.map(|value| format!("`{value}`")).unwrap_or_default();
        text += &format!("| `{}` | {default} | {} |\n", setting.variable(), setting.help);
    }
    text
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// Which database a URL names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// PostgreSQL.
    Postgres,
    /// SQLite.
    Sqlite,
}

/// A database URL. `Debug` and `Display` show neither password nor parameters.
#[derive(Clone)]
pub struct DatabaseUrl {
    /// What it names.
    pub database: Database,
    url: SecretString,
}

impl std::str::FromStr for DatabaseUrl {
    type Err = SettingsError;

    fn from_str(text: &str) -> Result<Self, SettingsError> {
        Self::parse(text).ok_or_else(|| SettingsError(vec!["not a database URL".to_owned()]))
    }
}

impl DatabaseUrl {
    fn parse(text: &str) -> Option<Self> {
        let database = if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            Database::Postgres
        } else {
            let file = text.strip_prefix("sqlite:")?.trim_start_matches('/');
            let file = file.split('?').next().unwrap_or_default();
            // An outbox in memory would be lost, and each connection would have its own.
            if file.is_empty() || file == ":memory:" {
                return None;
            }
            Database::Sqlite
        };
        Some(Self { database, url: text.to_owned().into() })
    }

    /// The URL with its password: to connect, never to show.
    pub fn expose(&self) -> &str {
        self.url.expose_secret()
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.expose();
        let (scheme, rest) = url.split_once(':').unwrap_or((url, ""));
        let head = rest.split('?').next().unwrap_or_default();
        match (self.database, head.rsplit_once('@')) {
            (Database::Sqlite, _) => write!(f, "{scheme}:{head}"),
            (Database::Postgres, Some((_, place))) => write!(f, "{scheme}://…@{place}"),
            // An @ among the parameters: it can't be told where a password ends.
            (Database::Postgres, None) if rest.contains('@') => write!(f, "{scheme}://…"),
            (Database::Postgres, None) => write!(f, "{scheme}:{head}"),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({self})")
    }
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
    /// Where health, metrics and status are served, if they are.
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

/// Parses a duration: a whole number and `ms`, `s`, `m` or `h`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3_600).map(Duration::from_secs),
        _ => None,
    }
}

/// Parses a size in bytes: a whole number, alone or with `B`, `KiB`, `MiB` or `GiB`.
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = number.parse().ok()?;
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// Whether a variable is one that Kubernetes injects for a service named `leasehold…`: no setting, and no mistake.
fn is_kubernetes(variable: &str) -> bool {
    let after_port = |rest: &str| {
        let (number, rest) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
        !number.is_empty() && rest.starts_with('_')
    };
    variable.ends_with("_SERVICE_HOST")
        || variable.ends_with("_PORT")
        || variable.contains("_SERVICE_PORT_")
        || variable.match_indices("_PORT_").any(|(at, part)| after_port(&variable[at + part.len()..]))
}

/// A value and where it came from.
struct Given {
    text: String,
    origin: Origin,
}

struct Reader<'a> {
    sources: &'a Sources<'a>,
    given: BTreeMap<&'static str, Given>,
    problems: Vec<String>,
}

/// Parses the settings. Pure but for [`Sources::read`].
///
/// An empty variable counts as one that is not set, as deployment tools write it.
///
/// # Errors
/// Every mistake at once, each naming the key, the value (unless it may be secret) and what is allowed.
pub fn parse(sources: &Sources<'_>, needs: Needs) -> Result<Settings, SettingsError> {
    let mut reader = Reader { sources, given: BTreeMap::new(), problems: Vec::new() };
    reader.gather();
    let settings = reader.settings(needs);
    match settings {
        Some(settings) if reader.problems.is_empty() => Ok(settings),
        _ => Err(SettingsError(reader.problems)),
    }
}

impl Reader<'_> {
    /// Lays the sources over each other, the weakest first.
    fn gather(&mut self) {
        for setting in SETTINGS {
            if let Some(default) = setting.default {
                self.give(setting, default.to_owned(), Origin::Default);
            }
        }
        if let Some((_, text)) = &self.sources.file {
            self.gather_file(text);
        }
        for (variable, value) in &self.sources.environment {
            match SETTINGS.iter().find(|setting| setting.variable() == *variable) {
                Some(setting) if !value.is_empty() => self.give(setting, value.clone(), Origin::Environment),
                Some(_) => {}
                None if variable.starts_with(PREFIX) && !is_kubernetes(variable) => {
                    let known = SETTINGS.iter().map(Setting::variable);
                    self.problems
                        .push(format!("{variable} is not a setting{}", did_you_mean(variable, known)));
                }
                None => {}
            }
        }
        for (name, value) in &self.sources.flags {
            match lookup(name) {
                Some(setting) => self.give(setting, value.clone(), Origin::Flag),
                None => self.problems.push(format!("--{} is not a setting", name.replace('_', "-"))),
            }
        }
    }

    fn gather_file(&mut self, text: &str) {
        let name = self.file_name().to_owned();
        let table = match text.parse::<toml::Table>() {
            Ok(table) => table,
            Err(error) => {
                // The error's own text quotes the line, which may hold a secret.
                let start = error.span().map_or(0, |span| span.start).min(text.len());
                let line = 1 + text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count();
                self.problems.push(format!("{name}, line {line}, is not TOML: {}", error.message()));
                return;
            }
        };
        for (key, value) in table {
            let Some(setting) = lookup(&key) else {
                let known = SETTINGS.iter().map(|setting| setting.name.to_owned());
                self.problems.push(format!("{key} in {name} is not a setting{}", did_you_mean(&key, known)));
                continue;
            };
            match toml_text(&value) {
                Some(text) => self.give(setting, text, Origin::File),
                None => self.problems.push(format!(
                    "{key} in {name} is a {}; allowed is {}",
                    value.type_str(),
                    setting.kind.allowed()
                )),
            }
        }
    }

    fn file_name(&self) -> &str {
        self.sources.file.as_ref().map_or(DEFAULT_FILE, |(name, _)| name)
    }

    fn give(&mut self, setting: &'static Setting, text: String, origin: Origin) {
        self.given.insert(setting.name, Given { text, origin });
    }

    /// The key as it was written, wherever that was.
    fn key(&self, name: &str) -> String {
        let origin = self.given.get(name).map_or(Origin::Default, |given| given.origin);
        match (lookup(name), origin) {
            (Some(_), Origin::File) => format!("{name} in {}", self.file_name()),
            (Some(setting), Origin::Environment) => setting.variable(),
            (Some(setting), Origin::Flag) => format!("--{}", setting.flag()),
            _ => name.to_owned(),
        }
    }

    fn refuse(&mut self, name: &str, allowed: &str) {
        let key = self.key(name);
        let secret = lookup(name).is_some_and(|setting| setting.kind.is_secret());
        let value = match self.given.get(name) {
            Some(given) if !secret => format!("{:?}", given.text),
            _ => "not valid (its value is not shown)".to_owned(),
        };
        self.problems.push(format!("{key} is {value}; allowed is {allowed}"));
    }

    /// A value by its own parser: `Ok(None)` if it isn't set, `Err` if it is wrong, which is then noted.
    fn optional<T>(
        &mut self,
        name: &str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ()> {
        let Some(given) = self.given.get(name) else { return Ok(None) };
        let value = parse(given.text.trim());
        if value.is_none() {
            self.refuse(name, allowed);
        }
        value.map(Some).ok_or(())
    }

    /// A value that has a default in the table; `None` if it is wrong, which is then noted.
    fn value<T>(&mut self, name: &str, allowed: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.optional(name, allowed, parse).ok().flatten()
    }

    fn duration(&mut self, name: &str) -> Option<Duration> {
        self.value(name, Kind::Duration.allowed(), parse_duration)
    }

    fn number(&mut self, name: &str, least: u32, most: u32) -> Option<u32> {
        let allowed = format!("{least} to {most}");
        self.value(name, &allowed, |text| text.parse().ok().filter(|n| (least..=most).contains(n)))
    }

    fn bool(&mut self, name: &str) -> Option<bool> {
        self.value(name, Kind::Bool.allowed(), |text| text.parse().ok())
    }

    fn size(&mut self, name: &str, allowed: &str, least: u64, most: u64) -> Option<u32> {
        let parse = |text: &str| parse_size(text).filter(|size| (least..=most).contains(size));
        self.value(name, allowed, parse).and_then(|size| size.try_into().ok())
    }

    fn list<T>(&mut self, name: &str, allowed: &str, parse: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
        let items = |text: &str| {
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(&parse).collect::<Option<_>>()
        };
        self.optional(name, allowed, items).ok().map(Option::unwrap_or_default)
    }

    /// Everything is read before anything is given up, so that every mistake is found.
    fn settings(&mut self, needs: Needs) -> Option<Settings> {
        let database = self.optional("database_url", Kind::DatabaseUrl.allowed(), DatabaseUrl::parse);
        if needs.database && database.as_ref().is_ok_and(Option::is_none) {
            let allowed = Kind::DatabaseUrl.allowed();
            self.problems.push(format!("DATABASE_URL is not set; allowed is {allowed}"));
        }
        let worker = self.worker(database.as_ref().ok().and_then(Option::as_ref));
        let http = self.http(needs.secrets);
        let prepared_statements = self.bool("prepared_statements");
        let name = |text: &str| {
            let fits = (1..=200).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
            fits.then(|| text.to_owned())
        };
        let worker_name = self.optional("worker_name", "1 to 200 visible ASCII characters", name);
        let max_attempts = self.number("max_attempts", 1, i32::MAX.unsigned_abs());
        let max_payload = self.size("max_payload", "1 to 8MiB", 1, 8 << 20);
        let retain = self.retain(database.as_ref().ok().and_then(Option::as_ref));
        let address = "an address and port such as 127.0.0.1:9090";
        let admin_addr = self.optional("admin_addr", address, |text| text.parse().ok());
        let filter = self.value("log", "a level (error, warn, info, debug, trace) or target=level", |text| {
            EnvFilter::builder().parse(text).is_ok().then(|| text.to_owned())
        });
        let format = self.value("log_format", "text or json", |text| match text {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        });
        Some(Settings {
            database: database.ok()?,
            prepared_statements: prepared_statements?,
            worker_name: worker_name.ok()?.unwrap_or_else(|| host_worker_name(&self.sources.host_name)),
            worker: worker?,
            http: http?,
            max_attempts: max_attempts?.try_into().ok()?,
            max_payload: max_payload?,
            retain: retain?,
            admin_addr: admin_addr.ok()?,
            log: LogSettings { filter: filter?, format: format? },
            shown: self.shown(),
        })
    }

    fn retain(&mut self, database: Option<&DatabaseUrl>) -> Option<Retain> {
        let most = Duration::from_secs(876_000 * 3_600);
        let keep_for = self.value("retain_for", "a duration from 1m to 876000h", |text| {
            parse_duration(text).filter(|duration| (SETTLED_FOR..=most).contains(duration))
        });
        let kind = self.value("retain", "keep, archive or delete", |text| match text {
            "keep" => Some((|_| Retain::Keep) as fn(Duration) -> Retain),
            "archive" => Some(Retain::Archive),
            "delete" => Some(Retain::Delete),
            _ => None,
        });
        let retain = kind?(keep_for?);
        if matches!(retain, Retain::Archive(_))
            && database.is_some_and(|url| url.database == Database::Sqlite)
        {
            self.refuse("retain", "keep or delete on SQLite");
            return None;
        }
        Some(retain)
    }

    fn timing(&mut self, database: Option<&DatabaseUrl>) -> Option<Timing> {
        let lease = self.duration("lease");
        let [heartbeat, store_timeout, fence_margin, reclaim_grace] =
            ["heartbeat", "store_timeout", "fence_margin", "reclaim_grace"]
                .map(|name| self.optional(name, Kind::Duration.allowed(), parse_duration));
        let raw = RawTiming {
            lease: lease?,
            heartbeat: heartbeat.ok()?,
            store_timeout: store_timeout.ok()?,
            fence_margin: fence_margin.ok()?,
            reclaim_grace: reclaim_grace.ok()?,
        };
        if database.is_some_and(|url| url.database == Database::Sqlite) && raw.lease < Duration::from_secs(2)
        {
            self.refuse("lease", "2s or more on SQLite");
            return None;
        }
        let error = match Timing::parse(raw) {
            Ok(timing) => return Some(timing),
            Err(error) => error,
        };
        let name = match error {
            TimingError::Lease(_) => "lease",
            TimingError::Heartbeat(_) => "heartbeat",
            TimingError::StoreTimeout(_) => "store_timeout",
            TimingError::FenceMargin(_) => "fence_margin",
            TimingError::ReclaimGrace(_) => "reclaim_grace",
            TimingError::Rule { .. } => {
                self.problems.push(error.to_string());
                return None;
            }
        };
        self.blame(name, &error);
        None
    }

    /// Notes a machine's error, which names the setting by itself, with the key as it was written.
    fn blame(&mut self, name: &str, error: &impl fmt::Display) {
        let text = error.to_string();
        let key = self.key(name);
        self.problems.push(text.strip_prefix(name).map_or(format!("{key}: {text}"), |rest| key + rest));
    }

    fn worker(&mut self, database: Option<&DatabaseUrl>) -> Option<WorkerSettings> {
        let timing = self.timing(database);
        // The machine has bounds of its own, and they are the ones to be reported.
        let [in_flight, per_destination, claim_batch, reclaim_limit, jitter_bps, budget] = [
            "max_in_flight",
            "max_in_flight_per_destination",
            "claim_batch",
            "reclaim_limit",
            "retry_jitter_bps",
            "retry_budget",
        ]
        .map(|name| self.value(name, Kind::Number.allowed(), |text| text.parse::<u32>().ok()));
        let max_leased = self.optional("max_leased", Kind::Number.allowed(), |text| text.parse::<u32>().ok());
        let [poll_interval, drain_timeout, initial, max, retry_after_max] =
            ["poll_interval", "drain_timeout", "retry_initial", "retry_max", "retry_after_max"]
                .map(|name| self.duration(name));
        let status = |text: &str| text.parse().ok().filter(|status| (300..=599).contains(status));
        let fail_statuses = self.list("fail_statuses", "statuses from 300 to 599 with commas", status);
        let counts = [in_flight, per_destination, claim_batch, reclaim_limit, jitter_bps, budget];
        let durations = [poll_interval, drain_timeout, initial, max, retry_after_max];
        let complete = counts.iter().all(Option::is_some) && durations.iter().all(Option::is_some);
        let (complete, fail_statuses) =
            (complete && fail_statuses.is_some(), fail_statuses.unwrap_or_default());
        // What was refused already has a sound stand-in, so that the rest is checked all the same.
        let hour = Duration::from_secs(3_600);
        let (in_flight, claim_batch) = (in_flight.unwrap_or(1), claim_batch.unwrap_or(1));
        let limits = Limits {
            max_in_flight: in_flight,
            max_in_flight_per_destination: per_destination.unwrap_or(1),
            max_leased: max_leased.ok()?.unwrap_or(in_flight.saturating_add(claim_batch)),
            claim_batch,
            poll_interval: poll_interval.unwrap_or(hour),
            drain_timeout: drain_timeout.unwrap_or(hour),
            reclaim_limit: reclaim_limit.unwrap_or(0),
        };
        let retry = RetryPolicy {
            initial: initial.unwrap_or(Duration::from_millis(1)),
            max: max.unwrap_or(hour * 24 * 365),
            jitter_bps: jitter_bps.unwrap_or(0).try_into().unwrap_or(u16::MAX),
            budget: budget.unwrap_or(0),
            retry_after_max: retry_after_max.unwrap_or(hour),
            fail_statuses: BTreeSet::from_iter(fail_statuses),
        };
        // Without a timing the limits are checked all the same, against one that blames none of them.
        let stand_in = || {
            let shortest = RawTiming {
                lease: Duration::from_secs(1),
                heartbeat: None,
                store_timeout: Some(Duration::from_millis(1)),
                fence_margin: None,
                reclaim_grace: None,
            };
            Timing::parse(shortest).ok()
        };
        let errors: Vec<LimitError> = match WorkerSettings::parse(timing.or_else(stand_in)?, limits, retry, 0)
        {
            Ok(settings) => return timing.filter(|_| complete).map(|_| settings),
            Err(errors) => errors,
        };
        for error in errors {
            self.blame(error.setting(), &error);
        }
        None
    }

    fn http(&mut self, needs_secrets: bool) -> Option<HttpSettings> {
        let secrets = self.secrets(needs_secrets);
        let timeout = |text: &str| parse_duration(text).filter(|d| (1..=86_400_000).contains(&d.as_millis()));
        let [connect_timeout, request_timeout] = ["connect_timeout", "request_timeout"]
            .map(|name| self.value(name, "a duration from 1ms to 24h", timeout));
        let response_cap = self.size("response_cap", "a size up to 1GiB", 0, 1 << 30);
        let sign_hex = self.bool("sign_hex");
        let hex_prefix = self.value("hex_prefix", Kind::Text.allowed(), |text| Some(text.to_owned()));
        let rule = |text: &str| text.parse::<AllowRule>().ok();
        let allowed =
            "CIDRs such as 10.0.0.0/8 and host names such as app or *.internal.example, with commas";
        let addresses = self.list("allow_destinations", allowed, rule);
        let allow_http = self.bool("allow_http");
        let hex_prefix = sign_hex?.then_some(hex_prefix?);
        if let Some(prefix) = &hex_prefix
            && let Err(HttpSettingsError::HexPrefix(_)) = HttpGateway::check_hex_prefix(prefix)
        {
            self.refuse("hex_prefix", "what a header name can begin with, other than webhook");
        }
        Some(HttpSettings {
            connect_timeout: connect_timeout?,
            request_timeout: request_timeout?,
            response_cap: response_cap?.try_into().ok()?,
            secrets: secrets?,
            hex_prefix,
            addresses: addresses?.into_iter().collect(),
            allow_http: allow_http?,
        })
    }

    fn secrets(&mut self, needed: bool) -> Option<Vec<Secret>> {
        let inline = self.given.get("signing_secrets").map(|given| given.text.clone());
        let file = self.given.get("signing_secrets_file").map(|given| PathBuf::from(&given.text));
        let (name, text) = match (inline, file) {
            (Some(_), Some(_)) => {
                let (one, other) = (self.key("signing_secrets"), self.key("signing_secrets_file"));
                self.problems.push(format!("{one} and {other} are both set; allowed is one of them"));
                return None;
            }
            (Some(text), None) => ("signing_secrets", text),
            (None, Some(path)) => match self.sources.read.map(|read| read(&path)) {
                Some(Ok(text)) => ("signing_secrets_file", text),
                Some(Err(error)) => {
                    let key = self.key("signing_secrets_file");
                    self.problems.push(format!("{key} is {:?}, which can't be read: {error}", path));
                    return None;
                }
                None => return Some(Vec::new()),
            },
            (None, None) => ("signing_secrets", String::new()),
        };
        let mut secrets = Vec::new();
        let mut good = true;
        let items = text.split([',', '\n']).map(str::trim).filter(|item| !item.is_empty());
        for (n, item) in items.enumerate() {
            match item.parse() {
                Ok(secret) => secrets.push(secret),
                Err(error) => {
                    good = false;
                    let key = self.key(name);
                    self.problems.push(format!("{key}, entry {}: {error} (its value is not shown)", n + 1));
                }
            }
        }
        if good && needed && secrets.is_empty() {
            let allowed = Kind::Secrets.allowed();
            self.problems.push(format!(
                "LEASEHOLD_SIGNING_SECRETS is not set; allowed is {allowed}, or LEASEHOLD_SIGNING_SECRETS_FILE"
            ));
            return None;
        }
        good.then_some(secrets)
    }

    fn shown(&self) -> Vec<(&'static str, String, Origin)> {
        let show = |setting: &Setting| {
            let given = self.given.get(setting.name)?;
            let text = match setting.kind {
                Kind::DatabaseUrl => DatabaseUrl::parse(&given.text)?.to_string(),
                Kind::Secrets => "(set)".to_owned(),
                _ => given.text.clone(),
            };
            Some((setting.name, text, given.origin))
        };
        SETTINGS.iter().filter_map(show).collect()
    }
}

/// A TOML value as it would be written in the environment.
fn toml_text(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(bool) => Some(bool.to_string()),
        toml::Value::Array(items) => Some(items.iter().map(toml_text).collect::<Option<Vec<_>>>()?.join(",")),
        toml::Value::Float(_) | toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}

fn did_you_mean(unknown: &str, known: impl Iterator<Item = String>) -> String {
    known
        .map(|name| (strsim::damerau_levenshtein(unknown, &name), name))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, name)| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

/// The host name as a worker's name.
fn host_worker_name(host: &str) -> String {
    let name: String = host.chars().filter(char::is_ascii_graphic).take(200).collect();
    if name.is_empty() { "worker".to_owned() } else { name }
}

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

#[cfg(test)]
mod tests;
