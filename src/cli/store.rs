//! The outbox that a URL names, for the commands that don't care which it is.

use std::sync::Arc;
use std::time::Duration;

use super::settings::{Database, DatabaseUrl};
use crate::adapters::postgres::{Postgres, PostgresOptions};
use crate::adapters::sqlite::{Sqlite, SqliteOptions};
use crate::adapters::store::{NewEvent, Page, Retain, Retired, Status, StoreError};
use crate::machine::{ClaimRequest, ClaimTerms, LeaseKey, OwnedRequest, StoreFault, WorkerId};
use crate::ports::Outbox as _;

/// How long a command waits for its database.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Either store.
#[derive(Clone, Debug)]
pub enum Store {
    /// Postgres.
    Postgres(Arc<Postgres>),
    /// SQLite.
    Sqlite(Arc<Sqlite>),
}

impl Store {
    /// Opens the store of a URL: for a worker with its `store_timeout`, for a command without. A file of SQLite is made
    /// only to set the outbox up, so that a misspelt name is noticed.
    ///
    /// # Errors
    /// When the URL can't be read, or the SQLite file not opened.
    pub async fn open(
        url: &DatabaseUrl,
        store_timeout: Option<Duration>,
        max_payload: u64,
        prepared_statements: bool,
        create: bool,
    ) -> Result<Self, StoreError> {
        let store_timeout = store_timeout.unwrap_or(COMMAND_TIMEOUT);
        Ok(match url.database {
            Database::Postgres => {
                let options = PostgresOptions { store_timeout, max_payload, prepared_statements };
                Self::Postgres(Arc::new(Postgres::new(url.expose(), options)?))
            }
            Database::Sqlite => {
                let options = SqliteOptions::new(store_timeout, max_payload);
                Self::Sqlite(Arc::new(Sqlite::open(url.expose(), options, create).await?))
            }
        })
    }

    /// Applies what is missing of the migrations.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        match self {
            Self::Postgres(store) => store.migrate().await,
            Self::Sqlite(store) => store.migrate().await,
        }
    }

    /// Fails with what to do if the schema is missing or too old.
    ///
    /// # Errors
    /// [`StoreError::Schema`], or what kept it from looking.
    pub async fn check_schema(&self) -> Result<(), StoreError> {
        match self {
            Self::Postgres(store) => store.check_schema().await,
            Self::Sqlite(store) => store.check_schema().await,
        }
    }

    /// Inserts events, all or none; returns their ids in order.
    ///
    /// # Errors
    /// When the database refuses any of them.
    pub async fn enqueue(&self, events: &[NewEvent]) -> Result<Vec<String>, StoreError> {
        match self {
            Self::Postgres(store) => store.enqueue(events).await,
            Self::Sqlite(store) => store.enqueue(events).await,
        }
    }

    /// Counts the events. The server gives up a little before `within`.
    ///
    /// # Errors
    /// When the database can't be read or has no schema.
    pub async fn status(&self, within: Duration) -> Result<Status, StoreError> {
        match self {
            Self::Postgres(store) => store.status(within).await,
            Self::Sqlite(store) => store.status().await,
        }
    }

    /// Moves or deletes the delivered events of a page that are old enough.
    ///
    /// # Errors
    /// When the database refuses; nothing of the page has been done then.
    pub async fn retire(&self, retain: Retain, page: Page) -> Result<Retired, StoreError> {
        match self {
            Self::Postgres(store) => store.retire(retain, page).await,
            Self::Sqlite(store) => store.retire(retain, page).await,
        }
    }

    /// Drops the days of the archive that are over for longer than `keep_for`. SQLite has no archive.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn drop_days(&self, keep_for: Duration) -> Result<(), StoreError> {
        match self {
            Self::Postgres(store) => store.drop_days(keep_for).await,
            Self::Sqlite(_) => Ok(()),
        }
    }

    /// Claims nothing, which needs every right and every function that a worker's claims do.
    ///
    /// # Errors
    /// What would keep a worker from claiming.
    pub async fn rehearse(&self) -> Result<(), StoreFault> {
        let nothing = ClaimRequest {
            owner: WorkerId::new("check"),
            terms: ClaimTerms {
                lease: COMMAND_TIMEOUT,
                grace: Duration::ZERO,
                expired: true,
                reclaim_limit: 0,
                retry_budget: 0,
                valid_until: None,
            },
            limit: 0,
            incarnation: None,
            probation: 0,
            share: 0,
            shares: Vec::new(),
            from: None,
            leases_from: None,
            count_pending: false,
            asleep: None,
        };
        match self {
            Self::Postgres(store) => store.claim(nothing).await.map(drop),
            Self::Sqlite(store) => store.claim(nothing).await.map(drop),
        }
    }

    /// The rights that retiring delivered events needs and a worker's role doesn't have, for `check`. SQLite has none.
    ///
    /// # Errors
    /// When the database can't be asked.
    pub async fn lacks_to_retire(&self, retain: Retain) -> Result<Option<String>, StoreError> {
        match self {
            Self::Postgres(store) => store.lacks_to_retire(retain).await,
            Self::Sqlite(_) => Ok(None),
        }
    }

    /// The leases that the store shows under a worker.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn leases_of(&self, owner: WorkerId) -> Result<Vec<LeaseKey>, StoreFault> {
        let request = OwnedRequest { owner };
        let shown = match self {
            Self::Postgres(store) => store.owned(request).await,
            Self::Sqlite(store) => store.owned(request).await,
        };
        Ok(shown?.keys)
    }

    /// What the database is, for `check`.
    ///
    /// # Errors
    /// When it can't be reached.
    pub async fn describe(&self) -> Result<String, StoreError> {
        Ok(match self {
            Self::Postgres(store) => format!("Postgres {}", store.server_version().await?),
            Self::Sqlite(_) => "SQLite (one host, one writer)".to_owned(),
        })
    }
}
