//! Clocks as they truly ran.

use crate::fact::{DbMicros, Micros};

/// A worker's own clock: linear since it was last touched.
#[derive(Clone, Copy, Debug)]
pub struct LocalClock {
    since: Micros,
    local: i64,
    ppm: i64,
}

/// A rate at which a clock stands still.
pub const STANDS_STILL: i32 = -1_000_000;

impl LocalClock {
    /// A clock that shows `local` at `at` and gains `ppm`.
    pub fn new(at: Micros, local: i64, ppm: i32) -> Self {
        Self { since: at, local, ppm: i64::from(ppm) }
    }

    /// What it shows at a true time not before it was last touched.
    pub fn at(&self, time: Micros) -> i64 {
        let passed = time.saturating_sub(self.since) as i64;
        if self.ppm == 0 {
            return self.local + passed;
        }
        self.local + passed + (passed * self.ppm).div_euclid(1_000_000)
    }

    /// When it was last touched.
    pub(crate) fn touched_at(&self) -> Micros {
        self.since
    }

    /// The first true time at which it shows at least `local`; `None` if it stands still before that.
    pub fn when(&self, local: i64) -> Option<Micros> {
        let ahead = local - self.local;
        if ahead <= 0 {
            return Some(self.since);
        }
        if self.ppm == 0 {
            return Some(self.since + ahead as u64);
        }
        let rate = 1_000_000 + self.ppm;
        if rate <= 0 {
            return None;
        }
        let passed = (i128::from(ahead) * 1_000_000 / i128::from(rate)) as u64;
        let mut time = self.since + passed.saturating_sub(1);
        while self.at(time) < local {
            time += 1;
        }
        Some(time)
    }

    /// Its rate.
    pub fn ppm(&self) -> i32 {
        self.ppm as i32
    }
}

/// The database's clock: true time and an offset that is stepped.
#[derive(Clone, Debug)]
pub struct DbClockModel {
    /// (from when, offset), the first one from 0.
    steps: Vec<(Micros, i64)>,
    /// The last one.
    last: (Micros, i64),
}

impl DbClockModel {
    /// A clock that shows `epoch` at the beginning.
    pub fn new(epoch: DbMicros) -> Self {
        Self { steps: vec![(0, epoch)], last: (0, epoch) }
    }

    /// What it shows, or showed.
    pub fn at(&self, time: Micros) -> DbMicros {
        if time >= self.last.0 {
            return time as i64 + self.last.1;
        }
        let step = self.steps.iter().rev().find(|(from, _)| *from <= time);
        time as i64 + step.map_or(0, |(_, offset)| *offset)
    }

    /// Steps it.
    pub fn step(&mut self, at: Micros, by: i64) {
        self.last = (at, self.last.1 + by);
        self.steps.push(self.last);
    }

    /// The sum of the sizes of all steps at or after `since`.
    pub fn stepped_since(&self, since: Micros) -> u64 {
        let pairs = self.steps.windows(2).filter(|pair| pair[1].0 >= since);
        pairs.map(|pair| (pair[1].1 - pair[0].1).unsigned_abs()).sum()
    }
}
