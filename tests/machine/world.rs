//! An honest but unkind world around one worker, moved step by step.

use std::time::Duration;

use leasehold::machine::{Action, Answer, AttemptResult, Input, LeaseKey, StoreFault};

use crate::bed::{Bed, settings};

/// One step.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Pass(u64),
    Stop(u64),
    Answer(usize),
    LoseReply(usize),
    LoseCall(usize),
    RefuseCall(usize),
    Respond(usize, u16),
    ConfirmAborts,
    Steal(i64),
    Lock(usize),
    Restart,
    DbMoves(u64),
    Hint,
    Shutdown,
}

fn fail(action: &Action, fault: StoreFault) -> Input {
    match action {
        Action::Claim(request, _) => Input::Claimed { request: *request, reply: Err(fault) },
        Action::Renew(request, _) => Input::Renewed { request: *request, reply: Err(fault) },
        Action::Settle(request, _) => Input::Settled { request: *request, reply: Err(fault) },
        Action::Owned(request, _) => Input::Owned { request: *request, reply: Err(fault) },
        Action::Send { .. } | Action::Abort { .. } | Action::Forget { .. } => Input::Wake,
    }
}

pub(crate) struct World {
    pub(crate) bed: Bed,
    aborting: Vec<LeaseKey>,
    pub(crate) log: Vec<Action>,
    /// Whether every input is followed, and every pause preceded, by wake-ups that nobody asked for.
    spurious: bool,
}

impl World {
    pub(crate) fn new(spurious: bool) -> Self {
        let mut bed = Bed::new(settings());
        for id in 1..=9 {
            bed.add(id, ["http://a", "http://b", "http://c"][id as usize % 3]);
        }
        Self { bed, aborting: Vec::new(), log: Vec::new(), spurious }
    }

    pub(crate) fn give(&mut self, input: Input) {
        let actions = self.bed.give(input);
        self.note(actions);
        if self.spurious {
            let actions = self.bed.wake();
            assert!(actions.is_empty(), "a wake-up right after an input did {actions:?}");
        }
    }

    fn note(&mut self, actions: Vec<Action>) {
        for action in &actions {
            if let Action::Abort { key } = action {
                self.aborting.push(*key);
            }
        }
        self.log.extend(actions);
    }

    fn take(&mut self, at: usize) -> Option<Action> {
        let pending = &mut self.bed.pending;
        (!pending.is_empty()).then(|| pending.remove(at % pending.len()))
    }

    fn pass(&mut self, millis: u64) {
        let until = self.bed.now.after(Duration::from_millis(millis));
        loop {
            let due = self.bed.worker.next_wakeup().filter(|at| *at <= until);
            if self.spurious {
                let target = due.unwrap_or(until).max(self.bed.now);
                let half = target.since(self.bed.now) / 2;
                if half > Duration::ZERO {
                    self.bed.now = self.bed.now.after(half);
                    let actions = self.bed.wake();
                    assert!(actions.is_empty(), "a wake-up before its time did {actions:?}");
                }
            }
            let Some(at) = self.bed.worker.next_wakeup().filter(|at| *at <= until) else { break };
            let before = self.bed.now;
            self.bed.now = self.bed.now.max(at);
            self.give(Input::Wake);
            let next = self.bed.worker.next_wakeup();
            assert!(next.is_none_or(|next| next > before), "asks to be woken for ever");
        }
        self.bed.now = until;
        self.give(Input::Wake);
    }

    pub(crate) fn step(&mut self, step: &Step) {
        match step {
            Step::Pass(millis) => self.pass(*millis),
            Step::Stop(millis) => {
                self.bed.now = self.bed.now.after(Duration::from_millis(*millis));
                self.give(Input::Wake);
            }
            Step::Answer(at) => {
                if let Some(action) = self.take(*at) {
                    let reply = self.bed.apply(action);
                    self.give(reply);
                }
            }
            Step::LoseReply(at) => {
                if let Some(action) = self.take(*at) {
                    self.bed.apply(action.clone());
                    self.give(fail(&action, StoreFault::Unknown { error: "lost".into() }));
                }
            }
            Step::LoseCall(at) => {
                if let Some(action) = self.take(*at) {
                    self.give(fail(&action, StoreFault::NotApplied { error: "down".into() }));
                }
            }
            Step::RefuseCall(at) => {
                if let Some(action) = self.take(*at) {
                    self.give(fail(&action, StoreFault::Permanent { error: "42P01".into() }));
                }
            }
            Step::Respond(at, status) => {
                let open = self.bed.opened();
                if !open.is_empty() {
                    let key = open[at % open.len()];
                    self.aborting.retain(|other| *other != key);
                    self.bed.open.remove(&key);
                    let result = AttemptResult::Responded { status: *status, retry_after: None };
                    self.give(Input::Attempted { key, result });
                }
            }
            Step::ConfirmAborts => {
                for key in std::mem::take(&mut self.aborting) {
                    self.bed.open.remove(&key);
                    self.give(Input::Aborted { key });
                }
            }
            Step::Steal(id) => self.bed.row_mut(*id).token.0 += 1,
            Step::Lock(at) => {
                if let Some(action) = self.take(*at) {
                    let mut reply = self.bed.apply(action);
                    match &mut reply {
                        Input::Renewed { reply: Ok(reply), .. } => {
                            reply.answers.iter_mut().for_each(|(_, answer)| *answer = Answer::Skipped);
                        }
                        Input::Settled { reply: Ok(reply), .. } => {
                            reply.answers.iter_mut().for_each(|(_, answer)| *answer = Answer::Skipped);
                        }
                        _ => {}
                    }
                    self.give(reply);
                }
            }
            Step::Restart => self.bed.incarnation += 1,
            Step::DbMoves(millis) => self.bed.db_ahead += Duration::from_millis(*millis),
            Step::Hint => self.give(Input::Hint),
            Step::Shutdown => self.give(Input::Shutdown),
        }
    }
}
