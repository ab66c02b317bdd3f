//! Requests as the world sees them: **S3**, **S4**, **S6**, **S9**.

use crate::fact::{Down, End, Micros};
use crate::health::{NEWER, OVERLAP};
use crate::ledger::{Event, NONE, UNKNOWN, entry};
use crate::violation::Excuse;
use crate::{Oracle, Sometimes, Verdict, ensure};

/// A driver takes its first step towards a request within that time, unless it is stopped.
const SOON: Micros = 50_000;

impl Oracle {
    /// How far a lease is past its fence by its holder's own clock, without the time for which the holder was stopped
    /// since; and whether such a time, or an error of its clock, was left out.
    fn past_fence(&self, lease: u32) -> Option<(u64, bool)> {
        let book = &self.leases[lease as usize];
        let (worker, terms) = (&self.workers[book.worker as usize], self.terms_of(book.worker));
        if book.confirmed == UNKNOWN {
            return Some((u64::MAX, false));
        }
        let fence = book.confirmed + terms.lease as i64 - terms.fence_margin as i64;
        let past = u64::try_from(worker.clock.at(self.now) - fence).ok()?;
        let since = self.now.saturating_sub(past + 1);
        let stopped = worker.stopped_between(since, self.now);
        // A clock that was set back may still be making up for it; one that was set forward was so since the fence.
        let stepped = worker.set_back + worker.clock_stepped_since(since);
        Some((past.saturating_sub(stopped + stepped), stopped + stepped > 0))
    }

    /// **S3** at the very check: the driver looked at its clock and found that it may start.
    pub(crate) fn start_allowed(&mut self, worker: u32, event: u32, token: i64) -> Verdict {
        let Some(lease) = self.find(event, worker, token) else { return Ok(()) };
        let (book, holder, terms) =
            (&self.leases[lease as usize], &self.workers[worker as usize], self.terms_of(worker));
        let fence = book.confirmed.saturating_add((terms.lease - terms.fence_margin) as i64);
        // A worker's moments don't go back when its clock does.
        let allowed = holder.clock.at(self.now) < fence.saturating_add(holder.set_back as i64);
        ensure!(self, S3, allowed, "worker {worker} lets a request for event {event} start past its fence");
        Ok(())
    }

    /// **S3**, rule P4: while a renewal is overdue by `R` nothing new is started. A row that somebody keeps locked holds up
    /// nothing but itself.
    pub(crate) fn check_overdue(&self, worker: u32, asked: Micros) -> Verdict {
        let (holder, terms) = (&self.workers[worker as usize], self.terms_of(worker));
        // A driver that was stopped between the machine's word and its own first step was told before that.
        let stopped = holder.stops.last().is_some_and(|(_, until)| until + SOON >= asked);
        if stopped || asked < holder.clock.touched_at() || !holder.is_steady() {
            return Ok(());
        }
        let least = holder.clock.at(asked) - (terms.heartbeat + terms.store_timeout) as i64;
        let overdue = |event: &Event| {
            event.lease != NONE && event.locked_since.is_none() && {
                let lease = &self.leases[event.lease as usize];
                let renewed = lease.worker == worker
                    && lease.known_since < asked
                    && lease.is_known()
                    && lease.skipped.is_none();
                renewed && lease.confirmed < least
            }
        };
        let found = self.events.iter().position(overdue);
        ensure!(
            self,
            S3,
            found.is_none(),
            "worker {worker} starts a request while its renewal of event {found:?} is overdue by R"
        );
        Ok(())
    }

    pub(crate) fn request_opened(&mut self, worker: u32, event: u32, token: i64, number: u32) -> Verdict {
        let found = self.find(event, worker, token);
        ensure!(
            self,
            S5,
            found.is_some(),
            "worker {worker} opened a request for event {event} without a lease"
        );
        let Some(lease) = found else { return Ok(()) };
        if let Some((past, stopped)) = self.past_fence(lease) {
            if stopped {
                self.stats.saw(Sometimes::LateStart);
            }
            ensure!(
                self,
                S3,
                stopped && past <= 1_000,
                "worker {worker} opened a request for event {event} {past} us past the fence"
            );
        }
        self.check_told(lease)?;
        let book = &self.leases[lease as usize];
        ensure!(
            self,
            S6,
            !book.opened,
            "worker {worker} opened a second request for event {event} under one token"
        );
        let row = &self.events[event as usize];
        ensure!(
            self,
            S9,
            row.sendable,
            "worker {worker} sends event {event}, which is too large or does not decode"
        );
        let current = row.lease == lease && row.restored_at.is_none();
        ensure!(
            self,
            S6,
            !current || number == row.attempts + 1,
            "request {number} for event {event} is sent with {} attempts settled",
            row.attempts
        );
        if row.open > 0 {
            let mut other = row.last;
            while other != NONE {
                let open = &self.leases[other as usize];
                if open.open {
                    let (older, newer) = if open.token < token { (other, lease) } else { (lease, other) };
                    let excused = open.worker != worker
                        && (self.overlap_excused(older, OVERLAP) || self.overlap_excused(newer, NEWER));
                    ensure!(
                        self,
                        S4,
                        excused,
                        "worker {worker} opened a request for event {event} while that of worker {} is open",
                        open.worker
                    );
                    self.stats.saw(Sometimes::Overlap);
                }
                other = self.leases[other as usize].before;
            }
        }
        let destination = self.events[event as usize].destination;
        self.events[event as usize].open += 1;
        let book = &mut self.leases[lease as usize];
        (book.open, book.opened, book.opened_at) = (true, true, self.now);
        let terms = *self.terms_of(worker);
        let holder = &mut self.workers[worker as usize];
        holder.open += 1;
        let there = entry(&mut holder.open_by_destination, destination);
        *there += 1;
        let (open, there) = (holder.open, *there);
        ensure!(self, S9, open <= terms.max_in_flight, "worker {worker} has {open} requests open");
        ensure!(
            self,
            S9,
            there <= terms.max_in_flight_per_destination,
            "worker {worker} has {there} requests open to one destination"
        );
        Ok(())
    }

