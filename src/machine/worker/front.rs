//! Where in the queue and among the leases a claim starts to read.

use core::time::Duration;

use super::super::time::{Age, Moment};

/// Claims that start ahead of a front take a tenth of the time at the most.
const RESCAN_SHARE: u32 = 10;

/// They start at the beginning, or if that takes too long, at least that long ago,
pub(super) const LEAST_BACK: Duration = Duration::from_secs(64);

/// and at most that long.
const MOST_BACK: Duration = Duration::from_secs(24 * 60 * 60);

/// Where the queue or the leases start for a claim: where the last one left their front, or, from time to time, ahead of
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Front<P> {
    /// Nothing is ahead of it, as far as claims saw.
    pub(super) place: Option<P>,
    /// When a claim starts ahead of it again.
    at: Moment,
    /// When it does if something may have come in far ahead of the front.
    soonest: Moment,
    asked: bool,
    /// How far back it starts; `None` is the beginning.
    pub(super) back: Option<Duration>,
    /// How many such claims had no answer, in a row.
    failures: u32,
}

impl<P: Copy + Ord> Front<P> {
    pub(super) fn new(now: Moment) -> Self {
        Self { place: None, at: now, soonest: now, asked: false, back: None, failures: 0 }
    }

    /// Something may have come in far ahead of the front.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// When a claim is to start ahead of the front because that was asked for.
    pub(super) fn asked_for(&self) -> Option<Moment> {
        self.asked.then_some(self.soonest)
    }

    /// The next claim starts at the beginning.
    pub(super) fn start_over(&mut self) -> (Option<P>, bool) {
        self.asked = false;
        (None, true)
    }

    /// Where the next claim starts, `None` being the beginning, and whether that is ahead of the front. `ago` says what
    /// place has that age. Who knows no front starts at the beginning.
    pub(super) fn start(&mut self, now: Moment, ago: impl Fn(Duration) -> P) -> (Option<P>, bool) {
        let due = now >= if self.asked { self.soonest } else { self.at };
        match self.place {
            Some(place) if !due => (Some(place), false),
            place => {
                self.asked = false;
                (place.zip(self.back.map(ago)).map(|(place, ago)| place.min(ago)), true)
            }
        }
    }

    /// A claim from ahead of the front is over. One that failed may have been cut off, and says little of how long they
    /// take, unless they go on failing. The next one starts less far back if this one might soon be cut off for what it
    /// read there, and else farther.
    pub(super) fn rescanned(&mut self, now: Moment, took: Age, failed: bool, too_far: bool, every: Age) {
        self.failures = if failed { self.failures.saturating_add(1) } else { 0 };
        let share = if failed { 1 << (self.failures - 1).min(4) } else { RESCAN_SHARE };
        self.soonest = now.aged(took.times(share.min(RESCAN_SHARE)));
        // What made a claim from ahead of the front necessary is not answered by one that failed.
        self.at = if failed { self.soonest } else { self.soonest.max(now.aged(every)) };
        if too_far {
            self.back = Some(self.back.map_or(LEAST_BACK, |back| back / 2).max(LEAST_BACK));
        } else if !failed {
            self.back = self.back.map(|back| back * 2).filter(|back| *back <= MOST_BACK);
        }
    }

    /// Whether claims that start ahead of the front start as little ahead of it as any.
    pub(super) fn is_nearest(&self) -> bool {
        self.back == Some(LEAST_BACK)
    }
}
