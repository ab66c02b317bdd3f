//! What the demo proved, computed from what the receivers and the table recorded.

use std::fmt;

use super::receivers::{Seen, State};
use crate::adapters::store::Status;

/// Events that the crashed worker held, before and after.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Takeover {
    /// Leased to it when it was killed.
    pub(super) orphans: usize,
    /// Of these, delivered under a higher token by another worker.
    pub(super) taken_over: usize,
}

/// The demo's result.
#[derive(Debug)]
pub(super) struct Verdict {
    events: usize,
    requests: usize,
    repeated: usize,
    most_open: usize,
    bad: u64,
    status: Status,
    takeover: Takeover,
    beyond_lease: usize,
}

impl Verdict {
    pub(super) fn compute(
        events: usize,
        state: &State,
        status: Status,
        takeover: Takeover,
        lease: std::time::Duration,
    ) -> Self {
        let all = || state.requests.values().flatten();
        let long =
            |seen: &&Seen| seen.closed.is_some_and(|closed| closed.duration_since(seen.opened) > lease);
        Self {
            events,
            requests: all().count(),
            repeated: state.requests.values().filter(|seen| answered_twice(seen)).count(),
            most_open: state.requests.values().map(|seen| most_open(seen)).max().unwrap_or(0),
            bad: state.bad,
            status,
            takeover,
            beyond_lease: all().filter(long).count(),
        }
    }

    /// Whether the promise held.
    pub(super) fn held(&self) -> bool {
        self.status.delivered == self.events as u64
            && self.status.pending == 0
            && self.status.failed == 0
            && self.most_open <= 1
            && self.bad == 0
            && self.takeover.taken_over == self.takeover.orphans
            && self.takeover.orphans > 0
    }
}

fn answered_twice(seen: &[Seen]) -> bool {
    seen.iter().filter(|seen| seen.status.is_some_and(|status| (200..300).contains(&status))).count() > 1
}

/// The most requests that were open at the same time for one event.
fn most_open(seen: &[Seen]) -> usize {
    let open_at = |at| {
        seen.iter()
            .filter(|other| other.opened <= at && other.closed.is_none_or(|closed| closed > at))
            .count()
    };
    seen.iter().map(|seen| open_at(seen.opened)).max().unwrap_or(0)
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, what: &str, value: String, note: &str| {
            writeln!(f, "  {what:<44} {value:>9}   {note}")
        };
        writeln!(f, "verdict")?;
        line(f, "events delivered", format!("{}/{}", self.status.delivered, self.events), "by the table")?;
        line(
            f,
            "requests",
            self.requests.to_string(),
            "by the receivers; the rest are retries and takeovers",
        )?;
        line(
            f,
            "requests that outlasted the lease",
            self.beyond_lease.to_string(),
            "kept alive by heartbeats",
        )?;
        line(
            f,
            "requests open at once for one event, at most",
            self.most_open.to_string(),
            "more than 1 breaks the promise",
        )?;
        line(
            f,
            "events answered 2xx more than once",
            self.repeated.to_string(),
            "the killed worker's, answered but not yet settled",
        )?;
        let takeover = format!("{}/{}", self.takeover.taken_over, self.takeover.orphans);
        line(f, "reclaims after the crash", takeover, "events that the killed worker held")?;
        line(f, "requests with a bad signature", self.bad.to_string(), "")?;
        let word = if self.held() { "THE PROMISE HELD" } else { "THE PROMISE DID NOT HOLD" };
        write!(f, "{word}")
    }
}
