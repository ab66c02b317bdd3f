//! What the hosts of a run share: the history, the processes with their gates and clocks, the store's rows.
//!
//! Hosts run one after another within a tick, so facts are gathered and put in order of time before they are judged.
//! No host can notice: a message takes until the next tick at least.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use sim_oracle::{Down, Fact, LocalClock, STANDS_STILL};
use tokio::sync::{oneshot, watch};

use crate::bugs::Bug;
use crate::rng::Rng;
use crate::schedule::{Manner, Schedule};
use crate::statement::Statement;
use crate::store::Store;
use crate::world::Weather;

/// One start of a worker process.
pub(super) struct Process {
    pub(super) slot: usize,
    pub(super) clock: LocalClock,
    pub(super) dead: bool,
    pub(super) draining: bool,
    pub(super) shutdown: watch::Sender<bool>,
    /// Crash after so many more effects.
    pub(super) crash_amid: Option<u32>,
    pub(super) crash_on_answer: bool,
    /// Stop before the next request's first byte, for so long.
    pub(super) pause_at_send: Option<u64>,
    stops: u32,
    waiting: Vec<Waker>,
}

/// What the run's controller does at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Todo {
    Start(usize),
    Produce(u32),
    FaultBegins(u32),
    FaultEnds(u32),
    StarveTurn(u32),
    Continue(u32),
    Kill(u32, u32),
    Healed,
}

/// See the module's documentation.
pub(super) struct Hub {
    pub(super) schedule: Arc<Schedule>,
    /// When the tick under way began.
    pub(super) tick: u64,
    pub(super) store: Store,
    pub(super) bug: Option<Bug>,
    pub(super) weather: Weather,
    pub(super) statements: BTreeMap<u32, Statement>,
    pub(super) waiting: BTreeMap<u32, oneshot::Sender<()>>,
    pub(super) processes: Vec<Process>,
    pub(super) manners: Vec<Option<Manner>>,
    pub(super) kills: Vec<u32>,
    pub(super) draws: Rng,
    pub(super) agenda: BTreeMap<(u64, u32), Todo>,
    pub(super) draining: u32,
    /// Slots whose process died in this tick.
    pub(super) fallen: Vec<usize>,
    planned: u32,
    calls: u32,
    pub(super) news: Vec<(u64, Fact)>,
}

/// The hub as hosts hold it.
pub(super) type Shared = Arc<Mutex<Hub>>;

