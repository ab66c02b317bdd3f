//! The world of the event-heap tier: workers, store, destinations and faults, in simulated microseconds.

use std::cmp::Reverse;
use std::collections::VecDeque;

use leasehold::machine::WorkerSettings;
use sim_oracle::{Checks, Fact, Invariant, Lane, Oracle, Setup, Stats, Violation};

use crate::bugs::{Bug, Place};
use crate::process::{Item, Process, Request};
use crate::rng::Rng;
use crate::schedule::{Fault, Manner, Schedule};
use crate::search::caught;
use crate::statement::{Reply, Statement};
use crate::store::Store;
use crate::trace::Trace;

/// What the database's clock shows when a run begins.
pub const EPOCH: i64 = 1_700_000_000_000_000;

/// More events than any run needs. Who holds leases wakes every half of `M`, which may be a millisecond: two million were
/// not enough for four minutes of four workers.
const MOST_STEPS: u64 = 10_000_000;

/// Which simulator runs a schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// The machines alone, from an event heap.
    #[default]
    Des,
    /// The real driver, over a simulated network.
    Wire,
}

impl Tier {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Des => "des",
            Self::Wire => "wire",
        }
    }
}

impl std::str::FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = [Self::Des, Self::Wire].into_iter().find(|tier| tier.name() == text);
        named.ok_or_else(|| format!("no tier is called {text:?}; there are des and wire"))
    }
}

/// How a run is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// By which simulator.
    pub tier: Tier,
    /// Which invariants are checked.
    pub checks: Checks,
    /// Keep the facts.
    pub keep: bool,
    /// Plant this bug.
    pub bug: Option<Bug>,
    /// Have the machines check themselves at every so manyth input.
    pub check_machines_every: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { tier: Tier::Des, checks: Checks::ALL, keep: false, bug: None, check_machines_every: 32 }
    }
}

/// What a run showed.
#[derive(Debug)]
pub struct Outcome {
    /// The broken invariant, if one was.
    pub violation: Option<Violation>,
    /// The hash of the whole trace.
    pub hash: u64,
    /// Events of the heap that were handled.
    pub steps: u64,
    /// When the run ended, in simulated time.
    pub ended_at: u64,
    /// What was tested, excused and visited.
    pub stats: Stats,
    /// The facts, if they were to be kept.
    pub facts: Vec<(u64, Fact)>,
}

/// What happens at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    Start(u32),
    Produce(u32),
    FaultBegins(u32),
    FaultEnds(u32),
    StarveTurn(u32, bool),
    /// For a process: something that its driver does.
    Driver(u32, Item),
    /// The timer of the process in a slot.
    Wake(u32),
    Arrive(u32),
    LocksTurn(u32),
    Commit(u32),
    Cancel(u32, u32),
    ReplyArrives(u32),
    ResponseArrives(u32),
    Kill(u32, u32),
    Continue(u32),
    Healed,
}

/// When it is something's turn to happen.
#[derive(Clone, Copy, Debug)]
struct Turn {
    time: u64,
    /// Counts what was to happen: equal times are ordered by it and the seed.
    seq: u32,
}

/// Of what never happens.
const NEVER: Turn = Turn { time: u64::MAX, seq: 0 };

impl Turn {
    /// Whether it comes before another one. Equal times are few: what orders them is worked out only where it matters.
    fn is_before(self, other: Self, ties: u64) -> bool {
        self.time <= other.time && (self.time < other.time || self.tie(ties) < other.tie(ties))
    }

    #[cold]
    #[inline(never)]
    fn tie(self, ties: u64) -> (u64, u32) {
        (mix(ties ^ u64::from(self.seq)) >> 32, self.seq)
    }
}

/// Bits that look random (the finaliser of SplitMix64): enough to order equal times, and far cheaper than a draw.
fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A happening at its time.
#[derive(Clone, Copy, Debug)]
struct Due {
    turn: Turn,
    happening: Happening,
}

/// One store call, as its client and the network know it.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) worker: u32,
    pub(crate) request: leasehold::machine::RequestId,
    pub(crate) done: bool,
    pub(crate) arrived: Option<u64>,
    pub(crate) reply: Option<Box<Reply>>,
    pub(crate) lane: Lane,
    pub(crate) statement: u32,
}

/// What the weather is like: rates of faults that are on now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    pub(crate) loss: u32,
    pub(crate) duplicate: u32,
    pub(crate) lost_reply: u32,
    pub(crate) late_commit: (u32, u64),
    pub(crate) abort: u32,
    pub(crate) delay: u64,
    pub(crate) late_call: (u32, u64),
    pub(crate) stall: u64,
    pub(crate) weight: u64,
}

