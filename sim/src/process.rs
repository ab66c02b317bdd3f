//! A worker process: the machine, its clock, and the little driver loop around it. It decides nothing.

use std::collections::VecDeque;

use leasehold::machine::{
    Action, AttemptResult, ClaimReply, Grant, Input, LeaseKey, Moment, StoreFault, Unsendable, Worker,
    WorkerId,
};
use sim_oracle::{Down, End, Fact, LocalClock};

use crate::bugs::Bug;
use crate::plain::attempt_result;
use crate::schedule::RESTART_AFTER_KILL;
use crate::statement::{Ask, Reply};
use crate::world::{Happening, World};

/// Something that a process's driver does, at once or when the process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Item {
    Wake,
    Reply(u32),
    TimedOut(u32),
    /// A connection is there.
    Connected(u32),
    /// The driver's look at its clock.
    Check(u32),
    Open(u32),
    Responded(u32),
    RequestTimedOut(u32),
    Closed(u32),
    Hint,
    Shutdown,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Connecting,
    Open,
    /// Being aborted.
    Closing,
    /// A response is in the worker's socket.
    Answered,
    Over,
}

/// One request to a destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) worker: u32,
    pub(crate) key: LeaseKey,
    pub(crate) number: u32,
    pub(crate) stage: Stage,
    pub(crate) opened: bool,
    pub(crate) end: Option<End>,
    pub(crate) start_before: Moment,
    /// When the machine wanted it.
    pub(crate) asked: u64,
}

/// One start of a worker process.
pub(crate) struct Process {
    pub(crate) slot: usize,
    pub(crate) machine: Worker,
    pub(crate) clock: LocalClock,
    pub(crate) stops: u32,
    pub(crate) dead: bool,
    pub(crate) draining: bool,
    /// What waits for the process to go on.
    pub(crate) inbox: VecDeque<Item>,
    /// When the machine wants to be woken, by the worker's clock.
    due: Option<Moment>,
    /// Inputs since the machine last checked itself.
    unchecked: u32,
    /// Crash after so many more effects.
    pub(crate) crash_amid: Option<u32>,
    pub(crate) crash_on_answer: bool,
    /// Stop at the next request for so long: before the driver's look at its clock, or after it.
    pub(crate) pause_at_send: Option<(u64, bool)>,
    /// Requests that are not over.
    pub(crate) requests: Vec<u32>,
}

