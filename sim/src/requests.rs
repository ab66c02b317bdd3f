//! Requests to destinations.

use leasehold::machine::{LeaseKey, Moment};
use sim_oracle::{End, Fact, RetryAfter};

use crate::bugs::Bug;
use crate::process::{Item, Request, Stage};
use crate::schedule::{Asked, Manner};
use crate::world::{Happening, World};

impl World<'_> {
    /// The machine wants a request started.
    pub(crate) fn send(&mut self, worker: u32, key: LeaseKey, number: u32, start_before: Moment) {
        let request = self.request(worker, key, number, start_before);
        let slot = self.processes[worker as usize].slot;
        let timeout = self.schedule.settings[self.schedule.slots[slot].settings].request_timeout;
        self.after(timeout, Happening::Driver(worker, Item::RequestTimedOut(request)));
        let connect = self.pace.below(self.schedule.pace.connect + 1);
        self.after(connect, Happening::Driver(worker, Item::Connected(request)));
    }

    /// Stops the process here, if a fault asks for it.
    fn pause_at_send(&mut self, worker: u32, before_check: bool) {
        let pause = self.processes[worker as usize].pause_at_send;
        if let Some((pause, before)) = pause
            && before == before_check
        {
            self.processes[worker as usize].pause_at_send = None;
            self.stop(worker);
            self.after(pause, Happening::Continue(worker));
        }
    }

    /// It is connected.
    pub(crate) fn connected(&mut self, request: u32) {
        let Request { worker, stage, .. } = self.requests[request as usize];
        if stage == Stage::Connecting {
            self.pause_at_send(worker, true);
            self.drive(worker, Item::Check(request));
        }
    }

    /// The driver looks at its clock: the request starts, unless its fence has come, which renewals have moved on.
    pub(crate) fn check_start(&mut self, request: u32) {
        let Request { worker, key, stage, start_before, asked, .. } = self.requests[request as usize];
        if stage != Stage::Connecting {
            return;
        }
        let fence = self.processes[worker as usize].machine.start_before(key);
        let start_before = match fence {
            Some(fence) if self.options.bug != Some(Bug::FenceKept) => fence,
            _ => start_before,
        };
        if self.local(worker) >= start_before && self.options.bug != Some(Bug::StartUnchecked) {
            // Told to the machine at the next turn of the loop.
            self.requests[request as usize].stage = Stage::Closing;
            return self.after(0, Happening::Driver(worker, Item::Closed(request)));
        }
        self.emit(Fact::StartAllowed { worker, event: key.row.0 as u32, token: key.token.0, asked });
        self.pause_at_send(worker, false);
        self.drive(worker, Item::Open(request));
    }

    fn request(&mut self, worker: u32, key: LeaseKey, number: u32, start_before: Moment) -> u32 {
        let request = self.requests.len() as u32;
        let stage = Stage::Connecting;
        let asked = self.now;
        self.requests.push(Request {
            worker,
            key,
            number,
            stage,
            opened: false,
            end: None,
            start_before,
            asked,
        });
        self.processes[worker as usize].requests.push(request);
        request
    }

    pub(crate) fn forget_request(&mut self, worker: u32, request: u32) {
        let requests = &mut self.processes[worker as usize].requests;
        if let Some(at) = requests.iter().position(|other| *other == request) {
            requests.swap_remove(at);
        }
    }

    /// The first byte leaves.
    pub(crate) fn open(&mut self, request: u32) {
        let Request { worker, key, number, stage, .. } = self.requests[request as usize];
        if stage != Stage::Connecting {
            return;
        }
        let event = key.row.0 as u32;
        let plan = self.schedule.events[event as usize];
        let destination = &self.schedule.destinations[usize::from(plan.destination)];
        let manner = self.manners[usize::from(plan.destination)];
        let manner = manner.unwrap_or_else(|| destination.draw(&mut self.pace));
        let slot = self.processes[worker as usize].slot;
        let timeout = self.schedule.settings[self.schedule.slots[slot].settings].request_timeout;
        let book = &mut self.requests[request as usize];
        book.stage = Stage::Open;
        if manner == Manner::Undeliverable {
            // Never on the wire.
            book.end = Some(End::Undeliverable);
            self.emit(Fact::RequestEnded { worker, event, token: key.token.0, end: End::Undeliverable });
            self.requests[request as usize].stage = Stage::Answered;
            return self.drive(worker, Item::Responded(request));
        }
        book.opened = true;
        self.emit(Fact::RequestOpened { worker, event, token: key.token.0, number });
        if self.kills[event as usize] > 0 {
            self.kills[event as usize] -= 1;
            let delay = self.pace.below(20_000);
            // No answer: an outcome that is settled first would take the event off probation.
            return self.after(delay, Happening::Kill(worker, event));
        }
        let soon = self.pace.within(500, 20_000);
        let (delay, end) = match manner {
            Manner::Ok(least, most) => (self.pace.within(least, most), End::Status(200, None)),
            Manner::Status(status) => (soon, End::Status(status, None)),
            Manner::RetryAfter(status, asked) => {
                let db_now = self.store.clock.at(self.now);
                let asked = match asked {
                    Asked::Delay(delay) => Some(RetryAfter::Delay(delay)),
                    Asked::Date(ahead) => Some(RetryAfter::Date(db_now + ahead)),
                    Asked::Garbage => None,
                };
                (soon, End::Status(status, asked))
            }
            Manner::Hang | Manner::Undeliverable => return,
            Manner::ResetBefore | Manner::ResetAfter => (soon, End::Error),
            Manner::TooLate => (timeout + soon, End::Status(200, None)),
        };
        self.requests[request as usize].end = Some(end);
        self.after(delay, Happening::ResponseArrives(request));
    }

    /// A response is in the worker's socket, whether the process runs or not.
    pub(crate) fn response_arrives(&mut self, request: u32) {
        let Request { worker, stage, end: Some(end), .. } = self.requests[request as usize] else { return };
        if !matches!(stage, Stage::Open | Stage::Closing) || self.processes[worker as usize].dead {
            return;
        }
        self.end_request(request, end);
        if self.options.bug == Some(Bug::SendTwice) && end == End::Error {
            let Request { key, number, .. } = self.requests[request as usize];
            self.emit(Fact::RequestOpened { worker, event: key.row.0 as u32, token: key.token.0, number });
        }
        self.drive(worker, Item::Responded(request));
    }

    /// A request is open no longer; the worker is yet to learn it.
    pub(crate) fn end_request(&mut self, request: u32, end: End) {
        let book = &mut self.requests[request as usize];
        book.stage = Stage::Answered;
        book.end = Some(end);
        let Request { worker, key, .. } = *book;
        self.emit(Fact::RequestEnded { worker, event: key.row.0 as u32, token: key.token.0, end });
    }
}
