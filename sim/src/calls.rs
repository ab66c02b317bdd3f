//! Store calls on their way: the network, the statement, the commit, the reply.

use leasehold::machine::{Input, RequestId, StoreFault};
use sim_oracle::{Fact, Lane};

use crate::process::Item;
use crate::statement::{Ask, Reply, Statement};
use crate::world::{Call, Happening, World};

impl World<'_> {
    #[inline]
    fn network_delay(&mut self) -> u64 {
        let (least, most) = self.schedule.pace.network;
        let delay = self.net.within(least, most);
        if self.weather.delay > 0 { delay + self.net.below(self.weather.delay + 1) } else { delay }
    }

    /// A process calls the store.
    pub(crate) fn call(&mut self, worker: u32, request: RequestId, ask: Ask) {
        let call = self.calls.len() as u32;
        let lane = match &ask {
            Ask::Claim(_) => Lane::Claim,
            Ask::Owned(_) => Lane::Owned,
            Ask::Renew(renew) if renew.wait => Lane::RenewAlone,
            Ask::Renew(_) => Lane::Renew,
            Ask::Settle(_) => Lane::Settle,
        };
        let statement = self.statements.len() as u32;
        self.calls.push(Call { worker, request, done: false, arrived: None, reply: None, lane, statement });
        self.emit(Fact::CallSent { worker, call, lane, renews: ask.renews() });
        let slot = self.processes[worker as usize].slot;
        let copy = self.net.rarely(self.weather.duplicate) && matches!(lane, Lane::Renew | Lane::Settle);
        let copy = copy.then(|| ask.clone());
        self.add_statement(call, worker, ask);
        self.time_out_after(self.schedule.slots[slot].settings, call);
        self.send_statement(slot, statement);
        if let Some(ask) = copy {
            self.add_statement(call, worker, ask);
            self.send_statement(slot, statement + 1);
        }
    }

    fn add_statement(&mut self, call: u32, worker: u32, ask: Ask) {
        let statement = match self.spare.pop() {
            Some(mut statement) => {
                statement.replace(call, worker, ask);
                statement
            }
            None => Box::new(Statement::new(call, worker, ask)),
        };
        self.statements.push(Some(statement));
    }

    fn send_statement(&mut self, slot: usize, statement: u32) {
        let mut delay = self.network_delay();
        let (rate, late) = self.weather.late_call;
        if self.net.rarely(rate) {
            delay += late;
        }
        if !self.slots[slot].cut_to && !self.net.rarely(self.weather.loss) {
            self.after(delay, Happening::Arrive(statement));
        }
    }

    /// A fault as the input that answers a call's question.
    pub(crate) fn fault_input(&self, call: u32, fault: StoreFault) -> Input {
        let Call { request, lane, .. } = self.calls[call as usize];
        match lane {
            Lane::Claim => Input::Claimed { request, reply: Err(fault) },
            Lane::Owned => Input::Owned { request, reply: Err(fault) },
            Lane::Renew | Lane::RenewAlone => Input::Renewed { request, reply: Err(fault) },
            Lane::Settle => Input::Settled { request, reply: Err(fault) },
        }
    }

    /// The client gave a call up: it closes the connection and has the server cancel the statement where it can.
    pub(crate) fn give_up(&mut self, call: u32) {
        let book = &self.calls[call as usize];
        let (statement, slot) = (book.statement, self.processes[book.worker as usize].slot);
        if !self.slots[slot].cut_to && (self.weather.weight > 0 || self.chance.percent(50)) {
            let delay = self.network_delay();
            self.after(delay, Happening::Cancel(statement, call));
        }
    }

    /// A statement reaches the server.
    pub(crate) fn arrive(&mut self, id: u32) {
        if !self.store.up || self.store.read_only {
            let Some(statement) = self.statements[id as usize].take() else { return };
            let call = statement.call;
            self.spare.push(statement);
            return self.reply(call, Reply::NotApplied);
        }
        let Some(statement) = &mut self.statements[id as usize] else { return };
        self.store.begin(statement, self.now);
        let stall = if self.weather.stall > 0 { self.pace.below(self.weather.stall + 1) } else { 0 };
        if stall > 0 {
            self.after(stall, Happening::LocksTurn(id));
        } else {
            self.take_locks(id);
        }
    }

    fn alive(&self, id: u32) -> bool {
        let statement = self.statements[id as usize].as_ref();
        statement.is_some_and(|statement| self.store.up && statement.epoch == self.store.epoch)
    }

    /// A statement takes its locks, or waits for one.
    pub(crate) fn take_locks(&mut self, id: u32) {
        if !self.alive(id) {
            return;
        }
        let Some(statement) = &mut self.statements[id as usize] else { return };
        if self.store.begin_work(id, statement, self.now) {
            let (least, most) = self.schedule.pace.commit;
            let mut delay = self.pace.within(least, most) + statement.heavy_rows() * self.weather.weight;
            let (rate, late) = self.weather.late_commit;
            if statement.commits() && self.chance.rarely(rate) {
                delay += late;
            }
            self.after(delay, Happening::Commit(id));
        }
    }

    pub(crate) fn go_on(&mut self, waiting: impl IntoIterator<Item = u32>) {
        for id in waiting {
            self.at(self.now, Happening::LocksTurn(id));
        }
    }

    /// A statement commits, or is rolled back.
    pub(crate) fn commit(&mut self, id: u32) {
        if !self.alive(id) {
            return;
        }
        let Some(statement) = self.statements[id as usize].take() else { return };
        let call = statement.call;
        let impossible = self.store.impossible(&statement);
        if impossible.is_some() || self.chance.rarely(self.weather.abort) {
            let next = self.store.roll_back(id, &statement, &mut self.facts);
            self.emit_store_facts();
            self.go_on(next);
            let mut reply = Reply::NotApplied;
            if let Some(keys) = impossible {
                reply = Reply::Permanent;
                for key in keys {
                    let (event, token) = (key.row.0 as u32, key.token.0);
                    self.emit(Fact::SettleImpossible { worker: statement.worker, event, token });
                }
            }
            return self.reply(call, reply);
        }
        let reply = self.store.commit(&statement, self.now, &mut self.facts);
        let next = self.store.finish(id, &statement);
        self.spare.push(statement);
        self.emit_store_facts();
        self.go_on(next);
        if !self.chance.rarely(self.weather.lost_reply) {
            self.reply(call, reply);
        }
    }

    /// The server cancels a statement whose client has gone, if it has not committed.
    pub(crate) fn cancel(&mut self, id: u32, call: u32) {
        if !self.alive(id) || !self.calls[call as usize].done {
            return;
        }
        let Some(statement) = self.statements[id as usize].take() else { return };
        let next = self.store.roll_back(id, &statement, &mut self.facts);
        self.store.stop_waiting(id);
        self.emit_store_facts();
        self.go_on(next);
    }

    fn reply(&mut self, call: u32, reply: Reply) {
        let slot = self.processes[self.calls[call as usize].worker as usize].slot;
        let delay = self.network_delay();
        if self.slots[slot].cut_from || self.net.rarely(self.weather.loss) {
            return;
        }
        let book = &mut self.calls[call as usize];
        if book.done || book.reply.is_some() {
            return;
        }
        let twice = self.net.rarely(self.weather.duplicate);
        book.reply = Some(match self.spare_replies.pop() {
            Some(mut place) => {
                *place = reply;
                place
            }
            None => Box::new(reply),
        });
        self.after(delay, Happening::ReplyArrives(call));
        if twice {
            self.after(delay + 1_000, Happening::ReplyArrives(call));
        }
    }

    /// A reply is in the worker's socket.
    pub(crate) fn reply_arrives(&mut self, call: u32) {
        let now = self.now;
        let book = &mut self.calls[call as usize];
        let worker = book.worker;
        if book.done {
            // The connection was given up, or this is a duplicate: the machine is told something it never asked.
            if book.arrived.is_some() && book.reply.is_none() {
                let fault = StoreFault::NotApplied { error: String::new() };
                if self.processes[worker as usize].stops == 0 {
                    let input = self.fault_input(call, fault);
                    self.input(worker, input);
                }
            }
            return;
        }
        if book.arrived.is_none() {
            book.arrived = Some(now);
            self.drive(worker, Item::Reply(call));
        }
    }
}
