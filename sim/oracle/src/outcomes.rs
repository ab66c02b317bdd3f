//! What a request's end means for its event: **S6** and **S7**.

use crate::fact::{End, RetryAfter, Settle};
use crate::{Invariant, Oracle, Sometimes, Verdict, ensure};

impl Oracle {
    /// **S6**, **S7**: whether the outcome is what the request's end means.
    pub(crate) fn outcome(&mut self, worker: u32, call: u32, lease: u32, settle: Settle) -> Verdict {
        let book = &self.leases[lease as usize];
        let event = book.event;
        let row = &self.events[event as usize];
        let terms = *self.terms_of(worker);
        let (tries, limit) = (row.attempts + 1, terms.tries(row.max_attempts));
        let release = matches!(settle, Settle::Release(_));
        let Some(end) = book.end.or(book.end_before.filter(|_| !book.open && !release)) else {
            ensure!(self, S6, !book.open, "event {event} was settled as {settle:?} with its request open");
            ensure!(self, S6, release, "event {event} was settled as {settle:?} without a try");
            return Ok(());
        };
        match settle {
            Settle::Delivered => {
                let success = matches!(end, End::Status(200..=299, _));
                ensure!(
                    self,
                    S7,
                    success && row.successes > 0,
                    "event {event} is delivered, but ended with {end:?}"
                );
            }
            Settle::Failed { tried: false } => {
                ensure!(
                    self,
                    S6,
                    end == End::Undeliverable,
                    "event {event} failed without a try, but ended with {end:?}"
                );
            }
            Settle::Failed { tried: true } => {
                let at_once = matches!(end, End::Status(status, _) if status == terms.fail_status);
                ensure!(
                    self,
                    S6,
                    tries >= limit || at_once,
                    "event {event} failed after {tries} of {limit} tries ({end:?})"
                );
                let success = matches!(end, End::Status(200..=299, _) | End::Closed);
                ensure!(self, S7, !success, "event {event} failed, but its request ended with {end:?}");
            }
            Settle::Retry(delay) => {
                ensure!(
                    self,
                    S6,
                    tries < limit,
                    "event {event} is to be retried after {tries} of {limit} tries"
                );
                let success = matches!(end, End::Status(200..=299, _) | End::Undeliverable | End::Closed);
                ensure!(
                    self,
                    S6,
                    !success,
                    "event {event} is to be retried, but its request ended with {end:?}"
                );
                return self.delay(call, lease, tries, end, delay);
            }
            Settle::Release(delay) => {
                self.check_release(call, lease, delay)?;
                // A lost settle leaves a lease that its holder does not know any more.
                let forgotten = self.last_loss.is_some_and(|at| at >= book.claimed_at);
                ensure!(
                    self,
                    S6,
                    end == End::Closed || forgotten,
                    "event {event} was given back, but its request ended with {end:?}"
                );
            }
        }
        Ok(())
    }

    /// **S6**, rule P8: what a drain broke off is given back with a delay of `G`, and nothing else with any.
    fn check_release(&self, call: u32, lease: u32, delay: Option<u64>) -> Verdict {
        let (book, call) = (&self.leases[lease as usize], &self.calls[call as usize]);
        let (holder, terms) = (&self.workers[book.worker as usize], self.terms_of(book.worker));
        let delayed = delay.is_some();
        let event = book.event;
        let drains = holder.drain_began.is_some();
        ensure!(
            self,
            S6,
            drains || !delayed,
            "event {event} was given back with a delay by a worker that does not drain"
        );
        // It was broken off by nothing else if it was closed before the fence that it had from its claim on.
        let fence = book.asked_local + terms.lease as i64 - terms.fence_margin as i64;
        let unfenced = holder.is_steady()
            && holder.clock.at(book.closed_at) < fence
            && self.db.stepped_since(book.asked_at) == 0;
        if !drains || !unfenced || !book.is_known() || !book.opened || book.end != Some(End::Closed) {
            return Ok(());
        }
        let left = terms.reclaim_grace.saturating_sub(call.sent - book.closed_at);
        ensure!(
            self,
            S6,
            delayed && delay.unwrap_or(0) + 1 >= left && delay.unwrap_or(0) <= terms.reclaim_grace,
            "event {event} was broken off by a drain and given back for {delay:?} us, allowed are {left} to {}",
            terms.reclaim_grace
        );
        Ok(())
    }

    /// **S6**: the delay counts from when the outcome was known, and what is left of it is sent.
    pub(crate) fn delay(&mut self, call: u32, lease: u32, tries: u32, end: End, delay: u64) -> Verdict {
        let (book, call) = (&self.leases[lease as usize], &self.calls[call as usize]);
        let holder = &self.workers[book.worker as usize];
        let terms = *self.terms_of(book.worker);
        // The database's time as carried forward may stem from a statement of some time before the claim.
        let known_since = book.claimed_at.saturating_sub(4 * terms.store_timeout);
        // Until a clock that was set back is where it was, the worker's time stands still.
        let stands_still = book.known < holder.shown;
        let stepped =
            holder.clock_stepped_since(book.claimed_at) > 0 || self.db.stepped_since(known_since) > 0;
        if stands_still || stepped {
            self.stats.unchecked[Invariant::S6 as usize] += 1;
            return Ok(());
        }
        self.stats.checked[Invariant::S6 as usize] += 1;
        let passed = u64::try_from(call.sent_local - book.known).unwrap_or(0);
        let known_at = call.sent - passed;
        let (mut least, mut most) = terms.delay_bounds(tries);
        let asked = match end {
            End::Status(429 | 503, Some(RetryAfter::Delay(asked))) => asked,
            End::Status(429 | 503, Some(RetryAfter::Date(date))) => {
                u64::try_from(date - self.db.at(known_at)).unwrap_or(0)
            }
            _ => 0,
        };
        if asked > terms.retry_after_max {
            self.stats.saw(Sometimes::RetryAfterCapped);
        }
        let asked = asked.min(terms.retry_after_max);
        if asked > most {
            self.stats.saw(Sometimes::RetryAfterHonoured);
        }
        // A date is compared with the database's time as carried forward: a reply old, and drift, may be in between.
        let loose = if matches!(end, End::Status(_, Some(RetryAfter::Date(_)))) {
            let stopped = holder.stopped_between(known_since, self.now);
            2 * terms.store_timeout + terms.lease * holder.worst_ppm / 1_000_000 + stopped + 1_000
        } else {
            2
        };
        least = least.max(asked.saturating_sub(loose));
        most = most.max(asked + loose);
        let total = delay + passed;
        let event = book.event;
        let in_time = total + 2 >= least && (delay == 0 || total <= most + 2);
        ensure!(
            self,
            S6,
            in_time,
            "try {tries} of event {event} ended with {end:?}: the next one is due {total} us after it, allowed is {least} \
             to {most}"
        );
        Ok(())
    }
}
