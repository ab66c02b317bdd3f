//! Faults beginning and ending.

use sim_oracle::{Down, Fact, LocalClock, STANDS_STILL};

use crate::process::Item;
use crate::schedule::{Cut, Fault};
use crate::world::{Happening, World};

impl World<'_> {
    fn process_of(&self, slot: usize) -> Option<u32> {
        self.slots.get(slot).and_then(|slot| slot.process)
    }

    pub(crate) fn fault_begins(&mut self, id: u32) {
        let timed = self.schedule.faults[id as usize];
        self.emit(Fact::Disturbed { what: id as u16 });
        match timed.fault {
            Fault::Crash(slot) => {
                self.slots[slot].kept_down += 1;
                if let Some(worker) = self.process_of(slot) {
                    self.crash(worker, Down::Crash);
                }
            }
            Fault::CrashAmid(slot, effects) => {
                if let Some(worker) = self.process_of(slot) {
                    self.processes[worker as usize].crash_amid = Some(effects);
                }
            }
            Fault::CrashOnAnswer(slot) => {
                if let Some(worker) = self.process_of(slot) {
                    self.processes[worker as usize].crash_on_answer = true;
                }
            }
            Fault::Pause(slot) => {
                if let Some(worker) = self.process_of(slot) {
                    self.stop(worker);
                    self.after(timed.lasts, Happening::Continue(worker));
                }
            }
            Fault::PauseAtSend(slot, before) => {
                if let Some(worker) = self.process_of(slot) {
                    self.processes[worker as usize].pause_at_send = Some((timed.lasts, before));
                }
            }
            Fault::Suspend(slot) => {
                if let Some(worker) = self.process_of(slot) {
                    self.stop(worker);
                    self.set_clock(worker, 0, STANDS_STILL);
                    self.after(timed.lasts, Happening::Continue(worker));
                }
            }
            Fault::Starve(..) => self.starve_turn(id, true),
            Fault::ClockStep(slot, by) => {
                if let Some(worker) = self.process_of(slot) {
                    let ppm = self.processes[worker as usize].clock.ppm();
                    self.set_clock(worker, by, ppm);
                }
            }
            Fault::Drift(slot, ppm) => {
                if let Some(worker) = self.process_of(slot) {
                    self.set_clock(worker, 0, ppm);
                }
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
            | Fault::Weight(_) => self.weather.set(timed.fault, true),
            Fault::LockRow(event) => {
                if self.store.lock_outside(event) {
                    self.emit(Fact::RowLocked { event });
                }
            }
            Fault::DbStep(by) => {
                self.store.clock.step(self.now, by);
                self.emit(Fact::DbStepped { by });
            }
            Fault::Restart | Fault::Failover(..) => {
                if self.store.up {
                    self.store.go_down(&mut self.facts);
                    self.emit_store_facts();
                }
            }
            Fault::ReadOnly => self.store.read_only = true,
            Fault::Manner(destination, manner) => self.manners[usize::from(destination)] = Some(manner),
            Fault::Drain(slot) => {
                self.slots[slot].kept_down += 1;
                if let Some(worker) = self.process_of(slot) {
                    self.drive(worker, Item::Shutdown);
                }
            }
        }
    }

    pub(crate) fn fault_ends(&mut self, id: u32) {
        let timed = self.schedule.faults[id as usize];
        self.emit(Fact::Disturbed { what: id as u16 });
        match timed.fault {
            Fault::Crash(slot) | Fault::Drain(slot) => {
                self.slots[slot].kept_down = self.slots[slot].kept_down.saturating_sub(1);
                self.start(slot);
            }
            Fault::CrashAmid(slot, _) | Fault::CrashOnAnswer(slot) => {
                if let Some(worker) = self.process_of(slot) {
                    let process = &mut self.processes[worker as usize];
                    (process.crash_amid, process.crash_on_answer) = (None, false);
                }
                self.start(slot);
            }
            Fault::PauseAtSend(slot, _) => {
                if let Some(worker) = self.process_of(slot) {
                    self.processes[worker as usize].pause_at_send = None;
                }
            }
            Fault::Suspend(slot) | Fault::Drift(slot, _) => {
                if let Some(worker) = self.process_of(slot) {
                    let ppm = self.schedule.slots[slot].ppm;
                    self.set_clock(worker, 0, ppm);
                }
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
            | Fault::Weight(_) => self.weather.set(timed.fault, false),
            Fault::LockRow(event) => {
                if (event as usize) < self.schedule.events.len() {
                    let (freed, next) = self.store.unlock_outside(event);
                    if freed {
                        self.emit(Fact::RowUnlocked { event });
                    }
                    self.go_on(next);
                }
            }
            Fault::Restart | Fault::Failover(..) => self.database_up(timed.at, timed.fault),
            Fault::ReadOnly => self.store.read_only = false,
            Fault::Manner(destination, _) => self.manners[usize::from(destination)] = None,
        }
    }

    fn database_up(&mut self, down_at: u64, fault: Fault) {
        if self.store.up {
            return;
        }
        let mut forgotten = None;
        if let Fault::Failover(lost, step) = fault {
            forgotten = Some(down_at.saturating_sub(lost));
            if step != 0 {
                self.store.clock.step(self.now, step);
                self.emit(Fact::DbStepped { by: step });
            }
        }
        self.store.come_up(self.now, forgotten, &mut self.facts);
        self.emit_store_facts();
    }

    fn cut(&mut self, slot: usize, cut: Cut, on: bool) {
        let state = &mut self.slots[slot];
        if cut != Cut::FromStore {
            state.cut_to = on;
        }
        if cut != Cut::ToStore {
            state.cut_from = on;
        }
    }

    fn set_clock(&mut self, worker: u32, step: i64, ppm: i32) {
        let now = self.now;
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        let local = process.clock.at(now).saturating_add(step).max(0);
        process.clock = LocalClock::new(now, local, ppm);
        self.emit(Fact::WorkerClock { worker, local, ppm });
        self.rearm(worker);
    }

    /// A starved process stops or gets its turn, again and again until the fault ends.
    pub(crate) fn starve_turn(&mut self, id: u32, stop: bool) {
        let timed = self.schedule.faults[id as usize];
        let Fault::Starve(slot, on, off) = timed.fault else { return };
        let over = self.now >= timed.at.saturating_add(timed.lasts);
        let Some(worker) = self.process_of(slot).filter(|_| !over || !stop) else { return };
        if stop {
            self.stop(worker);
            self.after(off, Happening::Continue(worker));
            self.after(off + on, Happening::StarveTurn(id, true));
        }
    }
}