impl Weather {
    /// A fault of this kind begins or ends; no other changes anything.
    pub(crate) fn set(&mut self, fault: Fault, on: bool) {
        let rate = |rate| if on { rate } else { 0 };
        let time = |time| if on { time } else { 0 };
        match fault {
            Fault::Loss(of) => self.loss = rate(of),
            Fault::Duplicate(of) => self.duplicate = rate(of),
            Fault::LostReply(of) => self.lost_reply = rate(of),
            Fault::LateCommit(of, by) => self.late_commit = (rate(of), time(by)),
            Fault::Abort(of) => self.abort = rate(of),
            Fault::Delay(most) => self.delay = time(most),
            Fault::LateCall(of, by) => self.late_call = (rate(of), time(by)),
            Fault::Stall(most) => self.stall = time(most),
            Fault::Weight(row) => self.weight = time(row),
            _ => {}
        }
    }
}

/// A worker's place.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SlotState {
    pub(crate) process: Option<u32>,
    pub(crate) cut_to: bool,
    pub(crate) cut_from: bool,
    /// A fault keeps it down.
    pub(crate) kept_down: u32,
}

/// See the module's documentation.
pub struct World<'a> {
    pub(crate) schedule: &'a Schedule,
    pub(crate) options: Options,
    pub(crate) now: u64,
    seq: u32,
    /// From the seed: what equal times are ordered by.
    ties: u64,
    pub(crate) net: Rng,
    pub(crate) pace: Rng,
    pub(crate) chance: Rng,
    hints: Rng,
    /// What is to happen, the first last: most of what is added happens soon, so that it finds its place near the end,
    /// in less time than in a heap.
    agenda: Vec<Due>,
    /// The timer of the process in each slot: each of its inputs sets it anew, so that most never ring.
    timers: Vec<Turn>,
    /// None of them rings before that.
    first_timer: u64,
    /// Time-outs of calls, in order for each of the schedule's settings: most never happen.
    timeouts: Vec<VecDeque<(u64, u32)>>,
    /// None of them comes before that.
    first_timeout: u64,
    pub(crate) worker_settings: Vec<WorkerSettings>,
    pub(crate) store: Store,
    pub(crate) slots: Vec<SlotState>,
    pub(crate) processes: Vec<Process>,
    pub(crate) calls: Vec<Call>,
    pub(crate) statements: Vec<Option<Box<Statement>>>,
    /// Places of statements that are over.
    #[allow(clippy::vec_box, reason = "the boxes are what is kept")]
    pub(crate) spare: Vec<Box<Statement>>,
    /// Places of replies that were handled.
    #[allow(clippy::vec_box, reason = "the boxes are what is kept")]
    pub(crate) spare_replies: Vec<Box<Reply>>,
    pub(crate) requests: Vec<Request>,
    pub(crate) manners: Vec<Option<Manner>>,
    pub(crate) kills: Vec<u32>,
    pub(crate) weather: Weather,
    pub(crate) facts: Vec<Fact>,
    oracle: Oracle,
    trace: Trace,
    violation: Option<Violation>,
    produced: usize,
    draining: u32,
    forgets_until: u64,
}

