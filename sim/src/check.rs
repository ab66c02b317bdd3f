//! Exhaustive checking of the same machines: every interleaving of two workers on one event within bounds.
//!
//! Time is counted in ticks of 1 s, and `L` is 4 of them. A call is answered within its tick unless a fault of the
//! budget loses it or its reply; a lost call may still be applied later (a late commit). Workers that are not paused
//! are woken at every tick.

use std::time::Duration;

use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimAnswer, ClaimReply, DbClock, DbTime, DestinationKey, Grant,
    Incarnation, Input, LeaseKey, Moment, Observation, OwnedReply, Planted, RenewReply, Row, RowId,
    SettleReply, Status, StoreFault, Token, Worker, WorkerId, WorkerSettings,
};
use sim_oracle::Violation;
use stateright::{Checker, Model, Property};

use crate::bugs::Bug;
use crate::schedule::{
    Cut, Destination, EventPlan, Fault, Manner, Pace, Payload, Profile, Schedule, Settings, Slot, Timed,
};
use crate::world::Options;

const TICK: Duration = Duration::from_secs(1);
const ROW: RowId = RowId(1);
/// The start of the database's clock: small, so that tokens rise by one or by the clock, both within bounds.
const DB_START: i64 = 1_000_000_000;

/// Bounds of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Workers.
    pub workers: usize,
    /// Length of a history in ticks.
    pub ticks: u64,
    /// Crashes, each followed by nothing: the worker is gone.
    pub crashes: u8,
    /// Pauses of any length.
    pub pauses: u8,
    /// Lost calls and lost replies.
    pub losses: u8,
    /// Lost calls that may be applied late at a time.
    pub late: usize,
    /// A mistake of the worker machine.
    pub bug: Option<Planted>,
}

/// One store call under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Call {
    sent: u64,
    action: Action,
    /// Set once it was applied.
    reply: Option<Input>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Process {
    worker: Worker,
    crashed: bool,
    paused: bool,
    calls: Vec<Call>,
    /// Calls that the worker has yet to give up on.
    lost: Vec<(u64, Action)>,
    /// Open requests, and whether their worker was paused since they were opened.
    open: Vec<(LeaseKey, bool)>,
}

/// All of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    tick: u64,
    planted: bool,
    row: Row,
    processes: Vec<Process>,
    /// Calls that were lost on the way and may still be applied.
    late: Vec<Action>,
    crashes: u8,
    pauses: u8,
    losses: u8,
    /// Which process is which owner, for the checks.
    seen: Seen,
}

/// What the properties ask about the past, kept to the minimum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Seen {
    overlap: bool,
    healthy_reclaimed: bool,
    token_fell: bool,
    terminal_changed: bool,
    delivered_unanswered: bool,
    answered: bool,
    reclaims: u8,
    refused: bool,
    ended: bool,
    late_commit: bool,
    fenced: bool,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The clocks advance, lost calls time out, workers wake.
    Tick,
    /// A call is applied and its reply handled.
    Answer(usize, usize),
    /// A call of a stopped worker is applied; its reply waits.
    Apply(usize, usize),
    /// A call is applied, but its reply is lost.
    LoseReply(usize, usize),
    /// A call is lost; it may be applied later.
    LoseCall(usize, usize),
    /// A lost call is applied after all.
    Late(usize),
    /// A destination answers 200.
    Respond(usize, usize),
    /// A worker dies.
    Crash(usize),
    /// A worker stops.
    Pause(usize),
    /// A stopped worker goes on.
    Resume(usize),
}

const MICROS: u64 = TICK.as_micros() as u64;

/// One request at a time, and everything a tick apart.
fn settings() -> Settings {
    Settings {
        lease: 4 * MICROS,
        heartbeat: MICROS,
        store_timeout: MICROS,
        fence_margin: MICROS,
        reclaim_grace: MICROS,
        max_in_flight: 1,
        max_in_flight_per_destination: 1,
        max_leased: 1,
        claim_batch: 1,
        poll_interval: MICROS,
        eager_poll: MICROS,
        drain_timeout: 10 * MICROS,
        request_timeout: 60 * MICROS,
        reclaim_limit: 0,
        retry_initial: MICROS,
        retry_max: MICROS,
        retry_jitter_bps: 0,
        retry_budget: 0,
        retry_after_max: MICROS,
        fail_status: 0,
        until_empty: false,
    }
}