/// The hub for a moment. A lock that a panic poisoned is of no concern: the run is over then.
pub(super) fn lock(hub: &Shared) -> MutexGuard<'_, Hub> {
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    pub(super) fn new(schedule: Arc<Schedule>, store: Store, bug: Option<Bug>) -> Self {
        let mut hub = Self {
            tick: 0,
            store,
            bug,
            weather: Weather::default(),
            statements: BTreeMap::new(),
            waiting: BTreeMap::new(),
            processes: Vec::new(),
            manners: vec![None; schedule.destinations.len()],
            kills: schedule.events.iter().map(|event| event.kills).collect(),
            draws: Rng::new(schedule.seed, "wire"),
            agenda: BTreeMap::new(),
            draining: 0,
            fallen: Vec::new(),
            planned: 0,
            calls: 0,
            news: Vec::new(),
            schedule: Arc::clone(&schedule),
        };
        for (slot, plan) in schedule.slots.iter().enumerate() {
            hub.plan(plan.starts, Todo::Start(slot));
        }
        for (event, plan) in schedule.events.iter().enumerate() {
            hub.plan(plan.at, Todo::Produce(event as u32));
        }
        for (fault, timed) in schedule.faults.iter().enumerate() {
            hub.plan(timed.at, Todo::FaultBegins(fault as u32));
            if timed.lasts != u64::MAX {
                hub.plan(timed.at + timed.lasts, Todo::FaultEnds(fault as u32));
            }
        }
        hub.plan(schedule.heal_at, Todo::Healed);
        hub
    }

    /// True time. Between ticks, and while a crash drops what a host had, it is the tick's beginning.
    pub(super) fn now(&self) -> u64 {
        turmoil::sim_elapsed().map_or(self.tick, |elapsed| elapsed.as_micros() as u64)
    }

    /// Has the controller do something at the first tick from then on.
    pub(super) fn plan(&mut self, at: u64, todo: Todo) {
        self.planned += 1;
        self.agenda.insert((at, self.planned), todo);
    }

    /// Takes a fact for the history.
    pub(super) fn emit(&mut self, fact: Fact) {
        let now = self.now();
        self.news.push((now, fact));
    }

    /// The same for what a process does, unless it is dead.
    pub(super) fn emit_of(&mut self, worker: u32, fact: Fact) {
        if !self.processes[worker as usize].dead {
            self.emit(fact);
        }
    }

    /// Starts a process in a slot; its host is to run it.
    pub(super) fn enrol(&mut self, slot: usize) -> u32 {
        let worker = self.processes.len() as u32;
        let plan = &self.schedule.slots[slot];
        let local = (plan.clock + self.tick) as i64;
        let (terms, ppm) = (plan.settings as u16, plan.ppm);
        self.processes.push(Process {
            slot,
            clock: LocalClock::new(self.tick, local, ppm),
            dead: false,
            draining: false,
            shutdown: watch::Sender::new(false),
            crash_amid: None,
            crash_on_answer: false,
            pause_at_send: None,
            stops: 0,
            waiting: Vec::new(),
        });
        self.emit(Fact::WorkerUp { worker, slot: slot as u16, terms, local, ppm });
        worker
    }

    /// The process in a slot, if one runs there.
    pub(super) fn process_in(&self, slot: usize) -> Option<u32> {
        let found = self.processes.iter().rposition(|process| process.slot == slot && !process.dead);
        found.map(|worker| worker as u32)
    }

    /// The process does nothing more. Its host is crashed when the tick is over, which closes its sockets.
    pub(super) fn die(&mut self, worker: u32, how: Down) {
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        process.dead = true;
        self.draining -= u32::from(process.draining);
        self.fallen.push(process.slot);
        self.emit(Fact::WorkerDown { worker, how });
    }

    /// The process is stopped once more.
    pub(super) fn stop(&mut self, worker: u32) {
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        process.stops += 1;
        if process.stops == 1 {
            self.emit(Fact::WorkerStopped { worker });
        }
    }

    /// One stop less.
    pub(super) fn go_on(&mut self, worker: u32) {
        let process = &mut self.processes[worker as usize];
        if process.dead || process.stops == 0 {
            return;
        }
        process.stops -= 1;
        if process.stops == 0 {
            process.waiting.drain(..).for_each(Waker::wake);
            self.emit(Fact::WorkerContinued { worker });
        }
    }

    /// Whether a process may not run. If so, the task is woken when it goes on.
    pub(super) fn gated(&mut self, worker: u32, context: &Context<'_>) -> bool {
        let process = &mut self.processes[worker as usize];
        let gated = process.dead || process.stops > 0;
        if gated && !process.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            process.waiting.push(context.waker().clone());
        }
        gated
    }

    /// Touches a process's clock.
    pub(super) fn set_clock(&mut self, worker: u32, step: i64, ppm: Option<i32>) {
        let now = self.now();
        let process = &mut self.processes[worker as usize];
        if process.dead {
            return;
        }
        let ppm = ppm.unwrap_or(process.clock.ppm()).max(STANDS_STILL);
        let local = process.clock.at(now).saturating_add(step).max(0);
        process.clock = LocalClock::new(now, local, ppm);
        self.emit(Fact::WorkerClock { worker, local, ppm });
    }

    /// A number for a store call; the history numbers calls anew, in order of time.
    pub(super) fn new_call(&mut self) -> u32 {
        self.calls += 1;
        self.calls
    }

    /// Writes what the store did.
    pub(super) fn with_store<T>(&mut self, change: impl FnOnce(&mut Store, u64, &mut Vec<Fact>) -> T) -> T {
        let now = self.now();
        let mut facts = Vec::new();
        let result = change(&mut self.store, now, &mut facts);
        self.news.extend(facts.into_iter().map(|fact| (now, fact)));
        result
    }

    /// Statements that had waited for a lock have their turn.
    pub(super) fn wake_statements(&mut self, ids: impl IntoIterator<Item = u32>) {
        for id in ids {
            if let Some(waiting) = self.waiting.remove(&id) {
                let _ = waiting.send(());
            }
        }
    }

    /// How the destination of an event will treat a request.
    pub(super) fn draw_manner(&mut self, event: u32) -> Manner {
        let destination = usize::from(self.schedule.events[event as usize].destination);
        let manner = self.manners[destination];
        manner.unwrap_or_else(|| self.schedule.destinations[destination].draw(&mut self.draws))
    }
}

/// A process is about to do something to the world: it may die right before.
pub(super) async fn effect(hub: &Shared, worker: u32) {
    let dead = {
        let mut hub = lock(hub);
        match &mut hub.processes[worker as usize].crash_amid {
            Some(0) => hub.die(worker, Down::Crash),
            Some(left) => *left -= 1,
            None => {}
        }
        hub.processes[worker as usize].dead
    };
    if dead {
        std::future::pending::<()>().await;
    }
}

/// A future of a process: it runs while the process does. Everything that a process does goes through one.
pub(super) struct Gated<F> {
    hub: Shared,
    worker: u32,
    inner: Pin<Box<F>>,
}

impl<F> Gated<F> {
    pub(super) fn new(hub: &Shared, worker: u32, inner: F) -> Self {
        Self { hub: Arc::clone(hub), worker, inner: Box::pin(inner) }
    }
}

impl<F: Future> Future for Gated<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        if lock(&self.hub).gated(self.worker, context) {
            return Poll::Pending;
        }
        let output = self.inner.as_mut().poll(context);
        // It may have died, or been stopped, in what it just did.
        if output.is_ready() && lock(&self.hub).processes[self.worker as usize].dead {
            return Poll::Pending;
        }
        output
    }
}
