//! The wire tier: the same schedules, history and oracle, but the real driver over a simulated network.
//!
//! Each worker slot is a host that runs [`leasehold::driver::Driver`] on its own tokio runtime with paused time. One
//! host serves the simulated outbox over TCP, another the destinations over HTTP, with hyper on both sides. It is
//! slower by far than the event heap and is there for what that can't test: the driver, cancellation, framing,
//! connections that break.
//!
//! True time passes in ticks of 10 ms; within a tick hosts run one after another, timers have a grain of 1 ms, and
//! faults begin and end between ticks. Settings that leave no room for that are widened first ([`fit`]).
//!
//! A stopped process is one whose futures are not polled: what arrives stays in its sockets. Its driver's own time-outs
//! still fire, so that a store call may be given up, and its connection closed, during a stop.
//!
//! Not to be had here: [`Fault::Duplicate`] (TCP delivers once), a stop before the driver's look at its clock (both
//! kinds of [`Fault::PauseAtSend`] come after it), answers to questions that were never asked, the store's hints, and
//! the bugs that are planted in the event heap's own driver, but for those of the gateway. [`Fault::Loss`] loses whole
//! calls and replies, not segments.

mod endpoint;
mod faults;
mod frame;
mod gateway;
mod hub;
mod outbox;
mod server;

use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use leasehold::driver::Driver;
use leasehold::machine::{Moment, Observation, WorkerId};
use leasehold::ports::{Clock, Events, Observer};
use sim_oracle::{Down, Fact, Oracle, Setup, Violation};
use turmoil::Sim;

use crate::bugs::Place;
use crate::schedule::{Fault, RESTART_AFTER_KILL, Schedule, Settings};
use crate::search::caught;
use crate::store::Store;
use crate::trace::Trace;
use crate::world::{EPOCH, Options, Outcome};
use hub::{Gated, Hub, Shared, lock};

const TICK: u64 = 10_000;
const MS: u64 = 1_000;

/// Widens a schedule's settings so that what needs several ticks has time for it. A schedule that fits is unchanged.
#[must_use]
pub fn fit(schedule: &Schedule) -> Schedule {
    let mut schedule = schedule.clone();
    schedule.settings.iter_mut().for_each(fit_settings);
    schedule
}

/// A connection and a call take four ticks and the store's own time; that must be less than half of `R`.
fn fit_settings(settings: &mut Settings) {
    let least = 120 * MS;
    if settings.store_timeout < least {
        settings.drain_timeout += 2 * (least - settings.store_timeout);
        settings.store_timeout = least;
    }
    settings.fence_margin = settings.fence_margin.max(2 * TICK);
    let most = settings.lease - 2 * settings.store_timeout - settings.fence_margin;
    settings.heartbeat = settings.heartbeat.min(most);
}

/// A worker's clock.
struct LocalClock {
    hub: Shared,
    worker: u32,
}

impl Clock for LocalClock {
    fn now(&self) -> Moment {
        let hub = lock(&self.hub);
        let local = hub.processes[self.worker as usize].clock.at(hub.now());
        Moment::from_micros(u64::try_from(local).unwrap_or(0))
    }
}

/// The oracle sees the world, not what a worker says about it.
struct Silent;

impl Observer for Silent {
    fn observe(&mut self, _: &Observation, _: &Events) {}
}

/// One start of a worker process, from its host's start to its end.
async fn process(hub: Shared, slot: usize) -> turmoil::Result {
    let (worker, settings, mut shutdown) = {
        let hub = lock(&hub);
        let Some(worker) = hub.process_in(slot) else { return Ok(()) };
        let plan = &hub.schedule.settings[hub.schedule.slots[slot].settings];
        let mut settings = plan.worker(hub.schedule.seed)?;
        settings.planted = hub.bug.and_then(|bug| match bug.place() {
            Place::Machine(planted) => Some(planted),
            Place::Store | Place::Driver => None,
        });
        (worker, (settings, plan.request_timeout), hub.processes[worker as usize].shutdown.subscribe())
    };
    let (settings, request_timeout) = settings;
    let request_timeout = Duration::from_micros(request_timeout);
    let driver = Driver {
        outbox: Arc::new(outbox::Client::new(Arc::clone(&hub), worker)),
        gateway: Arc::new(gateway::Sender { hub: Arc::clone(&hub), worker, request_timeout }),
        clock: Arc::new(LocalClock { hub: Arc::clone(&hub), worker }),
        observer: Silent,
    };
    let told = async move {
        let _ = shutdown.wait_for(|told| *told).await;
    };
    let run = driver.run(WorkerId::new(format!("w{worker}")), settings, told);
    Gated::new(&hub, worker, run).await?;
    let mut hub = lock(&hub);
    hub.die(worker, Down::Ended);
    // Its fault may be over already, and was waiting for the drain. Who ended by itself is started as by a timer.
    let pause = if hub.processes[worker as usize].draining { 0 } else { RESTART_AFTER_KILL };
    let at = hub.now() + pause;
    hub.plan(at, hub::Todo::Start(slot));
    Ok(())
}

fn host(slot: usize) -> String {
    format!("w{slot}")
}