fn worker_settings(bug: Option<Planted>) -> WorkerSettings {
    let mut settings = settings().worker(0).unwrap_or_else(|error| unreachable!("{error}"));
    settings.planted = bug;
    settings
}

impl State {
    fn moment(&self) -> Moment {
        Moment::default().after(TICK * u32::try_from(self.tick + 1).unwrap_or(u32::MAX))
    }

    fn db(&self) -> DbClock {
        let now = DbTime::from_micros(DB_START).after(TICK * u32::try_from(self.tick).unwrap_or(u32::MAX));
        DbClock { early: now, late: now }
    }

    /// Gives an input to a worker and takes what it wants done.
    fn give(&mut self, who: usize, input: Input) {
        let now = self.moment();
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let worker = &mut self.processes[who].worker;
            worker.handle(now, input);
            // Of a worker with a mistake it would say no more than that.
            if !self.planted {
                worker.assert_invariants();
            }
            while let Some(observation) = worker.poll_observation() {
                self.seen.fenced |= matches!(observation, Observation::Fenced { .. });
            }
            let actions: Vec<Action> = std::iter::from_fn(|| worker.poll_action()).collect();
            for action in actions {
                match action {
                    Action::Send { key, .. } => {
                        // **P12**: a stopped worker excuses the overlap with its request; nothing else does here.
                        let open = self.processes.iter().flat_map(|process| &process.open);
                        self.seen.overlap |= open.into_iter().any(|(_, stopped)| !stopped);
                        self.processes[who].open.push((key, false));
                    }
                    Action::Abort { key } => {
                        self.processes[who].open.retain(|(other, _)| *other != key);
                        inputs.push(Input::Aborted { key });
                    }
                    Action::Forget { .. } => {}
                    Action::Claim(..) | Action::Renew(..) | Action::Settle(..) | Action::Owned(..) => {
                        let sent = self.tick;
                        self.processes[who].calls.push(Call { sent, action, reply: None });
                    }
                }
            }
        }
    }

    fn owner_alive(&self) -> bool {
        let owner = self.row.lease.as_ref().map(|lease| &lease.owner);
        self.processes.iter().enumerate().any(|(who, process)| {
            Some(&name(who)) == owner
                && !process.crashed
                && !process.paused
                && process.lost.is_empty()
                && process.open.iter().all(|(_, stopped)| !stopped)
        })
    }

    /// What the store does with a call.
    fn apply(&mut self, action: &Action, unlucky: bool) -> Input {
        let (db, before) = (self.db(), self.row.clone());
        let alive = self.owner_alive();
        let input = match action {
            Action::Claim(request, claim) => {
                let mut reply = ClaimReply {
                    db_now: db.late,
                    incarnation: Incarnation::new("1"),
                    searched_expired: claim.terms.expired,
                    grants: Vec::new(),
                    failed: Vec::new(),
                    front: None,
                    leases_front: None,
                    next_due_in: None,
                    any_pending: None,
                };
                if let ClaimAnswer::Granted { token, reclaimed } =
                    self.row.claim(db, &claim.owner, &claim.terms)
                {
                    // **S2**, with losses in the past forgiven only while they are unanswered.
                    self.seen.healthy_reclaimed |= reclaimed && alive && !unlucky;
                    self.seen.reclaims += u8::from(reclaimed);
                    reply.grants.push(Grant {
                        key: LeaseKey { row: ROW, token },
                        destination: DestinationKey::new("http://a"),
                        attempts: self.row.attempts,
                        max_attempts: self.row.max_attempts,
                        reclaims: self.row.reclaims,
                        reclaimed,
                        unsendable: None,
                    });
                }
                Input::Claimed { request: *request, reply: Ok(reply) }
            }
            Action::Renew(request, renew) => {
                let answer =
                    |key: &LeaseKey, row: &mut Row| row.renew(db, &renew.owner, key.token, renew.lease);
                let answers = renew.keys.iter().map(|key| (*key, answer(key, &mut self.row))).collect();
                Input::Renewed { request: *request, reply: Ok(RenewReply { db_now: db.late, answers }) }
            }
            Action::Settle(request, settle) => {
                let mut answers = Vec::new();
                for (key, outcome) in &settle.entries {
                    let answer = self.row.settle(db, &settle.owner, key.token, outcome);
                    self.seen.refused |= answer == Answer::Refused;
                    self.seen.ended |= answer == Answer::Ended;
                    answers.push((*key, answer));
                }
                Input::Settled { request: *request, reply: Ok(SettleReply { db_now: db.late, answers }) }
            }
            Action::Owned(request, owned) => {
                let lease = self.row.lease.as_ref().filter(|lease| lease.owner == owned.owner);
                let keys = lease.map(|_| LeaseKey { row: ROW, token: self.row.token }).into_iter().collect();
                Input::Owned { request: *request, reply: Ok(OwnedReply { db_now: db.late, keys }) }
            }
            Action::Send { .. } | Action::Abort { .. } | Action::Forget { .. } => Input::Wake,
        };
        self.seen.token_fell |= self.row.token < before.token;
        self.seen.terminal_changed |= before.status != Status::Pending && self.row != before;
        self.seen.delivered_unanswered |= self.row.status == Status::Delivered && !self.seen.answered;
        input
    }

    fn tick(&mut self) {
        self.tick += 1;
        for who in 0..self.processes.len() {
            if self.processes[who].crashed || self.processes[who].paused {
                continue;
            }
            let tick = self.tick;
            let (due, waiting) = self.processes[who].lost.drain(..).partition(|(sent, _)| *sent < tick);
            self.processes[who].lost = waiting;
            // A stopped process checks its fences first, whatever else has come due.
            self.give(who, Input::Wake);
            for (_, action) in due {
                self.give(who, unknown(&action));
            }
        }
    }
}

