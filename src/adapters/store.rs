//! What both stores share: new events, counts, what becomes of delivered events, and the cleaning of text.

use std::time::Duration;

use bytes::Bytes;

use crate::machine::{DestinationKey, Grant, LeaseKey, Unsendable};
use crate::ports::Message;

/// An event to be written into the outbox.
#[derive(Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// The deduplication key; a fresh UUID if `None`.
    pub event_id: Option<String>,
    /// 1 to 255 visible ASCII characters.
    pub event_type: String,
    /// Where it goes.
    pub destination_url: String,
    /// JSON text.
    pub payload: String,
    /// The row's attempt limit; the table's default if `None`.
    pub max_attempts: Option<i32>,
    /// Unix microseconds of the first attempt; now if `None`.
    pub next_attempt_at: Option<i64>,
}

impl std::fmt::Debug for NewEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewEvent").field("event_id", &self.event_id).finish_non_exhaustive()
    }
}

/// How many events are in which state. `pending` = leased + due + waiting; `retrying` = pending with attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Status {
    /// Not terminal.
    pub pending: u64,
    /// Unleased, and its time has come.
    pub due: u64,
    /// Pending with attempts.
    pub retrying: u64,
    /// Under a lease.
    pub leased: u64,
    /// Terminal.
    pub delivered: u64,
    /// Terminal.
    pub failed: u64,
    /// Seconds since `next_attempt_at` of the oldest due event; `None` if nothing is due.
    pub oldest_due_age_seconds: Option<f64>,
}

/// What becomes of delivered events. Failed ones stay in every case, for an operator to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retain {
    /// They stay in the table.
    Keep,
    /// They move to the archive after [`SETTLED_FOR`], and are dropped from there with their day after this long.
    Archive(Duration),
    /// They are deleted after this long.
    Delete(Duration),
}

/// The most attempts that the table lets an event have (constraint `max_attempts_in_bounds`).
pub const MOST_ATTEMPTS: u32 = 1_000_000_000;

/// The longest `destination_url` that is sent to, in bytes. No constraint says so: the table takes what a producer gives.
pub const LONGEST_URL: usize = 64 * 1024;

/// How long a delivered event stays in the table at least: a settle whose answer was lost is repeated, and is to find
/// the row that says so.
pub const SETTLED_FOR: Duration = Duration::from_secs(60);

/// A stretch of the table in the order of ids. Walking it from page to page finds delivered events without an index
/// that every delivery would have to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// The id before the first one; 0 at the start.
    pub after: i64,
    /// How many rows it has at most.
    pub rows: u32,
}

/// What was done with a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retired {
    /// How many events left the table.
    pub events: u64,
    /// Events that the database does not let go, as for a foreign key that names them: how many, and why the first.
    pub kept: Option<String>,
    /// After which id the next page begins: 0 where there is nothing behind this one, or nothing that is old enough.
    pub next: i64,
}

/// How many destinations a claim looks at beyond the front of the queue at most.
pub(crate) const WALK: u32 = 1_000;

/// Where a claim that reaches past destinations which have their share goes on: behind the last one that the claim before
/// it came to. So few seats go to each in turn, and a long walk is made by several claims.
#[derive(Clone, Debug, Default)]
pub(crate) struct Walk<K> {
    /// The last destination that was looked at.
    pub(crate) last: K,
    /// The one at which the lap ends: nothing was found since.
    pub(crate) end: K,
}

impl<K: Clone> Walk<K> {
    /// A claim came to `last`, or to the end of its lap, and found something or not.
    pub(crate) fn went(&mut self, last: Option<K>, found: bool) {
        let lap_is_over = last.is_none();
        self.last = last.unwrap_or_else(|| self.last.clone());
        if lap_is_over || found {
            self.end = self.last.clone();
        }
    }
}

/// Microseconds as the statements take them.
pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// How many bytes of payload one claim returns at most.
pub(crate) const CLAIM_BYTES: i64 = 8 * 1024 * 1024;

/// The longest text that is stored for an error, in characters.
const TEXT_MAX: usize = 1_000;

/// Makes text fit for the store and for a terminal: no NUL, no control characters, bounded length.
pub(crate) fn clean(text: &str) -> String {
    text.chars().take(TEXT_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// An event that doesn't decode: it is unsendable, and harms no other (rule P6).
pub(crate) fn malformed(key: LeaseKey, event_id: String, error: String) -> (Grant, Message) {
    let grant = Grant {
        key,
        destination: DestinationKey::new("malformed"),
        attempts: 0,
        max_attempts: 1,
        reclaims: 0,
        reclaimed: false,
        unsendable: Some(Unsendable::Malformed { error }),
    };
    let message = Message {
        event_id,
        event_type: String::new(),
        destination_url: String::new(),
        payload: Bytes::new(),
    };
    (grant, message)
}

/// Of an event whose `destination_url` a claim leaves out.
pub(crate) fn url_too_long() -> String {
    format!("destination_url is longer than {LONGEST_URL} bytes")
}

/// Why a store could not be opened or read by a command.
#[derive(Debug)]
pub enum StoreError {
    /// The schema is not there, or older than this program.
    Schema {
        /// What is missing.
        missing: String,
    },
    /// An event can't be written; none of those with it were.
    Refused {
        /// Its place among those that were to be written, from 0.
        place: usize,
        /// What is wrong with it, without its contents.
        problem: String,
    },
    /// Anything else: what was being done, and what the database says, without row contents.
    Database {
        /// What was being done.
        doing: &'static str,
        /// The error.
        error: String,
    },
}

impl StoreError {
    pub(crate) fn duplicate(place: usize, error: &str) -> Self {
        Self::Refused { place, problem: format!("an event with that id is in the outbox already: {error}") }
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Schema { missing } => {
                write!(f, "the outbox is not set up ({missing}): run `leasehold migrate` on this database")
            }
            Self::Refused { problem, .. } => f.write_str(problem),
            Self::Database { doing, error } => write!(f, "{doing}: {error}"),
        }
    }
}

impl std::error::Error for StoreError {}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn text_is_cleaned_on_character_boundaries() {
        assert_eq!(clean("a\0b\nc\u{1b}[31m"), "a b c [31m");
        assert_eq!(clean(&"é".repeat(2_000)).chars().count(), 1_000);
    }
}
