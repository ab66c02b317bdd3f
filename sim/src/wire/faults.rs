//! What the controller does between ticks: processes start, events are produced, faults begin and end.

use std::sync::Arc;

use sim_oracle::{Down, Fact, STANDS_STILL};

use super::hub::{Hub, Todo, lock};
use super::{World, host};
use crate::schedule::{Cut, Fault, RESTART_AFTER_KILL};

impl World {
    /// Does what is due by now.
    pub(super) fn control(&mut self) {
        let hub = Arc::clone(&self.hub);
        let next = || lock(&hub).next_due();
        while let Some(todo) = next() {
            match todo {
                Todo::Start(slot) => self.start(slot),
                Todo::Produce(event) => self.produce(event),
                Todo::FaultBegins(fault) => self.fault_begins(fault),
                Todo::FaultEnds(fault) => self.fault_ends(fault),
                Todo::StarveTurn(fault) => self.starve_turn(fault),
                Todo::Continue(worker) => lock(&self.hub).go_on(worker),
                Todo::Kill(worker, event) => self.kill(worker, event),
                Todo::Healed => lock(&self.hub).emit(Fact::Healed),
            }
        }
        self.bury();
    }

    /// Crashes the hosts of processes that died: their sockets close.
    pub(super) fn bury(&mut self) {
        let fallen = std::mem::take(&mut lock(&self.hub).fallen);
        fallen.into_iter().for_each(|slot| self.sim.crash(host(slot)));
    }

    /// Starts a process in a slot, unless one runs there or a fault keeps it down.
    fn start(&mut self, slot: usize) {
        if self.kept_down[slot] > 0 || lock(&self.hub).process_in(slot).is_some() {
            return;
        }
        self.bury();
        lock(&self.hub).enrol(slot);
        self.sim.bounce(host(slot));
    }

    fn produce(&mut self, event: u32) {
        let mut hub = lock(&self.hub);
        let plan = self.schedule.events[event as usize];
        let now = hub.tick;
        self.produced += 1;
        let due = hub.store.insert(now, &plan);
        hub.emit(plan.committed(event, due));
    }

    fn kill(&mut self, worker: u32, event: u32) {
        let mut hub = lock(&self.hub);
        if !hub.processes[worker as usize].dead {
            hub.die(worker, Down::Poison(event));
            let (slot, at) = (hub.processes[worker as usize].slot, hub.tick + RESTART_AFTER_KILL);
            hub.plan(at, Todo::Start(slot));
        }
    }

    fn fault_begins(&mut self, id: u32) {
        let timed = self.schedule.faults[id as usize];
        let mut hub = lock(&self.hub);
        hub.emit(Fact::Disturbed { what: id as u16 });
        let ends = hub.tick.saturating_add(timed.lasts);
        match timed.fault {
            Fault::Crash(slot) => {
                self.kept_down[slot] += 1;
                if let Some(worker) = hub.process_in(slot) {
                    hub.die(worker, Down::Crash);
                }
            }
            Fault::CrashAmid(slot, effects) => {
                hub.with(slot, |hub, worker| hub.processes[worker].crash_amid = Some(effects));
            }
            Fault::CrashOnAnswer(slot) => {
                hub.with(slot, |hub, worker| hub.processes[worker].crash_on_answer = true);
            }
            Fault::Pause(slot) => hub.pause(slot, ends),
            Fault::PauseAtSend(slot, _) => {
                hub.with(slot, |hub, worker| hub.processes[worker].pause_at_send = Some(timed.lasts));
            }
            Fault::Suspend(slot) => {
                hub.pause(slot, ends);
                hub.with(slot, |hub, worker| hub.set_clock(worker as u32, 0, Some(STANDS_STILL)));
            }
            Fault::Starve(..) => {
                drop(hub);
                self.starve_turn(id);
            }
            Fault::ClockStep(slot, by) => {
                hub.with(slot, |hub, worker| hub.set_clock(worker as u32, by, None));
            }
            Fault::Drift(slot, ppm) => {
                hub.with(slot, |hub, worker| hub.set_clock(worker as u32, 0, Some(ppm)));
            }
            Fault::Partition(slot, cut) => self.cut(slot, cut, true),
            Fault::Loss(_)
            | Fault::Duplicate(_)
            | Fault::LostReply(_)
            | Fault::LateCommit(..)
            | Fault::Abort(_)
            | Fault::Delay(_)
            | Fault::LateCall(..)
            | Fault::Stall(_)
            | Fault::Weight(_) => hub.weather.set(timed.fault, true),
            Fault::LockRow(event) => {
                if hub.store.lock_outside(event) {
                    hub.emit(Fact::RowLocked { event });
                }
            }
            Fault::DbStep(by) => hub.step_database(by),
            Fault::Restart | Fault::Failover(..) => {
                if hub.store.up {
                    hub.with_store(|store, _, facts| store.go_down(facts));
                    hub.statements.clear();
                    hub.waiting.clear();
                    drop(hub);
                    self.sim.bounce("store");
                }
            }
            Fault::ReadOnly => hub.store.read_only = true,
            Fault::Manner(destination, manner) => hub.manners[usize::from(destination)] = Some(manner),
            Fault::Drain(slot) => {
                self.kept_down[slot] += 1;
                hub.with(slot, Hub::drain);
            }
        }
    }

