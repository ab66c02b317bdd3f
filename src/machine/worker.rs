//! The worker machine.

use super::id::WorkerId;
use super::io::{Action, Input, Observation};
use super::settings::WorkerSettings;
use super::time::Moment;

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Requests that the drain had to abort.
    pub aborted: u32,
    /// Leases whose outcome was not settled when the drain's timeout came.
    pub unsettled: u32,
}

/// One worker's decisions.
#[derive(Debug)]
pub struct Worker {}

impl Worker {
    /// A worker that has just started.
    pub fn new(_id: WorkerId, _settings: WorkerSettings, _now: Moment) -> Self {
        Self {}
    }
    /// Takes one input.
    pub fn handle(&mut self, _now: Moment, _input: Input) {}
    /// The next thing to do; call until `None` after each [`Self::handle`].
    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        None
    }
    /// The next thing worth logging.
    #[must_use]
    pub fn poll_observation(&mut self) -> Option<Observation> {
        None
    }
    /// When to call [`Self::handle`] with [`Input::Wake`] at the latest.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Moment> {
        None
    }
    /// Set once the worker has nothing left to do (drained, or the outbox is empty).
    pub fn ended(&self) -> Option<Ended> {
        None
    }
    /// Panics if a whole-state invariant is broken.
    pub fn assert_invariants(&self) {}
}
