//! When a worker had room for a destination: what **L2** presumes.

use std::collections::BTreeMap;

use sqlx::{PgConnection, Row};

/// Twice the cap for one destination.
const SHARE: i32 = 64;

/// Who did nothing for so long may be stopped or cut off.
const AT_WORK: i64 = 500_000;

/// For each destination, the spans of time in which one worker that was at work had room for it all along. Short ones are
/// left out: a seat that comes free between two searches for expired leases goes to a fresh event.
#[derive(Default)]
pub(crate) struct Rooms(BTreeMap<String, Vec<(i64, i64)>>);

/// A worker's leases of one destination, and since when there has been room for more.
#[derive(Default)]
struct Held {
    leases: i32,
    since: Option<i64>,
}

/// What a worker did last, and its leases.
struct Book {
    last: i64,
    held: BTreeMap<String, Held>,
}

impl Rooms {
    /// By the history of leases, whose searches are that far apart.
    pub(crate) async fn of(connection: &mut PgConnection, search: i64) -> Self {
        let rows = sqlx::query(
            "select (extract(epoch from at) * 1000000)::bigint, owner, old_owner, destination
             from chaos.history order by at",
        )
        .fetch_all(connection)
        .await
        .expect("the history");
        let destinations: std::collections::BTreeSet<String> = rows.iter().map(|row| row.get(3)).collect();
        let mut rooms = Self::default();
        let mut note = |destination: &str, held: &mut Held, until: i64| {
            if let Some(since) = held.since.take()
                && until - since > search
            {
                rooms.0.entry(destination.to_owned()).or_default().push((since, until));
            }
        };
        let mut books: BTreeMap<String, Book> = BTreeMap::new();
        for row in &rows {
            let at: i64 = row.get(0);
            let (owner, old_owner): (Option<String>, Option<String>) = (row.get(1), row.get(2));
            let destination: String = row.get(3);
            if let Some(worker) = owner.as_ref().or(old_owner.as_ref()) {
                let book = books.entry(worker.clone()).or_insert_with(|| {
                    let held = destinations.iter().map(|name| (name.clone(), Held::default()));
                    Book { last: i64::MIN, held: held.collect() }
                });
                if at.saturating_sub(book.last) > AT_WORK {
                    for (name, held) in &mut book.held {
                        note(name, held, book.last);
                        held.since = (held.leases < SHARE).then_some(at);
                    }
                }
                book.last = at;
            }
            for (worker, by) in [(owner, 1), (old_owner, -1)] {
                let Some(book) = worker.as_ref().and_then(|worker| books.get_mut(worker)) else { continue };
                let held = book.held.get_mut(&destination).expect("all are known");
                held.leases += by;
                if held.leases >= SHARE {
                    note(&destination, held, at);
                } else {
                    held.since.get_or_insert(at);
                }
            }
        }
        for book in books.values_mut() {
            for (name, held) in &mut book.held {
                note(name, held, book.last);
            }
        }
        rooms
    }

    /// The longest between two moments, in microseconds, that one worker had room for the destination.
    pub(crate) fn longest(&self, destination: &str, begin: i64, end: i64) -> i64 {
        let spans = self.0.get(destination).map_or(&[][..], Vec::as_slice);
        spans.iter().map(|(since, until)| end.min(*until) - begin.max(*since)).max().unwrap_or(0).max(0)
    }
}
