//! Observations as log lines: the one place that words them. No payload, secret or full URL is ever in them.
//!
//! Levels: error, an operator must act; warn, the promise is at risk; info, the life of the process and one line a
//! cycle; debug, each event.

pub mod metrics;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use crate::machine::{HeartbeatEnd, LeaseKey, Observation, SettleKind, StoreCall, StoreFault, WorkerId};
use crate::ports::{Events, Observer};

/// How many event ids a line about a whole statement names.
const IDS_IN_A_LINE: usize = 10;

/// How often it is said that the same still fails.
const AGAIN: Duration = Duration::from_secs(600);

/// Failures of one kind since it last worked.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    number: u64,
    /// When it was last said aloud.
    said: Option<Instant>,
}

impl Failures {
    /// Another one: how many there are now, and whether it is to be said aloud.
    pub(crate) fn another(&mut self, now: Instant) -> (u64, bool) {
        self.number += 1;
        let aloud = self.said.is_none_or(|said| now.duration_since(said) >= AGAIN);
        if aloud {
            self.said = Some(now);
        }
        (self.number, aloud)
    }
}

/// Writes observations to the log.
#[derive(Debug)]
pub struct Telemetry {
    worker: WorkerId,
    /// Only the first is said aloud, and one from time to time, as the rest would drown everything else. Refusals
    /// (`true`) are counted apart: they open no outage, so that no recovery ends them.
    failures: BTreeMap<(StoreCall, bool), Failures>,
}

impl Telemetry {
    /// For the lines of one worker.
    pub fn new(worker: WorkerId) -> Self {
        Self { worker, failures: BTreeMap::new() }
    }

    /// Keeps the count of failures; if this is one, how many of its kind there have been, and whether to say it aloud.
    fn count(&mut self, observation: &Observation, now: impl FnOnce() -> Instant) -> (u64, bool) {
        match observation {
            Observation::StoreCallFailed { call, fault, .. } => {
                let refused = matches!(fault, StoreFault::Permanent { .. });
                return self.failures.entry((*call, refused)).or_default().another(now());
            }
            Observation::StoreRecovered { .. } => self.failures.clear(),
            // Claims bring something, so that the next refusal is news.
            Observation::Cycle(_) => self.failures.retain(|(_, refused), _| !*refused),
            _ => {}
        }
        (0, false)
    }
}

/// At the level that the fault of a failed store call asks for.
macro_rules! say {
    ($fault:expr, $aloud:expr, $($line:tt)*) => {
        match $fault {
            // Refused for good: nothing but an operator can change that.
            StoreFault::Permanent { .. } if $aloud => error!($($line)*),
            _ if $aloud => warn!($($line)*),
            _ => debug!($($line)*),
        }
    };
}

fn ids(keys: &[LeaseKey], events: &Events) -> String {
    let mut ids: Vec<&str> =
        keys.iter().take(IDS_IN_A_LINE).map(|key| events.id(*key).unwrap_or("?")).collect();
    if keys.len() > IDS_IN_A_LINE {
        ids.push("…");
    }
    ids.join(",")
}

