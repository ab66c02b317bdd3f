//! Shrinking: the smallest schedule that still breaks the same invariant, by delta debugging.

use sim_oracle::Invariant;

use crate::schedule::{Destination, Fault, Manner, Schedule, Timed};
use crate::search::run;
use crate::world::Options;

/// A shrunk schedule and what it took.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The schedule.
    pub schedule: Schedule,
    /// Runs made.
    pub runs: u32,
}

struct Shrinker {
    best: Schedule,
    invariant: Invariant,
    options: Options,
    runs: u32,
    most: u32,
}

impl Shrinker {
    /// Takes a smaller schedule if it still breaks the invariant.
    fn offer(&mut self, schedule: Schedule) -> bool {
        if self.runs >= self.most
            || schedule == self.best
            || schedule.slots.is_empty()
            || schedule.events.is_empty()
        {
            return false;
        }
        self.runs += 1;
        let broken = run(&schedule, self.options).violation.map(|violation| violation.invariant);
        let same = broken == Some(self.invariant);
        if same {
            self.best = schedule;
        }
        same
    }

    /// Delta debugging over a list: drops halves, then quarters, and so on.
    fn drop_from(
        &mut self,
        length: fn(&Schedule) -> usize,
        without: fn(&Schedule, usize, usize) -> Schedule,
    ) {
        let mut size = length(&self.best).div_ceil(2);
        while size >= 1 {
            let mut at = 0;
            while at < length(&self.best) {
                let end = (at + size).min(length(&self.best));
                if !self.offer(without(&self.best, at, end)) {
                    at = end;
                }
            }
            size /= 2;
        }
    }

    fn change(&mut self, change: impl Fn(&mut Schedule)) -> bool {
        let mut schedule = self.best.clone();
        change(&mut schedule);
        self.offer(schedule)
    }

    fn round_times(&mut self) {
        for grain in [1_000_000, 100_000, 10_000, 1_000] {
            let round = |time: u64| if time == u64::MAX { time } else { time / grain * grain };
            for at in 0..self.best.faults.len() {
                self.change(|schedule| {
                    let Timed { at, lasts, .. } = &mut schedule.faults[at];
                    (*at, *lasts) = (round(*at), round(*lasts).max(1));
                });
            }
            for at in 0..self.best.events.len() {
                self.change(|schedule| schedule.events[at].at = round(schedule.events[at].at));
            }
            for at in 0..self.best.slots.len() {
                self.change(|schedule| schedule.slots[at].starts = round(schedule.slots[at].starts));
            }
        }
    }

    fn plain(&mut self) {
        self.change(|schedule| schedule.slots.iter_mut().for_each(|slot| (slot.ppm, slot.clock) = (0, 0)));
        let calm = || Destination { manners: vec![(1, Manner::Ok(10_000, 10_000))] };
        for at in 0..self.best.destinations.len() {
            if !self.change(|schedule| schedule.destinations[at] = calm()) {
                for manner in (0..self.best.destinations[at].manners.len()).rev() {
                    self.change(|schedule| {
                        schedule.destinations[at].manners.remove(manner);
                    });
                }
            }
        }
        for at in 0..self.best.events.len() {
            self.change(|schedule| schedule.events[at].max_attempts = 1);
            self.change(|schedule| (schedule.events[at].delay, schedule.events[at].attempts) = (0, 0));
        }
    }
}

fn without_faults(schedule: &Schedule, from: usize, to: usize) -> Schedule {
    let mut less = schedule.clone();
    less.faults.drain(from..to);
    less
}

fn without_events(schedule: &Schedule, from: usize, to: usize) -> Schedule {
    let mut less = schedule.clone();
    less.events.drain(from..to);
    let (from, to) = (from as u32, to as u32);
    less.faults.retain(|timed| !matches!(timed.fault, Fault::LockRow(event) if (from..to).contains(&event)));
    for timed in &mut less.faults {
        if let Fault::LockRow(event) = &mut timed.fault
            && *event >= to
        {
            *event -= to - from;
        }
    }
    less
}

fn without_slots(schedule: &Schedule, from: usize, to: usize) -> Schedule {
    let mut less = schedule.clone();
    less.slots.drain(from..to);
    less.faults.retain(|timed| slot_of(timed.fault).is_none_or(|slot| !(from..to).contains(&slot)));
    for timed in &mut less.faults {
        if let Some(slot) = slot_mut(&mut timed.fault)
            && *slot >= to
        {
            *slot -= to - from;
        }
    }
    less
}

fn slot_of(mut fault: Fault) -> Option<usize> {
    slot_mut(&mut fault).copied()
}

fn slot_mut(fault: &mut Fault) -> Option<&mut usize> {
    match fault {
        Fault::Crash(slot)
        | Fault::CrashAmid(slot, _)
        | Fault::CrashOnAnswer(slot)
        | Fault::Pause(slot)
        | Fault::PauseAtSend(slot, _)
        | Fault::Suspend(slot)
        | Fault::Starve(slot, _, _)
        | Fault::ClockStep(slot, _)
        | Fault::Drift(slot, _)
        | Fault::Partition(slot, _)
        | Fault::Drain(slot) => Some(slot),
        _ => None,
    }
}

/// Shrinks a schedule that breaks an invariant, with at most so many runs.
pub fn shrink(schedule: &Schedule, invariant: Invariant, options: Options, most: u32) -> Shrunk {
    let options = Options { keep: false, ..options };
    let mut shrinker = Shrinker { best: schedule.clone(), invariant, options, runs: 0, most };
    for _ in 0..3 {
        let before = shrinker.best.clone();
        shrinker.drop_from(|schedule| schedule.faults.len(), without_faults);
        shrinker.drop_from(|schedule| schedule.events.len(), without_events);
        shrinker.drop_from(|schedule| schedule.slots.len(), without_slots);
        shrinker.plain();
        shrinker.round_times();
        if shrinker.best == before {
            break;
        }
    }
    Shrunk { schedule: shrinker.best, runs: shrinker.runs }
}
