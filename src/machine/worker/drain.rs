//! Ending in order (rule P8).

use alloc::vec::Vec;

use super::super::id::LeaseKey;
use super::super::io::{HeartbeatEnd, Observation};
use super::super::time::Moment;
use super::{Aborting, Ended, Phase, Worker};

/// A drain under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Drain {
    abort_at: Moment,
    end_at: Moment,
    aborting: bool,
    /// Whether the last look at what the store shows under this worker was asked for (rule P7).
    looked: bool,
    pub(super) aborted: u32,
}

impl Worker {
    /// Claims nothing more, releases what was not started, goes on renewing and finishes what is open.
    pub(super) fn shutdown(&mut self) {
        if self.drain.is_some() {
            return;
        }
        let end_at = self.now.after(self.settings.limits().drain_timeout);
        let last = self.timing().store_timeout() * 2;
        let abort_at = if planted!(self, DrainAbortsAtOnce) { self.now } else { end_at.before(last) };
        self.drain = Some(Drain { abort_at, end_at, aborting: false, looked: false, aborted: 0 });
        let leased = u32::try_from(self.leases.len()).unwrap_or(u32::MAX);
        self.observe(Observation::DrainBegan { leased, open: self.open });
        if planted!(self, DrainKeepsQueue) {
            return;
        }
        for key in self.leases_where(|phase| matches!(phase, Phase::Queued { .. })) {
            self.stop(key, Aborting::Drained);
        }
    }

    fn leases_where(&self, wanted: fn(&Phase) -> bool) -> Vec<LeaseKey> {
        self.leases.iter().filter(|(_, held)| wanted(&held.phase)).map(|(key, _)| *key).collect()
    }

    pub(super) fn drain_due_at(&self) -> Moment {
        match &self.drain {
            Some(drain) if !drain.aborting => drain.abort_at,
            Some(drain) if !planted!(self, DrainWaits) => drain.end_at,
            _ => Moment::NEVER,
        }
    }

    /// `2R` before the timeout: aborts the rest.
    pub(super) fn advance_drain(&mut self) {
        let Some(drain) = &mut self.drain else { return };
        if !drain.aborting && drain.abort_at <= self.now {
            drain.aborting = true;
            for key in self.leases_where(|phase| *phase == Phase::Open) {
                self.stop(key, Aborting::Drained);
            }
        }
        // All settled: a last look for what this worker does not know that it owns.
        if self.leases.is_empty()
            && self.neither_claims_nor_looks()
            && let Some(drain) = &mut self.drain
            && !drain.looked
        {
            drain.looked = true;
            self.look_once_more();
        }
    }

    /// The drain ends when nothing is left, or at its timeout whatever the store does.
    pub(super) fn finish_drain(&mut self) {
        let Some(drain) = &self.drain else { return };
        let (aborted, end_at, looked) = (drain.aborted, drain.end_at, drain.looked);
        let done = looked && self.leases.is_empty() && self.claims.idle() && self.looks.done();
        if !done && (end_at > self.now || planted!(self, DrainWaits)) {
            return;
        }
        let keys: Vec<LeaseKey> = self.leases.keys().copied().collect();
        let unsettled = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        if !keys.is_empty() {
            self.observe(Observation::DrainUnsettled { keys: keys.clone() });
        }
        for key in keys {
            self.end_heartbeat(key, HeartbeatEnd::Abandoned);
        }
        self.ended = Some(Ended { aborted, unsettled });
    }
}
