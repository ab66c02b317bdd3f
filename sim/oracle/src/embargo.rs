//! **S2** by rule P10: who lived through an outage of the database gets to renew or settle first.

use crate::fact::Micros;
use crate::{Oracle, Sometimes};

/// How far the times of a real driver's facts may be from those at which its machine was told.
const LOOSE: u64 = 10_000;

/// The database is back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Return {
    pub(crate) at: Micros,
    /// Since when it had been down.
    pub(crate) down_at: Micros,
    /// Another server, which has been up for long.
    pub(crate) standby: bool,
}

/// What a worker's own calls tell it of outages. Only its first one is judged: an embargo is not begun again before a
/// search was made, which is no fact.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outage {
    /// When the last call was sent that had an answer.
    answered: Micros,
    /// Of the calls since then, when the first was sent and the last was given up.
    missed: Option<(Micros, Micros)>,
    /// When the first outage of `H` or more was over.
    over: Option<Micros>,
    /// There may have been one before it.
    unsure: bool,
}

impl Oracle {
    /// A call was sent. Answers whether that was in an outage of `H` or more.
    pub(crate) fn is_cut_off(&self, worker: u32) -> bool {
        let outage = &self.workers[worker as usize].outage;
        outage.over.is_none() && !outage.unsure && self.missed_for_long(worker) == Some(true)
    }

    /// Whether a worker's calls have failed for `H`; `None` is perhaps.
    fn missed_for_long(&self, worker: u32) -> Option<bool> {
        let book = &self.workers[worker as usize];
        let Some((first, last)) = book.outage.missed else { return Some(false) };
        let (took, heartbeat) = (last - first, self.terms_of(worker).heartbeat);
        let error = self.clock_error(worker, first) + book.set_back + LOOSE;
        if took >= heartbeat + error {
            Some(true)
        } else if took + error < heartbeat {
            Some(false)
        } else {
            None
        }
    }

    pub(crate) fn call_missed(&mut self, worker: u32, sent: Micros) {
        let now = self.now;
        let outage = &mut self.workers[worker as usize].outage;
        // A store that has answered a call sent later was not down.
        let sent = sent.max(outage.answered);
        let first = outage.missed.map_or(sent, |(first, _)| first.min(sent));
        outage.missed = Some((first, now));
    }

    pub(crate) fn call_met(&mut self, worker: u32, sent: Micros) {
        let long = self.missed_for_long(worker);
        let now = self.now;
        let outage = &mut self.workers[worker as usize].outage;
        (outage.answered, outage.missed) = (sent, None);
        match long {
            Some(false) => {}
            Some(true) if !outage.unsure && outage.over.is_none() => {
                outage.over = Some(now);
                self.stats.saw(Sometimes::OutageOver);
            }
            Some(true) | None => outage.unsure = true,
        }
    }

    /// A refusal for good is an answer that the worker does not take for the end of an outage.
    pub(crate) fn call_refused(&mut self, worker: u32) {
        self.workers[worker as usize].outage.unsure = true;
    }

    /// Whether a worker's claim takes an expired lease that rule P10 keeps it from.
    pub(crate) fn under_embargo(&self, worker: u32, call: u32, began: Micros) -> bool {
        self.after_a_return(worker, began) || self.after_an_outage(worker, call)
    }

    /// A worker begins no embargo while one lasts, so that of those that knew the database before only their first is
    /// judged; who is new asks a server that was started again how long it has been up, and of a standby knows nothing.
    fn after_a_return(&self, worker: u32, began: Micros) -> bool {
        let Some(last) = self.returns.last() else { return false };
        let (book, terms) = (&self.workers[worker as usize], self.terms_of(worker));
        let first = self.returns.len() == 1
            && book.met_store.is_some_and(|met| met < last.down_at)
            && book.first_miss.is_none_or(|at| at + terms.store_timeout >= last.down_at);
        let embargo = if last.standby && !first { 0 } else { terms.lease };
        began + self.clock_error(worker, last.at) < last.at + embargo
    }

    /// An outage that the database itself knows nothing of.
    fn after_an_outage(&self, worker: u32, call: u32) -> bool {
        let (book, terms) = (&self.workers[worker as usize], self.terms_of(worker));
        let call = &self.calls[call as usize];
        let embargo = |over: Micros| {
            let error = self.clock_error(worker, over) + book.set_back + LOOSE;
            call.sent >= over && call.sent + error < over + terms.lease
        };
        self.returns.is_empty() && (call.cut_off || book.outage.over.is_some_and(embargo))
    }
}