impl<'a> World<'a> {
    /// The world of a schedule before anything happened.
    ///
    /// # Panics
    /// If the schedule's settings are not accepted by the machine.
    pub fn new(schedule: &'a Schedule, options: Options) -> Self {
        let planted = options.bug.and_then(|bug| match bug.place() {
            Place::Machine(planted) => Some(planted),
            Place::Store | Place::Driver => None,
        });
        let settings = schedule.settings.iter().map(|settings| {
            let mut settings = settings.worker(schedule.seed)?;
            settings.planted = planted;
            Ok::<_, String>(settings)
        });
        let worker_settings: Result<Vec<_>, _> = settings.collect();
        #[allow(clippy::expect_used, reason = "a schedule with settings that nobody may use is no schedule")]
        let worker_settings = worker_settings.expect("the schedule's settings are allowed");
        let forgetting = schedule.faults.iter().filter(|timed| matches!(timed.fault, Fault::Failover(..)));
        let forgets_until = forgetting.map(|timed| timed.at.saturating_add(timed.lasts)).max();
        let setup = Setup {
            terms: schedule.settings.iter().map(crate::schedule::Settings::terms).collect(),
            epoch: EPOCH,
            checks: options.checks,
            converge_by: Some(schedule.converge_by()),
            roomy: schedule.roomy(),
            slow_rows: schedule.row_takes() > 0,
        };
        let destinations = schedule.destinations.len();
        let mut world = Self {
            schedule,
            options,
            now: 0,
            seq: 0,
            ties: Rng::new(schedule.seed, "ties").bits(),
            net: Rng::new(schedule.seed, "net"),
            pace: Rng::new(schedule.seed, "pace"),
            chance: Rng::new(schedule.seed, "chance"),
            hints: Rng::new(schedule.seed, "notifications"),
            agenda: Vec::with_capacity(256),
            timers: vec![NEVER; schedule.slots.len()],
            first_timer: u64::MAX,
            timeouts: vec![VecDeque::new(); schedule.settings.len()],
            first_timeout: u64::MAX,
            worker_settings,
            store: Store::new(EPOCH, destinations, forgets_until.is_some(), options.bug),
            slots: vec![SlotState::default(); schedule.slots.len()],
            processes: Vec::with_capacity(32),
            calls: Vec::with_capacity(1_024),
            statements: Vec::with_capacity(1_024),
            spare: Vec::new(),
            spare_replies: Vec::new(),
            requests: Vec::with_capacity(256),
            manners: vec![None; destinations],
            kills: schedule.events.iter().map(|event| event.kills).collect(),
            weather: Weather::default(),
            facts: Vec::with_capacity(64),
            oracle: Oracle::new(setup),
            trace: Trace::new(options.keep),
            violation: None,
            produced: 0,
            draining: 0,
            forgets_until: forgets_until.unwrap_or(0),
        };
        let mut plan = |time, happening| {
            let turn = world.turn(time);
            world.agenda.push(Due { turn, happening });
        };
        for (slot, place) in schedule.slots.iter().enumerate() {
            plan(place.starts, Happening::Start(slot as u32));
        }
        if let Some(first) = schedule.events.first() {
            plan(first.at, Happening::Produce(0));
        }
        for (fault, timed) in schedule.faults.iter().enumerate() {
            plan(timed.at, Happening::FaultBegins(fault as u32));
            if timed.lasts != u64::MAX {
                plan(timed.at + timed.lasts, Happening::FaultEnds(fault as u32));
            }
        }
        plan(schedule.heal_at, Happening::Healed);
        let ties = world.ties;
        world.agenda.sort_by_cached_key(|due| Reverse((due.turn.time, due.turn.tie(ties))));
        world
    }

    /// Has something happen at a time; equal times are ordered by the seed.
    pub(crate) fn at(&mut self, time: u64, happening: Happening) {
        let turn = self.turn(time);
        let due = Due { turn, happening };
        let is_later = |due: &Due| turn.is_before(due.turn, self.ties);
        if self.agenda.last().is_none_or(is_later) {
            // Most of what is added happens before all else.
            return self.agenda.push(due);
        }
        let place = self.agenda.iter().rposition(is_later).map_or(0, |later| later + 1);
        self.agenda.insert(place, due);
    }

    pub(crate) fn after(&mut self, delay: u64, happening: Happening) {
        self.at(self.now.saturating_add(delay), happening);
    }

    fn turn(&mut self, time: u64) -> Turn {
        self.seq += 1;
        Turn { time: time.max(self.now), seq: self.seq }
    }

    /// Sets the timer of the process in a slot.
    pub(crate) fn set_timer(&mut self, slot: usize, time: Option<u64>) {
        match time {
            // Another order of equal times is for another time only.
            Some(time) if self.timers[slot].time == time.max(self.now) => {}
            Some(time) => {
                let turn = self.turn(time);
                self.timers[slot] = turn;
                self.first_timer = self.first_timer.min(turn.time);
            }
            None => self.timers[slot] = NEVER,
        }
    }

    /// Writes a fact into the history.
    pub(crate) fn emit(&mut self, fact: Fact) {
        if self.violation.is_some() {
            return;
        }
        self.trace.push(self.now, &fact);
        if let Err(violation) = self.oracle.observe(self.now, &fact) {
            self.violation = Some(violation);
        }
    }

    /// Writes what the store did.
    pub(crate) fn emit_store_facts(&mut self) {
        if self.facts.is_empty() {
            return;
        }
        let mut facts = std::mem::take(&mut self.facts);
        for fact in facts.drain(..) {
            self.emit(fact);
        }
        self.facts = facts;
    }

    pub(crate) fn drain_count(&mut self, by: i32) {
        self.draining = self.draining.saturating_add_signed(by);
    }

    fn settled(&self) -> bool {
        self.produced == self.schedule.events.len()
            && self.oracle.pending() == 0
            && self.draining == 0
            && self.now >= self.forgets_until
    }

    /// Runs to the end: until every event is terminal, an invariant breaks, or the time for it is up.
    pub fn run(mut self) -> Outcome {
        let mut steps = 0;
        if let Some(panic) = caught(|| self.play(&mut steps)) {
            self.violation = Some(Violation { at: self.now, ..panic });
        }
        Outcome {
            violation: self.violation,
            hash: self.trace.hash(),
            steps,
            ended_at: self.now,
            stats: self.oracle.stats.clone(),
            facts: self.trace.into_facts(),
        }
    }