/// One run: the hosts, and the controller between their ticks.
struct World {
    schedule: Arc<Schedule>,
    hub: Shared,
    sim: Sim<'static>,
    kept_down: Vec<u32>,
    oracle: Oracle,
    trace: Trace,
    /// The history's numbers of calls, by the hosts'.
    calls: Vec<u32>,
    numbered: u32,
    produced: usize,
    violation: Option<Violation>,
}

/// Runs a schedule.
pub(crate) fn run(schedule: &Schedule, options: Options) -> Outcome {
    World::new(Arc::new(fit(schedule)), options).run()
}

impl World {
    fn new(schedule: Arc<Schedule>, options: Options) -> Self {
        let setup = Setup {
            terms: schedule.settings.iter().map(Settings::terms).collect(),
            epoch: EPOCH,
            checks: options.checks,
            converge_by: Some(schedule.converge_by()),
            roomy: schedule.roomy(),
            slow_rows: schedule.row_takes() > 0,
        };
        let forgets = schedule.faults.iter().any(|timed| matches!(timed.fault, Fault::Failover(..)));
        let store = Store::new(EPOCH, schedule.destinations.len(), forgets, options.bug);
        let hub = Arc::new(Mutex::new(Hub::new(Arc::clone(&schedule), store, options.bug)));
        // A message takes until the next tick. Where `R` leaves room it may take one tick more.
        let roomy = schedule.settings.iter().all(|settings| settings.store_timeout >= 300 * MS);
        let slowest = if roomy && schedule.seed.is_multiple_of(2) { 12 } else { 1 };
        let mut sim = turmoil::Builder::new()
            .rng_seed(schedule.seed)
            .epoch(UNIX_EPOCH + Duration::from_micros(EPOCH as u64))
            .tick_duration(Duration::from_micros(TICK))
            .simulation_duration(Duration::MAX)
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(slowest))
            // A crowd connects within one tick.
            .tcp_capacity(4_096)
            .build();
        let shared = Arc::clone(&hub);
        sim.host("store", move || server::serve(Arc::clone(&shared)));
        let shared = Arc::clone(&hub);
        sim.host("web", move || endpoint::serve(Arc::clone(&shared)));
        for slot in 0..schedule.slots.len() {
            let shared = Arc::clone(&hub);
            sim.host(host(slot), move || process(Arc::clone(&shared), slot));
        }
        Self {
            kept_down: vec![0; schedule.slots.len()],
            schedule,
            hub,
            sim,
            oracle: Oracle::new(setup),
            trace: Trace::new(options.keep),
            calls: vec![0],
            numbered: 0,
            produced: 0,
            violation: None,
        }
    }

    fn settled(&self) -> bool {
        let forgetting =
            self.schedule.faults.iter().filter(|timed| matches!(timed.fault, Fault::Failover(..)));
        let until = forgetting.map(|timed| timed.at.saturating_add(timed.lasts)).max().unwrap_or(0);
        let hub = lock(&self.hub);
        self.produced == self.schedule.events.len()
            && self.oracle.pending() == 0
            && hub.draining == 0
            && hub.tick >= until
    }

    fn run(mut self) -> Outcome {
        let mut steps = 0;
        let panic = caught(|| self.play(&mut steps));
        let now = lock(&self.hub).tick;
        if let Some(panic) = panic {
            self.judge();
            self.violation = Some(Violation { at: now, ..panic });
        }
        Outcome {
            violation: self.violation,
            hash: self.trace.hash(),
            steps,
            ended_at: now,
            stats: self.oracle.stats.clone(),
            facts: self.trace.into_facts(),
        }
    }

    fn play(&mut self, steps: &mut u64) {
        let limit = self.schedule.converge_by() + 1;
        while self.violation.is_none() && lock(&self.hub).tick <= limit && !self.settled() {
            self.control();
            if let Err(error) = self.sim.step() {
                panic!("a host failed: {error}");
            }
            *steps += 1;
            self.judge();
            lock(&self.hub).tick += TICK;
            self.bury();
        }
        if self.violation.is_none() {
            let census = lock(&self.hub).store.census();
            lock(&self.hub).emit(census);
            self.judge();
        }
        let now = lock(&self.hub).tick;
        if self.violation.is_none() {
            self.violation = self.oracle.finish(now).err();
        }
    }

    /// Puts the tick's facts in order of time and has them judged.
    fn judge(&mut self) {
        let mut news = std::mem::take(&mut lock(&self.hub).news);
        news.sort_by_key(|(at, _)| *at);
        for (at, mut fact) in news {
            if self.violation.is_some() {
                return;
            }
            self.number(&mut fact);
            self.trace.push(at, &fact);
            self.violation = self.oracle.observe(at, &fact).err();
        }
    }

    /// Hosts number their calls as they run; the history, in order of time.
    fn number(&mut self, fact: &mut Fact) {
        match fact {
            Fact::CallSent { call, .. } => {
                let host = *call as usize;
                self.calls.resize(self.calls.len().max(host + 1), 0);
                self.calls[host] = self.numbered;
                *call = self.numbered;
                self.numbered += 1;
            }
            Fact::CallAnswered { call, .. }
            | Fact::CallFailed { call, .. }
            | Fact::Claimed { call, .. }
            | Fact::ClaimFailed { call, .. }
            | Fact::Renewed { call, .. }
            | Fact::Settled { call, .. } => *call = self.calls[*call as usize],
            _ => {}
        }
    }
}