impl World<'_> {
    /// Starts a process in a slot, unless one runs there or a fault keeps it down.
    pub(crate) fn start(&mut self, slot: usize) {
        let state = &mut self.slots[slot];
        if state.process.is_some() || state.kept_down > 0 {
            return;
        }
        let worker = self.processes.len() as u32;
        state.process = Some(worker);
        let plan = &self.schedule.slots[slot];
        let local = (plan.clock + self.now) as i64;
        let clock = LocalClock::new(self.now, local, plan.ppm);
        let settings = self.worker_settings[plan.settings].clone();
        let machine =
            Worker::new(WorkerId::new(format!("w{worker}")), settings, Moment::from_micros(local as u64));
        self.processes.push(Process {
            slot,
            machine,
            clock,
            stops: 0,
            dead: false,
            draining: false,
            inbox: VecDeque::new(),
            due: None,
            unchecked: 0,
            crash_amid: None,
            crash_on_answer: false,
            pause_at_send: None,
            requests: Vec::new(),
        });
        let terms = plan.settings as u16;
        self.emit(Fact::WorkerUp { worker, slot: slot as u16, terms, local, ppm: plan.ppm });
        self.drive(worker, Item::Wake);
    }

    pub(crate) fn local(&self, worker: u32) -> Moment {
        let local = self.processes[worker as usize].clock.at(self.now);
        Moment::from_micros(u64::try_from(local).unwrap_or(0))
    }

    /// The process dies; its sockets are closed.
    pub(crate) fn crash(&mut self, worker: u32, how: Down) {
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        process.dead = true;
        process.inbox.clear();
        if std::mem::take(&mut process.draining) {
            self.drain_count(-1);
        }
        let process = &mut self.processes[worker as usize];
        let slot = process.slot;
        for request in std::mem::take(&mut process.requests) {
            self.requests[request as usize].stage = Stage::Over;
        }
        self.slots[slot].process = None;
        self.set_timer(slot, None);
        self.emit(Fact::WorkerDown { worker, how });
    }

    /// Does it now, or once the process goes on.
    pub(crate) fn drive(&mut self, worker: u32, item: Item) {
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        if process.stops > 0 {
            return process.inbox.push_back(item);
        }
        self.perform(worker, item);
    }

    /// The process goes on: what had gathered is done in order.
    pub(crate) fn resume(&mut self, worker: u32) {
        let process = &mut self.processes[worker as usize];
        if process.dead || process.stops == 0 {
            return;
        }
        process.stops -= 1;
        if process.stops > 0 {
            return;
        }
        self.emit(Fact::WorkerContinued { worker });
        while let Some(item) = {
            let process = &mut self.processes[worker as usize];
            if process.stops > 0 || process.dead { None } else { process.inbox.pop_front() }
        } {
            self.perform(worker, item);
        }
        self.rearm(worker);
    }

    /// The process is stopped once more.
    pub(crate) fn stop(&mut self, worker: u32) {
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        process.stops += 1;
        if process.stops == 1 {
            self.emit(Fact::WorkerStopped { worker });
        }
    }

    fn perform(&mut self, worker: u32, item: Item) {
        match item {
            Item::Wake => self.input(worker, Input::Wake),
            Item::Hint => self.input(worker, Input::Hint),
            Item::Reply(call) => {
                let book = &mut self.calls[call as usize];
                let (Some(arrived), false) = (book.arrived, book.done) else { return };
                book.done = true;
                if let Some(reply) = book.reply.take() {
                    self.answered(worker, call, arrived, reply);
                }
            }
            Item::TimedOut(call) => {
                let book = &mut self.calls[call as usize];
                if book.done || book.arrived.is_some() {
                    return;
                }
                book.done = true;
                self.give_up(call);
                self.emit(Fact::CallFailed { worker, call });
                if self.options.bug != Some(Bug::TimeoutUnreported) {
                    let input = self.fault_input(call, StoreFault::Unknown { error: String::new() });
                    self.input(worker, input);
                }
            }
            Item::Connected(request) => self.connected(request),
            Item::Check(request) => self.check_start(request),
            Item::Open(request) => self.open(request),
            Item::Responded(request) => {
                let book = &mut self.requests[request as usize];
                if book.stage != Stage::Answered {
                    return;
                }
                book.stage = Stage::Over;
                let (key, end) = (book.key, book.end);
                self.forget_request(worker, request);
                let Some(end) = end else { return };
                self.emit(Fact::OutcomeKnown { worker, event: key.row.0 as u32, token: key.token.0 });
                let result = self.result_of(end);
                if self.processes[worker as usize].crash_on_answer {
                    self.processes[worker as usize].crash_on_answer = false;
                    return self.crash(worker, Down::Crash);
                }
                self.input(worker, Input::Attempted { key, result });
            }
            Item::RequestTimedOut(request) => {
                if matches!(self.requests[request as usize].stage, Stage::Connecting | Stage::Open) {
                    self.end_request(request, End::Error);
                    self.perform(worker, Item::Responded(request));
                }
            }
            Item::Closed(request) => {
                let book = &mut self.requests[request as usize];
                if book.stage != Stage::Closing {
                    return;
                }
                book.stage = Stage::Over;
                let (key, opened) = (book.key, book.opened);
                self.forget_request(worker, request);
                if opened && self.options.bug != Some(Bug::AbortLost) {
                    let (event, token) = (key.row.0 as u32, key.token.0);
                    self.emit(Fact::RequestEnded { worker, event, token, end: End::Closed });
                }
                self.input(worker, Input::Aborted { key });
            }
            Item::Shutdown => {
                let process = &mut self.processes[worker as usize];
                if !std::mem::replace(&mut process.draining, true) {
                    self.drain_count(1);
                    self.emit(Fact::DrainBegan { worker });
                }
                self.input(worker, Input::Shutdown);
            }
        }
    }

    fn answered(&mut self, worker: u32, call: u32, arrived: u64, mut place: Box<Reply>) {
        let request = self.calls[call as usize].request;
        let fault = match *place {
            Reply::NotApplied => Some(StoreFault::NotApplied { error: String::new() }),
            Reply::Permanent => Some(StoreFault::Permanent { error: String::new() }),
            _ => None,
        };
        if let Some(fault) = fault {
            // A refusal for good is an answer.
            if let StoreFault::Permanent { .. } = fault {
                self.emit(Fact::CallAnswered { worker, call, arrived });
            } else {
                self.emit(Fact::CallFailed { worker, call });
            }
            self.spare_replies.push(place);
            let input = self.fault_input(call, fault);
            self.input(worker, input);
            return;
        }
        self.emit(Fact::CallAnswered { worker, call, arrived });
        if let Reply::Claim(reply) = &*place {
            for (grant, end) in unsendable(reply) {
                let (event, token) = (grant.key.row.0 as u32, grant.key.token.0);
                self.emit(Fact::RequestEnded { worker, event, token, end });
                self.emit(Fact::OutcomeKnown { worker, event, token });
            }
        }
        let input = input_of(request, std::mem::replace(&mut *place, Reply::NotApplied));
        self.spare_replies.push(place);
        if let Some(input) = input {
            self.input(worker, input);
        }
    }

    /// Gives the machine an input, does what it wants, and arms its next wake-up.
    pub(crate) fn input(&mut self, worker: u32, input: Input) {
        let now = self.local(worker);
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        process.machine.handle(now, input);
        process.unchecked += 1;
        if process.unchecked == self.options.check_machines_every {
            process.unchecked = 0;
            if self.options.bug.is_none() {
                process.machine.assert_invariants();
            }
        }
        while process.machine.poll_observation().is_some() {}
        loop {
            let process = &mut self.processes[worker as usize];
            if process.dead {
                return;
            }
            let Some(action) = process.machine.poll_action() else { break };
            match &mut process.crash_amid {
                Some(0) => return self.crash(worker, Down::Crash),
                Some(left) => *left -= 1,
                None => {}
            }
            self.act(worker, action);
        }
        let process = &mut self.processes[worker as usize];
        if process.machine.ended().is_some() {
            let (slot, asked) = (process.slot, process.draining);
            self.crash(worker, Down::Ended);
            // Its fault may be over already, and was waiting for the drain. Who ended by itself is started as by a timer.
            let pause = if asked { 0 } else { RESTART_AFTER_KILL };
            return self.after(pause, Happening::Start(slot as u32));
        }
        process.due = process.machine.next_wakeup();
        self.rearm(worker);
    }

    fn act(&mut self, worker: u32, action: Action) {
        match action {
            Action::Claim(request, claim) => self.call(worker, request, Ask::Claim(claim)),
            Action::Renew(request, renew) => self.call(worker, request, Ask::Renew(renew)),
            Action::Settle(request, settle) => self.call(worker, request, Ask::Settle(settle)),
            Action::Owned(request, owned) => self.call(worker, request, Ask::Owned(owned)),
            Action::Send { key, number, start_before, .. } => self.send(worker, key, number, start_before),
            Action::Abort { key } => {
                let requests = &self.processes[worker as usize].requests;
                let found =
                    requests.iter().copied().find(|request| self.requests[*request as usize].key == key);
                if let Some(request) = found
                    && matches!(self.requests[request as usize].stage, Stage::Connecting | Stage::Open)
                {
                    self.requests[request as usize].stage = Stage::Closing;
                    let settings = &self.schedule.settings
                        [self.schedule.slots[self.processes[worker as usize].slot].settings];
                    let most = self.schedule.pace.close.min(settings.fence_margin / 4);
                    let delay = self.pace.below(most + 1);
                    self.after(delay, Happening::Driver(worker, Item::Closed(request)));
                }
            }
            Action::Forget { .. } => {}
        }
    }

    fn result_of(&self, end: End) -> AttemptResult {
        match end {
            End::Error if self.options.bug == Some(Bug::AcceptedIsSuccess) => {
                attempt_result(End::Status(200, None))
            }
            end => attempt_result(end),
        }
    }

    /// Sets the timer by which the machine is woken in time, also after its clock was touched.
    pub(crate) fn rearm(&mut self, worker: u32) {
        let process = &self.processes[worker as usize];
        if process.dead || process.stops > 0 {
            return;
        }
        let at = process.due.and_then(|due| process.clock.when(due.as_micros() as i64));
        self.set_timer(process.slot, at);
    }

    /// A timer rings.
    pub(crate) fn wake(&mut self, slot: usize) {
        let Some(worker) = self.slots[slot].process else { return };
        let process = &mut self.processes[worker as usize];
        if process.stops > 0 {
            return process.inbox.push_back(Item::Wake);
        }
        self.input(worker, Input::Wake);
    }
}

/// Grants whose end the worker knows with the claim's reply: what can't be sent is never on the wire.
pub(crate) fn unsendable(reply: &ClaimReply) -> impl Iterator<Item = (&Grant, End)> {
    reply.grants.iter().filter_map(|grant| match &grant.unsendable {
        None => None,
        Some(Unsendable::Oversized { .. }) => Some((grant, End::Error)),
        Some(Unsendable::Malformed { .. }) => Some((grant, End::Undeliverable)),
    })
}

/// The input that a good reply is.
pub(crate) fn input_of(request: leasehold::machine::RequestId, reply: Reply) -> Option<Input> {
    match reply {
        Reply::Claim(reply) => Some(Input::Claimed { request, reply: Ok(reply) }),
        Reply::Renew(reply) => Some(Input::Renewed { request, reply: Ok(reply) }),
        Reply::Settle(reply) => Some(Input::Settled { request, reply: Ok(reply) }),
        Reply::Owned(reply) => Some(Input::Owned { request, reply: Ok(reply) }),
        Reply::NotApplied | Reply::Permanent => None,
    }
}
