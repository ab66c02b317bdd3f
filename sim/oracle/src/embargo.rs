//! **S2** by rule P10: who lived through an outage of the database gets to renew or settle first.

use crate::fact::{Lane, Micros};
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

/// What a worker's own calls tell it of outages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outage {
    /// When the last call was sent of those that had an answer.
    answered: Micros,
    /// Of the calls that had none since: when the first was sent.
    missed: Option<Micros>,
    /// When the outage was over that the last embargo of this kind came of.
    over: Option<Micros>,
    /// When one may have begun of which this is not sure, or that came of another incarnation: no other is begun while one
    /// lasts.
    unsure: Option<Micros>,
    /// A call was refused for good: an answer that the worker does not take for the end of an outage.
    refused: bool,
    /// How many of the database's returns a claim has shown it.
    returns: usize,
}

impl Oracle {
    /// A call was sent. Answers whether that was in an outage of `H` or more.
    pub(crate) fn is_cut_off(&self, worker: u32) -> bool {
        self.away_for_long(worker, self.now) == Some(true)
    }

    /// Whether a worker's calls had failed for `H` at some time; `None` is perhaps.
    #[inline]
    fn away_for_long(&self, worker: u32, at: Micros) -> Option<bool> {
        let book = &self.workers[worker as usize];
        let Some(first) = book.outage.missed else { return Some(false) };
        if book.outage.refused {
            return None;
        }
        let (took, heartbeat) = (at.saturating_sub(first), self.terms_of(worker).heartbeat);
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
        let outage = &mut self.workers[worker as usize].outage;
        // A store that has answered a call sent later was not down.
        let sent = sent.max(outage.answered);
        outage.missed = Some(outage.missed.map_or(sent, |first| first.min(sent)));
    }

    pub(crate) fn call_met(&mut self, worker: u32, lane: Lane, sent: Micros) {
        let now = self.now;
        let outage = &mut self.workers[worker as usize].outage;
        if outage.missed.is_none() && outage.returns == self.returns.len() {
            // Mostly: nothing was missed, and the database has not been away.
            outage.answered = outage.answered.max(sent);
            return;
        }
        let outage = *outage;
        let mut after = Outage { answered: outage.answered.max(sent), ..outage };
        if outage.missed.is_some_and(|first| first <= sent) {
            after.missed = None;
            let mut begun = outage.unsure.into_iter().chain(outage.over);
            let clear = !outage.refused && begun.all(|began| now >= self.embargo_is_over(worker, began));
            match self.away_for_long(worker, sent) {
                Some(false) => {}
                Some(true) if clear => {
                    after.over = Some(now);
                    self.stats.saw(Sometimes::OutageOver);
                }
                Some(true) | None => after.unsure = after.unsure.max(Some(now)),
            }
        }
        if lane == Lane::Claim && outage.returns < self.returns.len() {
            // It may have been sent to the one server and answered by the other.
            if self.returns.last().is_some_and(|last| last.at <= sent) {
                after.returns = self.returns.len();
            }
            after.unsure = after.unsure.max(Some(now));
        }
        self.workers[worker as usize].outage = after;
    }

    /// When an embargo that began then is surely over.
    fn embargo_is_over(&self, worker: u32, began: Micros) -> Micros {
        let error = self.clock_error(worker, began) + self.workers[worker as usize].set_back + LOOSE;
        began + self.terms_of(worker).lease + error
    }

    pub(crate) fn call_refused(&mut self, worker: u32) {
        self.workers[worker as usize].outage.refused = true;
    }

    /// Whether a worker's claim takes an expired lease that rule P10 keeps it from.
    pub(crate) fn under_embargo(&self, worker: u32, call: u32, began: Micros) -> bool {
        self.after_a_return(worker, began) || self.after_an_outage(worker, call)
    }

    /// Who is new asks a server that was started again how long it has been up, and of a standby knows nothing.
    fn after_a_return(&self, worker: u32, began: Micros) -> bool {
        let Some(last) = self.returns.last() else { return false };
        let (book, terms) = (&self.workers[worker as usize], self.terms_of(worker));
        let knew_another = book.met_store.is_some_and(|met| met < last.down_at);
        let embargo = if last.standby && !knew_another { 0 } else { terms.lease };
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
        call.cut_off || book.outage.over.is_some_and(embargo)
    }
}
