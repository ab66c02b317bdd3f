//! How much a statement asks for.

/// What a store under load or a slow link does not answer within `R` it answers no sooner the next time: half of a
/// statement that took long and had no answer, a quarter more after each that was full and had one. What was not full
/// shows nothing: a claim that found nothing is always answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Portion(usize);

impl Default for Portion {
    fn default() -> Self {
        Self(usize::MAX)
    }
}

impl Portion {
    /// How much of what there is a statement asks for, at most.
    pub(super) fn of(self, all: usize) -> usize {
        all.min(self.0)
    }

    /// A statement was answered that brought so much.
    pub(super) fn answered(&mut self, brought: usize) {
        if brought >= self.0 {
            self.0 = self.0.saturating_add(self.0 / 4 + 1);
        }
    }

    /// A statement that asked for so much took long.
    pub(super) fn unanswered(&mut self, asked: usize) {
        self.0 = (asked / 2).max(1);
    }
}
