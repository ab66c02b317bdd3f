//! From texts to values. Every mistake is noted, and the next value read.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::database::{Database, DatabaseUrl};
use super::table::{Kind, PREFIX, SETTINGS, Setting, lookup};
use super::{DEFAULT_FILE, LogFormat, LogSettings, Needs, Origin, Settings, SettingsError, Sources};
use crate::adapters::http::{AllowRule, HttpGateway, HttpSettings, Secret};
use crate::adapters::store::{MOST_ATTEMPTS, Retain, SETTLED_FOR};
use crate::machine::{LimitError, Limits, RawTiming, RetryPolicy, Timing, TimingError, WorkerSettings};

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
                    let hint = match variable.as_str() {
                        "LEASEHOLD_DATABASE_URL" => {
                            "; did you mean DATABASE_URL, without a prefix?".to_owned()
                        }
                        "LEASEHOLD_LOG_LEVEL" => "; did you mean LEASEHOLD_LOG?".to_owned(),
                        "LEASEHOLD_CONFIG" => "; did you mean the flag --config?".to_owned(),
                        _ => did_you_mean(variable, SETTINGS.iter().map(Setting::variable)),
                    };
                    self.problems.push(format!("{variable} is not a setting{hint}"));
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
        // The secrets are one setting by two names.
        let origin = |name| self.given.get(name).map(|given| given.origin);
        match origin("signing_secrets").cmp(&origin("signing_secrets_file")) {
            Ordering::Less => drop(self.given.remove("signing_secrets")),
            Ordering::Greater => drop(self.given.remove("signing_secrets_file")),
            Ordering::Equal => {}
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
        if let Ok(Some(url)) = &database
            && let Some(problem) = url.problem()
        {
            self.problems.push(format!("{} can't be read: {problem}", self.key("database_url")));
        }
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
        let max_attempts = self.number("max_attempts", 1, MOST_ATTEMPTS);
        let max_payload = self.size("max_payload", "1 to 8MiB", 1, 8 << 20);
        let retain = self.retain(database.as_ref().ok().and_then(Option::as_ref));
        let address = "an address and port such as 127.0.0.1:9090";
        let admin_addr = self.optional("admin_addr", address, |text| text.parse().ok());
        let filter = self.value("log", "a level (error, warn, info, debug, trace) or target=level", |text| {
            is_filter(text).then(|| text.to_owned())
        });
        let format = self.value("log_format", "text or json", |text| match text {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        });
        let worker = worker?;
        let worker_name = worker_name.ok()?.unwrap_or_else(|| host_worker_name(&self.sources.host_name));
        let shown = self.shown(&worker, &worker_name);
        Some(Settings {
            database: database.ok()?,
            prepared_statements: prepared_statements?,
            worker_name,
            worker,
            http: http?,
            max_attempts: max_attempts?.try_into().ok()?,
            max_payload: max_payload?,
            retain: retain?,
            admin_addr: admin_addr.ok()?,
            log: LogSettings { filter: filter?, format: format? },
            shown,
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
        let complete = lease.is_some()
            && [&heartbeat, &store_timeout, &fence_margin, &reclaim_grace].iter().all(|given| given.is_ok());
        let raw = RawTiming {
            // The longest has room for whatever the others may be.
            lease: lease.unwrap_or(Duration::from_secs(24 * 3_600)),
            heartbeat: heartbeat.unwrap_or_default(),
            store_timeout: store_timeout.unwrap_or_default(),
            fence_margin: fence_margin.unwrap_or_default(),
            reclaim_grace: reclaim_grace.unwrap_or_default(),
        };
        let too_short = database.is_some_and(|url| url.database == Database::Sqlite)
            && (Duration::from_secs(1)..Duration::from_secs(2)).contains(&raw.lease);
        if too_short {
            self.refuse("lease", "2s or more on SQLite");
        }
        let errors = match Timing::parse(raw) {
            Ok(timing) => return (complete && !too_short).then_some(timing),
            Err(errors) => errors,
        };
        for error in errors {
            let name = match error {
                TimingError::Lease(_) => "lease",
                TimingError::Heartbeat(_) => "heartbeat",
                TimingError::StoreTimeout(_) => "store_timeout",
                TimingError::FenceMargin(_) => "fence_margin",
                TimingError::ReclaimGrace { .. } => "reclaim_grace",
                TimingError::Rule { .. } => {
                    if complete {
                        self.problems.push(error.to_string());
                    }
                    continue;
                }
            };
            self.blame(name, &error);
        }
        None
    }

    /// Notes a machine's error, with the key and the value as they were written.
    fn blame(&mut self, name: &str, error: &impl fmt::Display) {
        let text = error.to_string();
        let allowed = text.split_once("; allowed is ").map_or(text.as_str(), |(_, allowed)| allowed);
        self.refuse(name, allowed);
    }

    fn worker(&mut self, database: Option<&DatabaseUrl>) -> Option<WorkerSettings> {
        let timing = self.timing(database);
        // The machine has bounds of its own, and they are the ones to be reported, but for what is no number to it.
        const COUNT: &str = "a whole number from 1 to 1000000";
        let whole = |text: &str| text.parse::<u32>().ok();
        let [in_flight, per_destination, claim_batch, reclaim_limit, jitter_bps, budget] = [
            ("max_in_flight", COUNT),
            ("max_in_flight_per_destination", COUNT),
            ("claim_batch", COUNT),
            ("reclaim_limit", "0 (off) or a whole number from 4 to 4294967295"),
            ("retry_jitter_bps", "a whole number from 0 to 10000"),
            ("retry_budget", "a whole number from 0 to 4294967295"),
        ]
        .map(|(name, allowed)| self.value(name, allowed, whole));
        let max_leased = self.optional("max_leased", COUNT, whole);
        let [poll_interval, drain_timeout, max, retry_after_max] =
            ["poll_interval", "drain_timeout", "retry_max", "retry_after_max"]
                .map(|name| self.duration(name));
        let initial = self.optional("retry_initial", Kind::Duration.allowed(), parse_duration);
        let status = |text: &str| text.parse().ok().filter(|status| (300..=599).contains(status));
        let fail_statuses = self.list("fail_statuses", "statuses from 300 to 599 with commas", status);
        let counts = [in_flight, per_destination, claim_batch, reclaim_limit, jitter_bps, budget];
        let durations = [poll_interval, drain_timeout, max, retry_after_max];
        let complete = counts.iter().all(Option::is_some)
            && durations.iter().all(Option::is_some)
            && max_leased.is_ok()
            && initial.is_ok();
        let (complete, fail_statuses) =
            (complete && fail_statuses.is_some(), fail_statuses.unwrap_or_default());
        // What was refused already has a sound stand-in, so that the rest is checked all the same.
        let hour = Duration::from_secs(3_600);
        let (in_flight, claim_batch) = (in_flight.unwrap_or(1), claim_batch.unwrap_or(1));
        let limits = Limits {
            max_in_flight: in_flight,
            max_in_flight_per_destination: per_destination.unwrap_or(1),
            // A default that follows from others is never what is wrong.
            max_leased: max_leased
                .unwrap_or_default()
                .unwrap_or(in_flight.saturating_add(claim_batch).clamp(1, 1_000_000)),
            claim_batch,
            poll_interval: poll_interval.unwrap_or(hour),
            drain_timeout: drain_timeout.unwrap_or(hour),
            reclaim_limit: reclaim_limit.unwrap_or(0),
        };
        let (least, max) = (Duration::from_millis(1), max.unwrap_or(hour * 24 * 365));
        let retry = RetryPolicy {
            initial: initial.unwrap_or(Some(least)).unwrap_or(Duration::from_secs(5).min(max).max(least)),
            max,
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
        let allowed = "what a header name can begin with, other than webhook";
        let hex_prefix = self.value("hex_prefix", allowed, |text| {
            HttpGateway::check_hex_prefix(text).is_ok().then(|| text.to_owned())
        });
        let rule = |text: &str| text.parse::<AllowRule>().ok();
        let allowed =
            "CIDRs such as 10.0.0.0/8 and host names such as app or *.internal.example, with commas";
        let addresses = self.list("allow_destinations", allowed, rule);
        let allow_http = self.bool("allow_http");
        let hex_prefix = sign_hex?.then_some(hex_prefix?);
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

    /// None are read where none are needed: who counts or enqueues events may not be allowed to see them.
    fn secrets(&mut self, needed: bool) -> Option<Vec<Secret>> {
        if !needed {
            return Some(Vec::new());
        }
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
        if good && secrets.is_empty() {
            let allowed = Kind::Secrets.allowed();
            self.problems.push(format!(
                "LEASEHOLD_SIGNING_SECRETS is not set; allowed is {allowed}, or LEASEHOLD_SIGNING_SECRETS_FILE"
            ));
            return None;
        }
        good.then_some(secrets)
    }

    /// What is set or has a default, be it one that another setting makes.
    fn shown(&self, worker: &WorkerSettings, worker_name: &str) -> Vec<(&'static str, String, Origin)> {
        let (timing, limits) = (worker.timing(), worker.limits());
        let show = |setting: &Setting| {
            let Some(given) = self.given.get(setting.name) else {
                let text = match setting.name {
                    "worker_name" => worker_name.to_owned(),
                    "heartbeat" => format!("{:?}", timing.heartbeat()),
                    "store_timeout" => format!("{:?}", timing.store_timeout()),
                    "fence_margin" => format!("{:?}", timing.fence_margin()),
                    "reclaim_grace" => format!("{:?}", timing.reclaim_grace()),
                    "max_leased" => limits.max_leased.to_string(),
                    "retry_initial" => format!("{:?}", worker.retry().initial),
                    _ => return None,
                };
                return Some((setting.name, text, Origin::Default));
            };
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

/// A level, or directives. A lone word that is no level would be taken for a target and silence all others.
fn is_filter(text: &str) -> bool {
    let known =
        |directive: &str| directive.contains(['=', '[']) || directive.trim().parse::<LevelFilter>().is_ok();
    text.split(',').all(known) && EnvFilter::builder().parse(text).is_ok()
}

/// The host name as a worker's name.
fn host_worker_name(host: &str) -> String {
    let name: String = host.chars().filter(char::is_ascii_graphic).take(200).collect();
    if name.is_empty() { "worker".to_owned() } else { name }
}

/// Parses a duration: a whole number and `ms`, `s`, `m` or `h`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
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
pub(super) fn parse_size(text: &str) -> Option<u64> {
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
