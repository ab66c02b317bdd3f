//! Database URLs, which hold passwords.

use std::fmt;

use secrecy::{ExposeSecret as _, SecretString};

use crate::adapters::postgres::Postgres;
use crate::adapters::sqlite::Sqlite;

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

impl DatabaseUrl {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let database = if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            Database::Postgres
        } else {
            let file = text.strip_prefix("sqlite:")?.trim_start_matches('/');
            let file = file.split('?').next().unwrap_or_default();
            // An outbox in memory would be lost, and each connection would have its own.
            if file.is_empty() || file == ":memory:" || text.contains("mode=memory") {
                return None;
            }
            Database::Sqlite
        };
        Some(Self { database, url: text.to_owned().into() })
    }

    /// What its driver doesn't understand of it; no password.
    pub(super) fn problem(&self) -> Option<String> {
        let read = match self.database {
            Database::Postgres => Postgres::check_url(self.expose()),
            Database::Sqlite => Sqlite::check_url(self.expose()),
        };
        read.err()
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