impl Observer for Telemetry {
    fn observe(&mut self, observation: &Observation, events: &Events) {
        let (failures, aloud) = self.count(observation, Instant::now);
        let worker = self.worker.as_str();
        // In a line's own fields, which are worked out only where its level is on.
        let id = |key: LeaseKey| events.id(key).unwrap_or("?");
        match observation {
            Observation::Cycle(cycle) => info!(
                worker,
                claimed = cycle.claimed,
                reclaimed = cycle.reclaimed,
                delivered = cycle.delivered,
                retried = cycle.retried,
                failed = cycle.failed + cycle.failed_by_claim,
                released = cycle.released,
                lost = cycle.lost,
                took_ms = cycle.took.as_millis() as u64,
                "cycle"
            ),
            Observation::StoreCallFailed { call: StoreCall::Claim, fault, .. } => {
                say!(fault, aloud, worker, error = %fault, failures, "claiming failed; trying again at every poll");
            }
            Observation::StoreCallFailed { call: StoreCall::Owned, fault, .. } => {
                say!(
                    fault,
                    aloud,
                    worker,
                    error = %fault,
                    failures,
                    "could not look for what an unknown claim left; nothing is claimed until that works"
                );
            }
            Observation::StoreCallFailed { call: StoreCall::Renew, fault, keys } => {
                let (leases, events) = (keys.len(), ids(keys, events));
                say!(fault, aloud, worker, error = %fault, failures, leases, events, "renewal failed; trying again");
            }
            Observation::StoreCallFailed { call: StoreCall::Settle, fault, keys } => {
                let (leases, events) = (keys.len(), ids(keys, events));
                say!(fault, aloud, worker, error = %fault, failures, leases, events, "settle failed; trying again");
            }
            Observation::StoreRecovered { after } => {
                info!(worker, after_ms = after.as_millis() as u64, "the store answers again");
            }
            Observation::HeartbeatEnded { key, why } => {
                macro_rules! ended {
                    ($level:ident) => {
                        $level!(worker, event = id(*key), lease = %key, why = end_word(*why), "heartbeat ended")
                    };
                }
                match why {
                    HeartbeatEnd::Settled => ended!(debug),
                    HeartbeatEnd::Drained => ended!(info),
                    HeartbeatEnd::Lost | HeartbeatEnd::Fenced => ended!(warn),
                    HeartbeatEnd::Abandoned => ended!(error),
                }
            }
            Observation::Fenced { key, open } => {
                warn!(worker, event = id(*key), lease = %key, open, "lease fenced: it could not be renewed in time");
            }
            Observation::ClockRanAhead { by } => {
                warn!(
                    worker,
                    by_ms = by.as_millis() as u64,
                    "the database's clock ran ahead: every lease is fenced"
                );
            }
            Observation::Settled { key, kind, status, repeated } => {
                let outcome = settle_word(*kind);
                debug!(worker, event = id(*key), lease = %key, outcome, status, repeated, "settled");
            }
            Observation::SettleRefused { key, kind: SettleKind::Delivered } => warn!(
                worker,
                event = id(*key),
                lease = %key,
                "a success could not be settled since the lease is lost: the event goes out again"
            ),
            Observation::SettleRefused { key, kind } => {
                warn!(worker, event = id(*key), lease = %key, outcome = settle_word(*kind), "settle refused: the lease is lost");
            }
            Observation::SettleAbandoned { key, error } => error!(
                worker,
                event = id(*key),
                lease = %key,
                error,
                "the store refuses this outcome for good: the lease runs out by itself; look at the event's row"
            ),
            Observation::FailedByClaim { row, why } => {
                warn!(worker, row = row.0, reason = why.last_error(), "event failed without a request");
            }
            Observation::Probation { key, reclaims } => warn!(
                worker,
                event = id(*key),
                lease = %key,
                reclaims,
                "event on probation: its leases keep running out, it may be killing workers"
            ),
            Observation::OrphanReleased { key } => {
                info!(worker, lease = %key, "released what a claim of unknown outcome had taken");
            }
            Observation::Embargo(cause) => {
                info!(
                    worker,
                    ?cause,
                    "expired leases are left alone for one lease, so that their holders can renew"
                );
            }
            Observation::DrainBegan { leased, open } => info!(worker, leased, open, "draining"),
            Observation::DrainUnsettled { keys } => {
                let all: Vec<&str> = keys.iter().map(|key| events.id(*key).unwrap_or("?")).collect();
                error!(worker, leases = keys.len(), events = all.join(","), "the drain timed out: unsettled");
            }
            Observation::Unexpected { what } => {
                error!(worker, what, "an input that answers nothing was refused")
            }
            Observation::ClockWentBack { by } => {
                error!(worker, by_us = by.as_micros() as u64, "the worker's own clock went backwards");
            }
        }
    }
}

/// The word for a settle, in logs and metrics.
fn settle_word(kind: SettleKind) -> &'static str {
    match kind {
        SettleKind::Delivered => "delivered",
        SettleKind::Retry => "retry",
        SettleKind::Failed => "failed",
        SettleKind::Release => "release",
    }
}

/// The word for why a heartbeat ended.
fn end_word(end: HeartbeatEnd) -> &'static str {
    match end {
        HeartbeatEnd::Settled => "settled",
        HeartbeatEnd::Drained => "drained",
        HeartbeatEnd::Lost => "lost",
        HeartbeatEnd::Fenced => "fenced",
        HeartbeatEnd::Abandoned => "abandoned",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(call: StoreCall, fault: fn(String) -> StoreFault) -> Observation {
        Observation::StoreCallFailed { call, fault: fault("e".into()), keys: Vec::new() }
    }

    #[test]
    fn a_refusal_hides_no_outage_after_it() {
        let refused = failed(StoreCall::Claim, |error| StoreFault::Permanent { error });
        let unknown = failed(StoreCall::Claim, |error| StoreFault::Unknown { error });
        let look = failed(StoreCall::Owned, |error| StoreFault::NotApplied { error });
        let cycle = Observation::Cycle(Default::default());
        let recovered = Observation::StoreRecovered { after: Default::default() };
        let mut telemetry = Telemetry::new(WorkerId::new("w"));
        for (observation, count) in [
            (&refused, 1),
            (&refused, 2),
            (&unknown, 1),
            (&look, 1),
            (&unknown, 2),
            (&cycle, 0),
            (&unknown, 3),
            (&refused, 1),
            (&recovered, 0),
            (&unknown, 1),
            (&refused, 1),
        ] {
            let said = telemetry.count(observation, Instant::now);
            assert_eq!(said, (count, count == 1), "{observation:?}");
        }
    }

    #[test]
    fn what_goes_on_failing_is_said_again() {
        let refused = failed(StoreCall::Claim, |error| StoreFault::Permanent { error });
        let mut telemetry = Telemetry::new(WorkerId::new("w"));
        let start = Instant::now();
        let said = [0, 1, 599, 600, 601, 1_199, 1_200]
            .map(|after| telemetry.count(&refused, || start + Duration::from_secs(after)).1);
        assert_eq!(said, [true, false, false, true, false, false, true]);
    }
}
