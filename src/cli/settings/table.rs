//! The table of all settings.

pub(super) const PREFIX: &str = "LEASEHOLD_";

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
    pub(super) const fn allowed(self) -> &'static str {
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

    pub(super) const fn is_secret(self) -> bool {
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
    setting("prepared_statements", Kind::Bool, Some("true"), "Off behind poolers in transaction mode, and any that refuse the startup parameter `options`, as pgbouncer"),
    setting("worker_name", Kind::Text, None, "Names the worker; default: the host name. The worker id is this and a random suffix"),
    setting("lease", Kind::Duration, Some("30s"), "L: how long a claim holds; 1s to 24h, on SQLite at least 2s"),
    setting("heartbeat", Kind::Duration, None, "H: how often a held lease is renewed; default: lease / 3"),
    setting("store_timeout", Kind::Duration, None, "R: bounds each call of the database; default: the lesser of lease / 6 and 5s"),
    setting("fence_margin", Kind::Duration, None, "M: how long before its end a lease is fenced; default: lease / 10"),
    setting("reclaim_grace", Kind::Duration, None, "G: how long a lease that ran out is left alone; default: lease / 10"),
    setting("max_in_flight", Kind::Number, Some("256"), "Open requests of this worker"),
    setting("max_in_flight_per_destination", Kind::Number, Some("32"), "Open requests of this worker to one scheme and authority"),
    setting("max_leased", Kind::Number, None, "Leases that this worker holds; default: max_in_flight + claim_batch, at most 1000000"),
    setting("claim_batch", Kind::Number, Some("500"), "Events asked for in one claim"),
    setting("poll_interval", Kind::Duration, Some("250ms"), "The slowest polling"),
    setting("connect_timeout", Kind::Duration, Some("5s"), "Bounds DNS, connect and TLS of a request"),
    setting("request_timeout", Kind::Duration, Some("15s"), "Bounds DNS, connect, TLS and the wait for the status; may outlast the lease"),
    setting("retry_initial", Kind::Duration, None, "The delay after the first failed attempt; doubles with each further one; default: the lesser of retry_max and 5s"),
    setting("retry_max", Kind::Duration, Some("1h"), "The longest such delay"),
    setting("retry_jitter_bps", Kind::Number, Some("2000"), "Jitter of the delays in basis points, 0 to 10000"),
    setting("retry_budget", Kind::Number, Some("0"), "At most so many attempts beyond the first, where the event allows more; 0 is off"),
    setting("retry_after_max", Kind::Duration, Some("24h"), "The longest Retry-After that is honoured"),
    setting("max_attempts", Kind::Number, Some("20"), "Attempts of an event, for enqueue"),
    setting("max_payload", Kind::Size, Some("1MiB"), "The largest payload that is sent; at most 8MiB"),
    setting("response_cap", Kind::Size, Some("64KiB"), "How much of a response's body is read, to reuse the connection; never stored"),
    setting("fail_statuses", Kind::List, None, "Statuses that fail an event at once; default: none"),
    setting("reclaim_limit", Kind::Number, Some("100"), "Lost leases in a row after which an event fails; 0 is off, else more than 3"),
    setting("signing_secrets", Kind::Secrets, None, "whsec_<base64>, with commas; all sign, the first one first: that is rotation"),
    setting("signing_secrets_file", Kind::Text, None, "A file with the same, one a line"),
    setting("sign_hex", Kind::Bool, Some("false"), "Signs by the hex scheme besides: the header <hex_prefix>-Signature is sha256=<hex HMAC-SHA256 of \"timestamp.body\">, by the first secret only"),
    setting("hex_prefix", Kind::Text, Some("X-Webhook"), "What the headers of the hex scheme begin with: <hex_prefix>-Event-Id, -Event-Type, -Timestamp (Unix seconds) and -Signature"),
    setting("allow_destinations", Kind::List, None, "CIDRs and host patterns allowed besides public addresses; default: none"),
    setting("allow_http", Kind::Bool, Some("false"), "Allows http:// destinations"),
    setting("drain_timeout", Kind::Duration, Some("28s"), "How long a shutdown may take; more than 2 * store_timeout"),
    setting("retain", Kind::Text, Some("keep"), "What becomes of delivered events: keep, archive (Postgres) or delete; one that left no longer guards its id against being enqueued again"),
    setting("retain_for", Kind::Duration, Some("720h"), "How long a delivered event is kept: in the outbox before delete, in the archive before its day is dropped; 1m to 876000h"),
    setting("admin_addr", Kind::Text, None, "Where to serve /healthz, /readyz, /metrics, /api/status and a page, without a password"),
    setting("log", Kind::Text, Some("info"), "Log filter: a level for leasehold's own lines, or target=level with commas"),
    setting("log_format", Kind::Text, Some("text"), "text, or json for machines"),
];

pub(super) fn lookup(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}