    pub(crate) fn request_ended(&mut self, worker: u32, event: u32, token: i64, end: End) -> Verdict {
        let Some(lease) = self.find(event, worker, token) else { return Ok(()) };
        let terms = *self.terms_of(worker);
        let opened = self.leases[lease as usize].open;
        if opened {
            let destination = self.events[event as usize].destination;
            self.events[event as usize].open -= 1;
            let holder = &mut self.workers[worker as usize];
            holder.open -= 1;
            *entry(&mut holder.open_by_destination, destination) -= 1;
            self.check_closed(lease)?;
            self.check_told(lease)?;
            if self.now - self.leases[lease as usize].opened_at > terms.lease {
                self.stats.saw(Sometimes::OutlastedLease);
            }
        }
        let locked_now = self.events[event as usize].locked_since.map_or(0, |since| self.now - since);
        let book = &mut self.leases[lease as usize];
        book.open = false;
        book.end = Some(end);
        book.closed_at = self.now;
        book.locked_to_end = book.locked_for + locked_now;
        if let End::Status(200..=299, _) = end {
            let row = &mut self.events[event as usize];
            row.successes += 1;
            if row.successes > 1 {
                self.stats.saw(Sometimes::DeliveredTwice);
            }
        }
        Ok(())
    }

    /// **S3**: closed by the fence, and the closing itself takes no more than half the margin.
    fn check_closed(&mut self, lease: u32) -> Verdict {
        let margin = self.terms_of(self.leases[lease as usize].worker).fence_margin;
        if let Some((past, stopped)) = self.past_fence(lease) {
            if stopped {
                self.stats.saw(Sometimes::LateClose);
            }
            let book = &self.leases[lease as usize];
            ensure!(
                self,
                S3,
                past <= margin / 2 + 1_000,
                "the request of worker {} for event {} stayed open {past} us past the fence",
                book.worker,
                book.event
            );
        }
        Ok(())
    }

    /// **S3**, rule P4: once a worker has seen that the database's clock ran ahead, what it knew of before is fenced.
    fn check_told(&mut self, lease: u32) -> Verdict {
        let book = &self.leases[lease as usize];
        let (holder, margin) = (&self.workers[book.worker as usize], self.terms_of(book.worker).fence_margin);
        let told = holder.told_ahead.filter(|(since, _)| book.known_since < *since);
        let Some((since, told)) = told else { return Ok(()) };
        let closing = if book.open { margin / 2 + 1_000 } else { 0 };
        let late = self.now > told + closing + holder.stopped_between(told, self.now);
        ensure!(
            self,
            S3,
            !late,
            "the request of worker {} for event {} is open {} us after the worker saw that the database's clock had run \
             ahead {} us before that",
            book.worker,
            book.event,
            self.now - told,
            told - since
        );
        Ok(())
    }

    /// A worker's sockets are closed as it dies.
    pub(crate) fn sockets_closed(&mut self, worker: u32, how: Down) -> Verdict {
        if self.workers[worker as usize].open == 0 && how == Down::Ended {
            return Ok(());
        }
        for lease in 0..self.leases.len() as u32 {
            let book = &self.leases[lease as usize];
            if book.worker != worker {
                continue;
            }
            let event = book.event;
            if book.open {
                self.stats.saw(Sometimes::CrashWhileOpen);
                self.request_ended(worker, event, book.token, End::Closed)?;
            } else if self.events[event as usize].lease == lease && book.end.is_some() {
                self.stats.saw(Sometimes::CrashBeforeSettle);
            }
        }
        Ok(())
    }

    pub(crate) fn requests_finished(&mut self) -> Verdict {
        for lease in 0..self.leases.len() as u32 {
            if self.leases[lease as usize].open
                && self.workers[self.leases[lease as usize].worker as usize].stopped_since.is_none()
                && !self.excuses(&self.leases[lease as usize], None).has(Excuse::Crashed)
            {
                self.check_closed(lease)?;
            }
        }
        Ok(())
    }
}