fn name(who: usize) -> WorkerId {
    WorkerId::new(if who == 0 {
        "a"
    } else if who == 1 {
        "b"
    } else {
        "c"
    })
}

fn unknown(action: &Action) -> Input {
    let fault = || StoreFault::Unknown { error: String::new() };
    match action {
        Action::Claim(request, _) => Input::Claimed { request: *request, reply: Err(fault()) },
        Action::Renew(request, _) => Input::Renewed { request: *request, reply: Err(fault()) },
        Action::Settle(request, _) => Input::Settled { request: *request, reply: Err(fault()) },
        Action::Owned(request, _) => Input::Owned { request: *request, reply: Err(fault()) },
        Action::Send { .. } | Action::Abort { .. } | Action::Forget { .. } => Input::Wake,
    }
}

impl Model for Bounds {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut state = State {
            tick: 0,
            planted: self.bug.is_some(),
            row: Row { token: Token(0), ..Row::new(20, DbTime::from_micros(0)) },
            processes: Vec::new(),
            late: Vec::new(),
            crashes: 0,
            pauses: 0,
            losses: 0,
            seen: Seen::default(),
        };
        for who in 0..self.workers {
            let worker = Worker::new(name(who), worker_settings(self.bug), state.moment());
            state.processes.push(Process {
                worker,
                crashed: false,
                paused: false,
                calls: Vec::new(),
                lost: Vec::new(),
                open: Vec::new(),
            });
            state.give(who, Input::Wake);
        }
        vec![state]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        let mut waiting = false;
        for (who, process) in state.processes.iter().enumerate() {
            if process.crashed {
                continue;
            }
            if process.paused {
                steps.push(Step::Resume(who));
                let calls = process.calls.iter().enumerate().filter(|(_, call)| call.reply.is_none());
                steps.extend(calls.map(|(call, _)| Step::Apply(who, call)));
                continue;
            }
            for call in 0..process.calls.len() {
                waiting = true;
                steps.push(Step::Answer(who, call));
                if state.losses < self.losses {
                    steps.push(Step::LoseReply(who, call));
                    if state.late.len() < self.late {
                        steps.push(Step::LoseCall(who, call));
                    }
                }
            }
            for open in 0..process.open.len() {
                steps.push(Step::Respond(who, open));
            }
            if state.crashes < self.crashes {
                steps.push(Step::Crash(who));
            }
            if state.pauses < self.pauses {
                steps.push(Step::Pause(who));
            }
        }
        for late in 0..state.late.len() {
            steps.push(Step::Late(late));
        }
        if !waiting && state.tick < self.ticks {
            steps.push(Step::Tick);
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::Tick => state.tick(),
            Step::Answer(who, call) => {
                let call = state.processes[who].calls.remove(call);
                let unlucky = state.losses > 1 || state.pauses > 0;
                let reply = call.reply.unwrap_or_else(|| state.apply(&call.action, unlucky));
                state.give(who, reply);
            }
            Step::Apply(who, call) => {
                let action = state.processes[who].calls[call].action.clone();
                state.processes[who].calls[call].reply = Some(state.apply(&action, true));
            }
            Step::LoseReply(who, call) => {
                state.losses += 1;
                let call = state.processes[who].calls.remove(call);
                state.apply(&call.action, true);
                state.processes[who].lost.push((call.sent, call.action));
            }
            Step::LoseCall(who, call) => {
                state.losses += 1;
                let call = state.processes[who].calls.remove(call);
                state.late.push(call.action.clone());
                state.processes[who].lost.push((call.sent, call.action));
            }
            Step::Late(late) => {
                let action = state.late.remove(late);
                state.seen.late_commit = true;
                state.apply(&action, true);
            }
            Step::Respond(who, open) => {
                let (key, _) = state.processes[who].open.remove(open);
                state.seen.answered = true;
                let result = AttemptResult::Responded { status: 200, retry_after: None };
                state.give(who, Input::Attempted { key, result });
            }
            Step::Crash(who) => {
                state.crashes += 1;
                let process = &mut state.processes[who];
                process.crashed = true;
                process.open.clear();
                process.lost.clear();
                // What was under way may still be applied.
                let calls = std::mem::take(&mut process.calls);
                let room = self.late.saturating_sub(state.late.len());
                state.late.extend(calls.into_iter().take(room).map(|call| call.action));
            }
            Step::Pause(who) => {
                state.pauses += 1;
                let process = &mut state.processes[who];
                process.paused = true;
                for (_, stopped) in &mut process.open {
                    *stopped = true;
                }
            }
            Step::Resume(who) => {
                state.processes[who].paused = false;
                state.give(who, Input::Wake);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("S2 a healthy holder is never reclaimed", |_, state: &State| {
                !state.seen.healthy_reclaimed
            }),
            Property::always("S4 no two requests are open at once", |_, state: &State| !state.seen.overlap),
            Property::always("S5 tokens never fall", |_, state: &State| !state.seen.token_fell),
            Property::always("S7 terminal states never change", |_, state: &State| {
                !state.seen.terminal_changed
            }),
            Property::always("S7 delivered only if answered", |_, state: &State| {
                !state.seen.delivered_unanswered
            }),
            Property::sometimes("delivered", |_, state: &State| state.row.status == Status::Delivered),
            Property::sometimes("reclaimed", |_, state: &State| state.seen.reclaims > 0),
            Property::sometimes("a settle was refused", |_, state: &State| state.seen.refused),
            Property::sometimes("a settle was answered ended", |_, state: &State| state.seen.ended),
            Property::sometimes("a late commit", |_, state: &State| state.seen.late_commit),
            Property::sometimes("a fence", |_, state: &State| state.seen.fenced),
        ]
    }
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Distinct states.
    pub states: usize,
    /// Properties that failed, with the shortest path to each.
    pub failures: Vec<(&'static str, Vec<Step>)>,
    /// Conditions that were never met.
    pub never: Vec<&'static str>,
}

/// Searches every interleaving within the bounds.
pub fn check(bounds: Bounds, threads: usize) -> Report {
    let checker = bounds.checker().threads(threads).spawn_bfs().join();
    let mut report = Report { states: checker.unique_state_count(), failures: Vec::new(), never: Vec::new() };
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match (property.expectation.discovery_is_failure(), found) {
            (true, Some(path)) => report.failures.push((property.name, path.into_actions())),
            (false, None) => report.never.push(property.name),
            _ => {}
        }
    }
    report
}