    fn play(&mut self, steps: &mut u64) {
        let limit = self.schedule.converge_by() + 1;
        while self.violation.is_none() {
            // Where nothing more happens, the time goes by.
            let Some((time, happening)) = self.next().filter(|(time, _)| *time <= limit) else {
                self.now = limit;
                break;
            };
            self.now = time;
            *steps += 1;
            self.happen(happening);
            if self.settled() {
                break;
            }
            if *steps == MOST_STEPS {
                let text = "the run goes round in circles".to_owned();
                self.violation = Some(Violation { invariant: Invariant::L1, text, at: self.now });
            }
        }
        if self.violation.is_none() {
            let census = self.store.census();
            self.emit(census);
        }
        if self.violation.is_none() {
            self.violation = self.oracle.finish(self.now).err();
        }
    }

    /// Arms the time-out of a call.
    pub(crate) fn time_out_after(&mut self, settings: usize, call: u32) {
        let at = self.now + self.schedule.settings[settings].store_timeout;
        self.timeouts[settings].push_back((at, call));
        self.first_timeout = self.first_timeout.min(at);
    }

    /// The first time-out by then of a call that is under way.
    fn next_timeout(&mut self, by: u64) -> Option<(u64, Happening)> {
        let mut first = (u64::MAX, 0);
        for (settings, queue) in self.timeouts.iter_mut().enumerate() {
            while queue.pop_front_if(|(_, call)| self.calls[*call as usize].done).is_some() {}
            let next = queue.front().map_or(u64::MAX, |(at, _)| *at);
            first = first.min((next, settings));
        }
        self.first_timeout = first.0;
        if first.0 > by {
            return None;
        }
        let (at, call) = self.timeouts[first.1].pop_front()?;
        Some((at, Happening::Driver(self.calls[call as usize].worker, Item::TimedOut(call))))
    }

    /// Whatever is due first; a time-out before anything else of the same time.
    fn next(&mut self) -> Option<(u64, Happening)> {
        let mut first = self.agenda.last().map_or(NEVER, |due| due.turn);
        let mut ringing = None;
        if self.first_timer <= first.time {
            self.first_timer = u64::MAX;
            for (slot, turn) in self.timers.iter().enumerate() {
                self.first_timer = self.first_timer.min(turn.time);
                if turn.is_before(first, self.ties) {
                    (first, ringing) = (*turn, Some(slot));
                }
            }
        }
        if self.first_timeout <= first.time
            && let Some(timed_out) = self.next_timeout(first.time)
        {
            return Some(timed_out);
        }
        let Some(slot) = ringing else { return self.agenda.pop().map(|due| (first.time, due.happening)) };
        self.timers[slot] = NEVER;
        Some((first.time, Happening::Wake(slot as u32)))
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Start(slot) => self.start(slot as usize),
            Happening::Produce(event) => self.produce(event),
            Happening::FaultBegins(fault) => self.fault_begins(fault),
            Happening::FaultEnds(fault) => self.fault_ends(fault),
            Happening::StarveTurn(fault, stop) => self.starve_turn(fault, stop),
            Happening::Driver(worker, item) => self.drive(worker, item),
            Happening::Wake(slot) => self.wake(slot as usize),
            Happening::Arrive(statement) => self.arrive(statement),
            Happening::LocksTurn(statement) => self.take_locks(statement),
            Happening::Commit(statement) => self.commit(statement),
            Happening::Cancel(statement, call) => self.cancel(statement, call),
            Happening::ReplyArrives(call) => self.reply_arrives(call),
            Happening::ResponseArrives(request) => self.response_arrives(request),
            Happening::Kill(worker, event) => {
                if !self.processes[worker as usize].dead {
                    self.crash(worker, sim_oracle::Down::Poison(event));
                    let slot = self.processes[worker as usize].slot;
                    self.after(crate::schedule::RESTART_AFTER_KILL, Happening::Start(slot as u32));
                }
            }
            Happening::Continue(worker) => self.resume(worker),
            Happening::Healed => self.emit(Fact::Healed),
        }
    }

    fn produce(&mut self, event: u32) {
        // An event is a row: numbered in the order of its commit.
        let plan = self.schedule.events[event as usize];
        self.produced += 1;
        if let Some(next) = self.schedule.events.get(self.produced) {
            self.at(next.at, Happening::Produce(event + 1));
        }
        let due = self.store.insert(self.now, &plan);
        self.emit(plan.committed(event, due));
        if self.schedule.pace.hints {
            self.hint();
        }
    }

    /// Notifies the workers. A notification may be lost, as where the connection for it is.
    fn hint(&mut self) {
        for slot in 0..self.slots.len() {
            if let Some(worker) = self.slots[slot].process
                && !self.hints.percent(20)
            {
                let (least, most) = self.schedule.pace.network;
                let delay = self.hints.within(least, most);
                self.after(delay, Happening::Driver(worker, Item::Hint));
            }
        }
    }
}