    fn fault_ends(&mut self, id: u32) {
        let timed = self.schedule.faults[id as usize];
        let mut hub = lock(&self.hub);
        hub.emit(Fact::Disturbed { what: id as u16 });
        match timed.fault {
            Fault::Crash(slot) | Fault::Drain(slot) => {
                drop(hub);
                self.kept_down[slot] = self.kept_down[slot].saturating_sub(1);
                self.start(slot);
            }
            Fault::CrashAmid(slot, _) | Fault::CrashOnAnswer(slot) => {
                hub.with(slot, |hub, worker| {
                    let process = &mut hub.processes[worker];
                    (process.crash_amid, process.crash_on_answer) = (None, false);
                });
                drop(hub);
                self.start(slot);
            }
            Fault::PauseAtSend(slot, _) => {
                hub.with(slot, |hub, worker| hub.processes[worker].pause_at_send = None);
            }
            Fault::Suspend(slot) | Fault::Drift(slot, _) => {
                let ppm = self.schedule.slots[slot].ppm;
                hub.with(slot, |hub, worker| hub.set_clock(worker as u32, 0, Some(ppm)));
            }
            Fault::Pause(_) | Fault::Starve(..) | Fault::ClockStep(..) | Fault::DbStep(_) => {}
            Fault::Partition(slot, cut) => self.cut(slot, cut, false),
            Fault::Loss(_)
            | Fault::Duplicate(_)
            | Fault::LostReply(_)
            | Fault::LateCommit(..)
            | Fault::Abort(_)
            | Fault::Delay(_)
            | Fault::LateCall(..)
            | Fault::Stall(_)
            | Fault::Weight(_) => hub.weather.set(timed.fault, false),
            Fault::LockRow(event) => {
                let (freed, next) = hub.store.unlock_outside(event);
                if freed {
                    hub.emit(Fact::RowUnlocked { event });
                }
                hub.wake_statements(next);
            }
            Fault::Restart | Fault::Failover(..) => hub.database_up(timed.at, timed.fault),
            Fault::ReadOnly => hub.store.read_only = false,
            Fault::Manner(destination, _) => hub.manners[usize::from(destination)] = None,
        }
    }

    fn cut(&self, slot: usize, cut: Cut, on: bool) {
        let (worker, store) = (host(slot), "store");
        if cut != Cut::FromStore {
            if on {
                self.sim.partition_oneway(worker.as_str(), store);
            } else {
                self.sim.repair_oneway(worker.as_str(), store);
            }
        }
        if cut != Cut::ToStore {
            if on {
                self.sim.partition_oneway(store, worker.as_str());
            } else {
                self.sim.repair_oneway(store, worker.as_str());
            }
        }
    }

    /// A starved process is stopped once more, until the fault ends.
    fn starve_turn(&mut self, id: u32) {
        let timed = self.schedule.faults[id as usize];
        let Fault::Starve(slot, on, off) = timed.fault else { return };
        let mut hub = lock(&self.hub);
        let now = hub.tick;
        if now < timed.at.saturating_add(timed.lasts) && hub.process_in(slot).is_some() {
            hub.pause(slot, now + off);
            hub.plan(now + off + on, Todo::StarveTurn(id));
        }
    }
}

impl Hub {
    fn next_due(&mut self) -> Option<Todo> {
        let first = self.agenda.first_entry()?;
        (first.key().0 <= self.tick).then(|| first.remove())
    }

    /// Does something to the process in a slot, if one runs there.
    fn with(&mut self, slot: usize, change: impl FnOnce(&mut Self, usize)) {
        if let Some(worker) = self.process_in(slot) {
            change(self, worker as usize);
        }
    }

    fn pause(&mut self, slot: usize, until: u64) {
        if let Some(worker) = self.process_in(slot) {
            self.stop(worker);
            self.plan(until, Todo::Continue(worker));
        }
    }

    fn drain(&mut self, worker: usize) {
        let process = &mut self.processes[worker];
        if !std::mem::replace(&mut process.draining, true) {
            process.shutdown.send_replace(true);
            self.draining += 1;
            self.emit(Fact::DrainBegan { worker: worker as u32 });
        }
    }

    fn step_database(&mut self, by: i64) {
        self.store.clock.step(self.tick, by);
        self.emit(Fact::DbStepped { by });
    }

    fn database_up(&mut self, down_at: u64, fault: Fault) {
        if self.store.up {
            return;
        }
        let mut forgotten = None;
        if let Fault::Failover(lost, step) = fault {
            forgotten = Some(down_at.saturating_sub(lost));
            if step != 0 {
                self.step_database(step);
            }
        }
        self.with_store(|store, now, facts| store.come_up(now, forgotten, facts));
    }
}