/// A schedule of the event heap that does what a path does, as far as a schedule can say it: the order of what happens
/// within one tick is left to the seed.
pub fn schedule_of(bounds: Bounds, path: &[Step], seed: u64) -> Schedule {
    let mut faults = Vec::new();
    let Some(mut state) = bounds.init_states().pop() else { unreachable!("there is one beginning") };
    // A tick's window lies around its instant, so that the calls that workers make then are within.
    let from = |tick: u64| (tick * MICROS).saturating_sub(MICROS * 2 / 5);
    let mut fault = |at: u64, lasts: u64, fault: Fault| faults.push(Timed { at, lasts: lasts.max(1), fault });
    let mut lost: Vec<u64> = Vec::new();
    let mut opened: Vec<Vec<u64>> = vec![Vec::new(); bounds.workers];
    let mut stopped = vec![0; bounds.workers];
    for step in path {
        let tick = state.tick;
        match *step {
            Step::Tick | Step::Answer(..) | Step::Apply(..) => {}
            Step::LoseReply(who, _) => fault(from(tick), MICROS, Fault::Partition(who, Cut::FromStore)),
            Step::LoseCall(who, _) => {
                lost.push(tick);
                fault(from(tick), MICROS, Fault::Partition(who, Cut::FromStore));
            }
            Step::Late(late) => {
                let since = lost.remove(late.min(lost.len().saturating_sub(1)));
                fault(from(since), MICROS, Fault::LateCommit(65_536, (tick - since) * MICROS));
            }
            Step::Respond(who, open) => {
                let since = opened[who].remove(open);
                let takes = (tick - since) * MICROS + MICROS / 4;
                fault(from(since), MICROS, Fault::Manner(0, Manner::Ok(takes, takes)));
            }
            Step::Crash(who) => fault(tick * MICROS + MICROS * 2 / 5, u64::MAX, Fault::Crash(who)),
            Step::Pause(who) => stopped[who] = tick * MICROS + MICROS / 5,
            Step::Resume(who) => {
                fault(stopped[who], tick * MICROS + MICROS / 5 - stopped[who], Fault::Pause(who));
            }
        }
        let Some(next) = bounds.next_state(&state, *step) else { break };
        state = next;
        for (who, process) in state.processes.iter().enumerate() {
            opened[who].resize(process.open.len(), state.tick);
        }
    }
    let end = (state.tick + 1) * MICROS;
    faults.sort_by_key(|timed| timed.at);
    let event = EventPlan {
        at: 0,
        destination: 0,
        max_attempts: 20,
        delay: 0,
        late: 0,
        attempts: 0,
        kills: 0,
        cursed: false,
        payload: Payload::Small,
    };
    Schedule {
        seed,
        profile: Profile::Edge,
        settings: vec![settings()],
        slots: vec![Slot { settings: 0, starts: 1, clock: MICROS, ppm: 0 }; bounds.workers],
        destinations: vec![Destination { manners: vec![(1, Manner::Hang)] }],
        events: vec![event],
        pace: Pace { network: (20, 200), commit: (20, 200), connect: 200, close: 200, hints: false },
        faults,
        heal_at: end,
    }
}

/// Replays a failing path in the event heap: the first of some seeds whose schedule breaks a promise. The oracle there
/// is stricter than the properties here and may name another one, broken earlier.
pub fn replay(bounds: Bounds, path: &[Step]) -> Option<(Schedule, Violation)> {
    const SEEDS: u64 = 256;
    let bug = bounds.bug.and_then(Bug::of_machine);
    (0..SEEDS).find_map(|seed| {
        let schedule = schedule_of(bounds, path, seed);
        let violation = crate::run(&schedule, Options { bug, ..Options::default() }).violation?;
        Some((schedule, violation))
    })
}
