//! From a seed and a profile to a schedule.

use crate::rng::Rng;
use crate::schedule::{
    Asked, Cut, Destination, EventPlan, Fault, Manner, Pace, Payload, Profile, Schedule, Settings, Slot,
    Timed,
};

const MS: u64 = 1_000;
const S: u64 = 1_000_000;

/// The profile of a seed in a mixed search.
pub fn profile_of(seed: u64) -> Profile {
    use Profile as P;
    const MIX: [Profile; 20] = [
        P::Storm,
        P::Edge,
        P::Storm,
        P::Swarm,
        P::Edge,
        P::Aimed,
        P::Storm,
        P::Poison,
        P::Edge,
        P::Aimed,
        P::Swarm,
        P::Clock,
        P::Deploy,
        P::SlowEndpoints,
        P::Liveness,
        P::Aimed,
        P::Failover,
        P::OneFault,
        P::Deploy,
        P::Calm,
    ];
    // A crowd takes as long as fifty others.
    if seed % 4_000 == 3_999 { P::Crowd } else { MIX[(seed % MIX.len() as u64) as usize] }
}

/// A class of faults; a swarm turns each on or off.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Crash,
    CrashAmid,
    CrashOnAnswer,
    Pause,
    PauseAtSend,
    Suspend,
    Starve,
    ClockStep,
    Drift,
    Partition,
    Loss,
    Duplicate,
    LostReply,
    LateCommit,
    Abort,
    Delay,
    Stall,
    LockRow,
    DbStep,
    Restart,
    Failover,
    ReadOnly,
    Manner,
    Drain,
}

const CLASSES: [Class; 24] = [
    Class::Crash,
    Class::CrashAmid,
    Class::CrashOnAnswer,
    Class::Pause,
    Class::PauseAtSend,
    Class::Suspend,
    Class::Starve,
    Class::ClockStep,
    Class::Drift,
    Class::Partition,
    Class::Loss,
    Class::Duplicate,
    Class::LostReply,
    Class::LateCommit,
    Class::Abort,
    Class::Delay,
    Class::Stall,
    Class::LockRow,
    Class::DbStep,
    Class::Restart,
    Class::Failover,
    Class::ReadOnly,
    Class::Manner,
    Class::Drain,
];

/// Makes the schedule of a seed.
pub fn generate(seed: u64, profile: Profile) -> Schedule {
    let mut rng = Rng::new(seed, "topology");
    let events = match profile {
        Profile::Poison => rng.within(20, 60),
        Profile::Crowd => rng.within(1_100, 3_000),
        _ => rng.spread(1, 40),
    } as u32;
    let mut settings = vec![make_settings(&mut Rng::new(seed, "settings"), profile, events)];
    if rng.percent(if profile == Profile::Deploy { 60 } else { 12 }) {
        let mut new = make_settings(&mut Rng::new(seed, "new settings"), profile, events);
        if profile == Profile::Deploy {
            // Fewer tries than before: a claim then finds those of a lease that ran out spent.
            (settings[0].retry_budget, new.retry_budget) = (0, 1);
        }
        settings.push(new);
    }
    let lease = settings[0].lease;
    let slots = make_slots(&mut rng, profile, settings.len(), lease);
    let heal_at = rng.within(3, 8) * lease + rng.within(0, 2 * S);
    let mut workload = Rng::new(seed, "workload");
    let destinations = make_destinations(&mut workload, profile, &settings[0]);
    let mut events = make_events(&mut workload, profile, events, destinations.len(), heal_at, &settings[0]);
    if profile != Profile::Calm {
        commit_late(&mut Rng::new(seed, "late commits"), &mut events);
    }
    make_payloads(&mut Rng::new(seed, "payloads"), &mut events);
    kill_more(&mut Rng::new(seed, "killers"), profile, &mut settings, &mut events);
    let timeout = settings.iter().map(|settings| settings.store_timeout).min().unwrap_or(S);
    let mut pace = make_pace(&mut Rng::new(seed, "pace of things"), profile, lease, timeout);
    pace.hints = Rng::new(seed, "hints").percent(20);
    let mut slow = Rng::new(seed, "slow connects");
    // A killing event that is retried between its kills is off probation each time.
    if slow.percent(5) && profile != Profile::Poison {
        pace.connect = slow.within(lease / 2, 2 * lease);
    }
    // Some make no call in a whole outage.
    let mut seldom = Rng::new(seed, "seldom polls");
    if matches!(profile, Profile::Failover | Profile::Liveness | Profile::Swarm) && seldom.percent(25) {
        settings.iter_mut().for_each(|settings| settings.poll_interval = seldom.within(lease / 4, 3 * lease));
    }
    if Rng::new(seed, "until empty").percent(5) {
        settings.iter_mut().for_each(|settings| settings.until_empty = true);
    }
    let mut schedule =
        Schedule { seed, profile, settings, slots, destinations, events, pace, faults: Vec::new(), heal_at };
    let mut faults = Vec::new();
    add_faults(&mut schedule, &mut Rng::new(seed, "faults"), &mut faults);
    call_late(&mut Rng::new(seed, "hung calls"), timeout, lease, &mut faults);
    faults.sort_by_key(|timed| timed.at);
    schedule.faults = faults;
    schedule
}

fn make_settings(rng: &mut Rng, profile: Profile, events: u32) -> Settings {
    let lease = *rng.pick(&[S, 2 * S, 3 * S, 5 * S, 5 * S, 10 * S, 30 * S]);
    let (mut heartbeat, mut timeout, mut margin, mut grace) =
        (lease / 3, (lease / 6).min(5 * S), lease / 10, lease / 10);
    let edge = profile == Profile::Edge;
    if edge || rng.percent(if profile == Profile::Aimed { 90 } else { 30 }) {
        let tiny = if edge && rng.percent(10) { MS } else { lease / 60 };
        timeout = rng.spread(tiny, (lease / 4).min(5 * S));
        margin = rng.spread(tiny, lease / 5);
        let most = lease - 2 * timeout - margin;
        heartbeat = if edge && rng.percent(70) { most } else { rng.within(100 * MS, most) };
        grace = if rng.percent(25) { 0 } else { rng.spread(1, lease / 2) };
    }
    let roomy = rng.percent(60) || profile == Profile::Crowd;
    let poll_interval = rng.spread(lease / 30, lease / 4);
    let initial = rng.spread(10 * MS, S);
    // In a deployment long enough for requests that outlast the lease.
    let longest = if profile == Profile::Deploy { 4 } else { 2 } * lease;
    let drain = 2 * timeout + rng.within(2 * MS, longest);
    Settings {
        lease,
        heartbeat,
        store_timeout: timeout,
        fence_margin: margin,
        reclaim_grace: grace,
        max_in_flight: if roomy { events.max(1) * 4 } else { rng.within(1, 8) as u32 },
        max_in_flight_per_destination: if roomy { events.max(1) * 2 } else { rng.within(1, 4) as u32 },
        max_leased: if roomy { events.max(1) * 4 } else { rng.within(1, 16) as u32 },
        claim_batch: if roomy { events.max(1) * 2 } else { rng.within(1, 8) as u32 },
        poll_interval,
        // Slower than the default, or the heap would hold little else.
        eager_poll: rng.spread(poll_interval / 4, poll_interval),
        drain_timeout: drain,
        request_timeout: rng.within(lease / 4, 3 * lease),
        reclaim_limit: if profile == Profile::Poison || rng.percent(30) {
            rng.within(4, 8) as u32
        } else {
            100
        },
        retry_initial: initial,
        retry_max: rng.within(initial, initial + 4 * S),
        retry_jitter_bps: *rng.pick(&[0, 2_000, 2_000, 10_000]),
        retry_budget: if rng.percent(20) { rng.within(1, 4) as u32 } else { 0 },
        retry_after_max: rng.within(0, 5 * S),
        fail_status: *rng.pick(&[0, 0, 410]),
        until_empty: false,
    }
}

fn make_slots(rng: &mut Rng, profile: Profile, settings: usize, lease: u64) -> Vec<Slot> {
    let drift = match profile {
        Profile::Clock => 20_000,
        _ if rng.percent(30) => 200,
        _ => 0,
    };
    let slots = rng.within(1, 4).max(if profile == Profile::Liveness { 2 } else { 1 });
    let slot = |slot: u64| Slot {
        settings: match profile {
            // Old and new side by side.
            Profile::Deploy => slot as usize % settings,
            _ => rng.below(settings as u64) as usize,
        },
        starts: if rng.percent(60) { rng.below(50 * MS) } else { rng.below(lease) },
        clock: rng.spread(1, 1 << 40),
        ppm: rng.within(0, 2 * drift) as i32 - drift as i32,
    };
    (0..slots).map(slot).collect()
}

fn manner(rng: &mut Rng, settings: &Settings) -> Manner {
    let lease = settings.lease;
    match rng.below(12) {
        0 | 1 => Manner::Ok(lease / 2, 3 * lease),
        2 => Manner::Ok(lease / 10, lease),
        3 => Manner::Status(*rng.pick(&[500, 502, 504, 404, 301, 307])),
        4 => Manner::Status(410),
        5 | 6 => {
            let asked = match rng.below(5) {
                0 => Asked::Delay(rng.spread(1, 100_000 * S)),
                1 => Asked::Delay(rng.below(3) * S),
                2 => Asked::Date(rng.within(0, 6 * S) as i64),
                3 => Asked::Date(-(rng.spread(1, 1_000 * S) as i64)),
                _ => Asked::Garbage,
            };
            Manner::RetryAfter(*rng.pick(&[429, 503, 503, 500]), asked)
        }
        7 => Manner::Hang,
        8 => Manner::ResetBefore,
        9 => Manner::ResetAfter,
        10 => Manner::TooLate,
        _ => Manner::Undeliverable,
    }
}

fn make_destinations(rng: &mut Rng, profile: Profile, settings: &Settings) -> Vec<Destination> {
    let count = *rng.pick(&[1, 1, 2, 3, 4]);
    let one = |_| {
        let mut manners = vec![(10, Manner::Ok(MS, 50 * MS))];
        let odd = match profile {
            Profile::Calm | Profile::OneFault => rng.below(2),
            Profile::SlowEndpoints => rng.within(2, 5),
            _ => rng.below(4),
        };
        for _ in 0..odd {
            manners.push((rng.within(1, 8) as u32, manner(rng, settings)));
        }
        // A destination that is slow beyond the lease is what heartbeats are for.
        if rng.percent(50) {
            manners.push((6, Manner::Ok(settings.lease / 2, 3 * settings.lease)));
        }
        Destination { manners }
    };
    (0..count).map(one).collect()
}

fn make_events(
    rng: &mut Rng,
    profile: Profile,
    events: u32,
    destinations: usize,
    heal_at: u64,
    settings: &Settings,
) -> Vec<EventPlan> {
    let poison = match profile {
        Profile::Poison => Some(rng.below(u64::from(events)) as u32),
        _ => None,
    };
    let cursed = (settings.reclaim_limit < 100 && poison.is_none() && rng.percent(10))
        .then(|| rng.below(u64::from(events)) as u32);
    let one = |event| EventPlan {
        at: if rng.percent(30) { rng.below(50 * MS) } else { rng.below(heal_at * 3 / 4) },
        destination: rng.below(destinations as u64) as u16,
        max_attempts: *rng.pick(&[1, 2, 3, 5, 8]),
        delay: if rng.percent(10) { rng.below(2 * S) } else { 0 },
        late: 0,
        attempts: if rng.percent(if profile == Profile::Deploy { 40 } else { 3 }) {
            rng.within(1, 6) as u32
        } else {
            0
        },
        kills: if poison == Some(event) {
            if rng.percent(70) { u32::MAX } else { rng.within(1, 4) as u32 }
        } else {
            0
        },
        cursed: cursed == Some(event),
        payload: Payload::Small,
    };
    let mut plans: Vec<EventPlan> = (0..events).map(one).collect();
    plans.sort_by_key(|plan| plan.at);
    plans
}

/// Some producers' events are large: a claim can't bring all of them, and some can't be sent at all.
fn make_payloads(rng: &mut Rng, events: &mut [EventPlan]) {
    if rng.percent(10) {
        for event in events {
            event.payload = match rng.below(20) {
                0 => Payload::Malformed,
                1 | 2 => Payload::Bytes(rng.within(Payload::MAX + 1, 8 * Payload::MAX)),
                3..=12 => Payload::Bytes(rng.within(Payload::MAX / 2, Payload::MAX)),
                _ => Payload::Small,
            };
        }
    }
}

/// Several events that kill, which cost an innocent one a few run-outs each at the most; or no limit of run-outs.
fn kill_more(rng: &mut Rng, profile: Profile, settings: &mut [Settings], events: &mut [EventPlan]) {
    if profile == Profile::Poison && rng.percent(25) {
        for _ in 0..rng.within(1, 2) {
            let event = rng.below(events.len() as u64) as usize;
            events[event].kills = events[event].kills.max(rng.within(5, 12) as u32);
        }
        settings.iter_mut().for_each(|settings| settings.reclaim_limit = rng.within(18, 24) as u32);
    } else if rng.percent(10) && events.iter().all(|event| !event.cursed) {
        events.iter_mut().for_each(|event| event.kills = event.kills.min(4));
        settings.iter_mut().for_each(|settings| settings.reclaim_limit = 0);
    }
}

/// Some producers' transactions stay open for a while, some for long.
fn commit_late(rng: &mut Rng, events: &mut [EventPlan]) {
    if rng.percent(40) {
        let rate = rng.within(5, 60);
        for event in events {
            if rng.percent(rate) {
                event.late = rng.spread(MS, 8 * S).min(event.at);
            }
        }
    }
}

/// Where the network is slow, some connections hang for long and deliver after all.
fn call_late(rng: &mut Rng, timeout: u64, lease: u64, faults: &mut Vec<Timed>) {
    for timed in faults.clone() {
        if matches!(timed.fault, Fault::Delay(_)) && rng.percent(50) {
            let fault = Fault::LateCall(rng.spread(300, 40_000) as u32, rng.within(timeout, 4 * lease));
            faults.push(Timed { fault, ..timed });
        }
    }
}

/// Without faults a round trip takes less than half of `R`.
fn make_pace(rng: &mut Rng, profile: Profile, lease: u64, timeout: u64) -> Pace {
    let network = rng.spread(20, (timeout / 8).min(5 * MS));
    let close = if profile == Profile::Calm { MS } else { rng.spread(10, lease / 40) };
    Pace {
        network: (network / 2, network),
        commit: (20, rng.spread(40, (timeout / 5).min(10 * MS))),
        connect: rng.spread(100, 50 * MS),
        close,
        hints: false,
    }
}

fn add_faults(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    use Class as C;
    let several = |rng: &mut Rng, faults: &mut Vec<Timed>, classes: &[Class], most: u64| {
        for class in classes {
            for _ in 0..rng.within(1, most) {
                add(*class, schedule, rng, faults);
            }
        }
    };
    match schedule.profile {
        Profile::Calm | Profile::Poison => {}
        Profile::Aimed => {
            // Nothing beside it that would excuse what comes of it.
            let patterns =
                [late_claims, late_locks, late_calls, short_locks, steps_ahead, slow_scans, slow_rows];
            rng.pick(&patterns)(schedule, rng, faults);
        }
        Profile::OneFault => {
            let class = *rng.pick(&CLASSES);
            add(class, schedule, rng, faults);
        }
        Profile::Swarm | Profile::Liveness => {
            let rate = rng.within(5, 50);
            let on: Vec<Class> = CLASSES.into_iter().filter(|_| rng.percent(rate)).collect();
            several(rng, faults, &on, 3);
        }
        Profile::Storm => several(rng, faults, &CLASSES, 3),
        Profile::Clock => {
            several(rng, faults, &[C::ClockStep, C::Drift, C::DbStep], 3);
            for class in [C::Suspend, C::Pause, C::Crash] {
                if rng.percent(50) {
                    add(class, schedule, rng, faults);
                }
            }
        }
        Profile::Failover => {
            several(rng, faults, &[C::Failover], 2);
            for class in [C::Restart, C::ReadOnly, C::LateCommit, C::LostReply, C::Crash, C::DbStep] {
                if rng.percent(40) {
                    add(class, schedule, rng, faults);
                }
            }
        }
        Profile::SlowEndpoints => several(rng, faults, &[C::Manner, C::Manner], 3),
        Profile::Crowd => {
            crowd(schedule);
            if rng.percent(50) {
                let row = shortest_timeout(schedule) / rng.within(20, 400);
                faults.push(Timed { at: 0, lasts: u64::MAX, fault: Fault::Weight(row) });
            }
            for class in [C::LockRow, C::LockRow, C::LockRow, C::LostReply, C::Delay, C::Crash, C::Drain] {
                if rng.percent(40) {
                    add(class, schedule, rng, faults);
                }
            }
        }
        Profile::Deploy => {
            let lease = schedule.settings[0].lease;
            let mut at = rng.below(schedule.heal_at / 2);
            for slot in 0..schedule.slots.len() {
                let lasts = rng.spread(10 * MS, 2 * lease);
                faults.push(Timed { at, lasts, fault: Fault::Drain(slot) });
                at += rng.within(0, lease);
            }
            if schedule.settings.len() > 1 && rng.percent(60) {
                // The new ones find what the old one has left: tries spent, as they count.
                let at = rng.below(schedule.heal_at / 2);
                faults.push(Timed { at, lasts: 3 * lease, fault: Fault::Crash(0) });
            }
            for class in [C::Drain, C::Manner, C::LostReply, C::Loss, C::Pause, C::Crash, C::CrashOnAnswer] {
                if rng.percent(50) {
                    add(class, schedule, rng, faults);
                }
            }
        }
        Profile::Edge => {
            for class in [
                C::Delay,
                C::Stall,
                C::LateCommit,
                C::LostReply,
                C::Loss,
                C::LockRow,
                C::Pause,
                C::DbStep,
                C::Manner,
            ] {
                if rng.percent(40) {
                    add(class, schedule, rng, faults);
                }
            }
            if rng.percent(40) {
                late_claims(schedule, rng, faults);
            }
            if rng.percent(30) {
                late_locks(schedule, rng, faults);
            }
        }
    }
    if schedule.profile == Profile::Liveness {
        // One slot and the store are the healed core; what else is broken stays broken.
        for slot in 1..schedule.slots.len() {
            if rng.percent(60) {
                faults.push(Timed { at: schedule.heal_at, lasts: u64::MAX, fault: Fault::Crash(slot) });
            }
        }
        for destination in 1..schedule.destinations.len() {
            if rng.percent(30) {
                let fault = Fault::Manner(destination as u16, Manner::Hang);
                faults.push(Timed { at: schedule.heal_at, lasts: u64::MAX, fault });
            }
        }
    }
}

/// Everything comes within a moment and takes long, so that it is held at a time.
fn crowd(schedule: &mut Schedule) {
    linger(schedule);
    let lease = schedule.settings[0].lease;
    for destination in &mut schedule.destinations {
        destination.manners = vec![(30, Manner::Ok(lease / 2, 3 * lease)), (1, Manner::Status(500))];
    }
    for event in &mut schedule.events {
        event.at %= 100 * MS;
        (event.delay, event.late) = (0, 0);
    }
    schedule.events.sort_by_key(|event| event.at);
    schedule.slots.truncate(2);
}

/// The claims that would find an event commit later than the first looks for what they left, and while that is still
/// to come others may. What else is called is answered in time: two in a row that are not excuse everything.
fn late_claims(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    let settings = &schedule.settings[0];
    let (timeout, lease) = (settings.store_timeout, settings.lease);
    let lasts = rng.within(settings.poll_interval / 4, settings.poll_interval).min(timeout);
    for _ in 0..rng.within(1, 4) {
        let by = rng.spread(2 * timeout, lease.max(4 * timeout));
        let at = rng.pick(&schedule.events).at;
        faults.push(Timed { at, lasts, fault: Fault::LateCommit(65_536, by) });
        if rng.percent(60) {
            let at = at + lasts + rng.within(by / 2, by);
            faults.push(Timed { at, lasts, fault: Fault::LateCommit(65_536, by) });
        }
    }
}

/// Events are locked as they come, until they are long due: claims that come by meanwhile must come back for them.
fn late_locks(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    for _ in 0..rng.within(1, 4) {
        let event = rng.below(schedule.events.len() as u64) as u32;
        let at = schedule.events[event as usize].at;
        faults.push(Timed { at, lasts: rng.within(S, 4 * S), fault: Fault::LockRow(event) });
    }
}

/// A claim lies somewhere for longer than anybody looks for it, and arrives as an event falls due; or for nearly as long
/// as it is valid, and then commits late as well.
fn late_calls(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    let Settings { store_timeout: timeout, lease, poll_interval, fence_margin, .. } = schedule.settings[0];
    let lasts = poll_interval.min(timeout);
    let least = 4 * timeout + fence_margin;
    if rng.percent(50) && least < lease / 2 {
        let grace = rng.within(least, lease / 2);
        for settings in &mut schedule.settings {
            settings.reclaim_grace = grace.min(settings.lease / 2);
        }
        for _ in 0..rng.within(1, 3) {
            let event = rng.pick(&schedule.events);
            let by = rng.within(2 * timeout, timeout + grace);
            let arrives = event.at + event.delay + rng.below(poll_interval);
            faults.push(Timed { at: arrives.saturating_sub(by), lasts, fault: Fault::LateCall(65_536, by) });
            let late = Fault::LateCommit(65_536, rng.within(lease / 2, lease));
            faults.push(Timed { at: arrives, lasts, fault: late });
        }
        return;
    }
    for _ in 0..rng.within(2, 8) {
        let event = rng.pick(&schedule.events);
        let by = rng.within(lease + 4 * timeout, 3 * lease);
        let at = (event.at + event.delay + rng.below(poll_interval)).saturating_sub(by + lasts);
        faults.push(Timed { at, lasts, fault: Fault::LateCall(65_536, by) });
    }
}

/// Rows are locked for less than `R` while requests for them are open, so that renewals pass over them: some of them
/// beside rows that stay locked, some where each call takes nearly as long as it may.
fn short_locks(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    linger(schedule);
    let Settings { store_timeout: timeout, lease, .. } = schedule.settings[0];
    let lock = |rng: &mut Rng, event: u64, after: u64, lasts: u64| {
        let at = schedule.events[event as usize].at + after;
        let fault = Fault::LockRow(event as u32);
        Timed { at: at + rng.below(MS), lasts, fault }
    };
    let events = schedule.events.len() as u64;
    for _ in 0..rng.within(2, 10) {
        let (event, after) = (rng.below(events), rng.below(lease));
        let lasts = rng.within(timeout / 2, timeout);
        faults.push(lock(rng, event, after, lasts));
    }
    if rng.percent(50) {
        // Whole batches stand behind rows that stay locked.
        for destination in &mut schedule.destinations {
            destination.manners = vec![(100, Manner::Ok(2 * lease, 4 * lease))];
        }
        let first = rng.below(events);
        for event in first..(first + rng.within(3, 8)).min(events) {
            let (after, lasts) = (rng.below(lease / 8), rng.within(lease, 2 * lease));
            faults.push(lock(rng, event, after, lasts));
        }
    }
    if rng.percent(30) {
        let (_, network) = schedule.pace.network;
        let (_, commit) = schedule.pace.commit;
        // There and back within `R`.
        let most = (timeout.saturating_sub(commit) / 2).saturating_sub(network + MS);
        faults.push(Timed { at: 0, lasts: 8 * lease, fault: Fault::Delay(most) });
    }
}

/// `R` of the least patient worker: where one row took longer, it would never have an answer.
fn shortest_timeout(schedule: &Schedule) -> u64 {
    schedule.settings.iter().map(|settings| settings.store_timeout).min().unwrap_or(S)
}

/// The store takes its time for each row, so that a few of them are all that it answers within `R`.
fn slow_rows(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    schedule.slots.truncate(rng.within(1, 2) as usize);
    let row = shortest_timeout(schedule) / rng.within(3, 12);
    faults.push(Timed { at: 0, lasts: u64::MAX, fault: Fault::Weight(row) });
    // What comes together ends together.
    let at = rng.pick(&schedule.events).at;
    for event in &mut schedule.events {
        if rng.percent(70) {
            event.at = at;
        }
    }
    schedule.events.sort_by_key(|event| event.at);
}

/// The database's clock is set forward beyond `G` while requests are open, mostly those of a worker that is alone.
fn steps_ahead(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    linger(schedule);
    schedule.slots.truncate(if rng.percent(70) { 1 } else { 2 });
    let Settings { reclaim_grace: grace, lease, .. } = schedule.settings[0];
    for _ in 0..rng.within(2, 8) {
        let at = rng.pick(&schedule.events).at + rng.below(lease);
        let fault = Fault::DbStep((grace + rng.within(lease * 3 / 4, 2 * lease)) as i64);
        faults.push(Timed { at, lasts: 1, fault });
    }
}

/// A store is slow for a while, and then commits what fell due long ago.
fn slow_scans(schedule: &mut Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    let timeout = schedule.settings[0].store_timeout;
    let most = rng.within(timeout / 4, timeout * 3 / 4);
    let lasts = (rng.within(10, 30) * timeout).max(3 * S);
    let at = rng.within(S, schedule.heal_at / 2);
    let fault = if rng.percent(50) { Fault::Stall(most) } else { Fault::Delay(most) };
    faults.push(Timed { at, lasts, fault });
    for event in schedule.events.iter_mut().filter(|event| event.at > at) {
        if rng.percent(50) {
            event.at = at + lasts + rng.below(10 * timeout);
            event.late = if rng.percent(50) { rng.within(S, 8 * S) } else { rng.within(65 * S, 200 * S) };
        }
    }
    schedule.events.sort_by_key(|event| event.at);
}

/// Requests last as long as they can.
fn linger(schedule: &mut Schedule) {
    for settings in &mut schedule.settings {
        settings.request_timeout = 3 * settings.lease;
    }
    let lease = schedule.settings[0].lease;
    for destination in &mut schedule.destinations {
        destination.manners.push((20, Manner::Ok(lease, 3 * lease)));
    }
}

/// A duration that is short, medium or long as the protocol sees it.
fn duration(rng: &mut Rng, settings: &Settings) -> u64 {
    let (margin, timeout, lease) = (settings.fence_margin, settings.store_timeout, settings.lease);
    match rng.below(5) {
        0 => rng.spread(MS, margin.max(2 * MS)),
        1 => rng.spread(MS, 2 * timeout),
        2 => rng.within(margin, lease),
        3 => rng.within(lease, 2 * lease),
        _ => rng.spread(MS, 3 * lease),
    }
}

fn signed(rng: &mut Rng, most: u64) -> i64 {
    let size = rng.spread(1, most.max(1)) as i64;
    if rng.percent(50) { size } else { -size }
}

fn add(class: Class, schedule: &Schedule, rng: &mut Rng, faults: &mut Vec<Timed>) {
    let settings = &schedule.settings[0];
    let (lease, grace) = (settings.lease, settings.reclaim_grace);
    let timeout = schedule.settings.iter().map(|settings| settings.store_timeout).min().unwrap_or(S);
    let slot = rng.below(schedule.slots.len() as u64) as usize;
    let at = rng.below(schedule.heal_at * 9 / 10);
    let lasts = duration(rng, settings).min(schedule.heal_at - at);
    let rate = rng.spread(300, 40_000) as u32;
    let (fault, lasts) = match class {
        Class::Crash => (Fault::Crash(slot), lasts),
        Class::CrashAmid => (Fault::CrashAmid(slot, rng.below(12) as u32), lasts.max(lease / 2)),
        Class::CrashOnAnswer => (Fault::CrashOnAnswer(slot), lasts.max(lease / 2)),
        Class::Pause => (Fault::Pause(slot), lasts),
        Class::PauseAtSend => (Fault::PauseAtSend(slot, rng.percent(50)), lasts.max(settings.fence_margin)),
        Class::Suspend => (Fault::Suspend(slot), lasts),
        Class::Starve => {
            let turn = rng.spread(100, 50 * MS);
            (Fault::Starve(slot, turn, rng.spread(MS, 2 * settings.fence_margin)), lasts)
        }
        Class::ClockStep => {
            let most = if rng.percent(50) { settings.fence_margin } else { 2 * lease };
            (Fault::ClockStep(slot, signed(rng, most)), 1)
        }
        Class::Drift => (Fault::Drift(slot, signed(rng, 20_000) as i32), lasts),
        Class::Partition => {
            (Fault::Partition(slot, *rng.pick(&[Cut::ToStore, Cut::FromStore, Cut::Both])), lasts)
        }
        Class::Loss => (Fault::Loss(rate), lasts),
        Class::Duplicate => (Fault::Duplicate(rate), lasts),
        Class::LostReply => (Fault::LostReply(rate), lasts),
        Class::LateCommit => (Fault::LateCommit(rate, rng.spread(timeout / 2 + 1, 2 * timeout)), lasts),
        Class::Abort => (Fault::Abort(rate), lasts),
        Class::Delay => (Fault::Delay(rng.spread(MS, timeout + timeout / 4)), lasts),
        Class::Stall => (Fault::Stall(rng.spread(MS, timeout + timeout / 4)), lasts),
        Class::LockRow => (Fault::LockRow(rng.below(schedule.events.len() as u64) as u32), lasts),
        Class::DbStep => {
            let most = if rng.percent(60) { grace } else { 2 * lease };
            (Fault::DbStep(signed(rng, most)), 1)
        }
        Class::Restart => (Fault::Restart, lasts),
        Class::Failover => {
            let step = if rng.percent(30) { signed(rng, grace) } else { 0 };
            (Fault::Failover(rng.spread(MS, lease), step), lasts)
        }
        Class::ReadOnly => (Fault::ReadOnly, lasts),
        Class::Manner => {
            let destination = rng.below(schedule.destinations.len() as u64) as u16;
            (Fault::Manner(destination, manner(rng, settings)), lasts)
        }
        Class::Drain => (Fault::Drain(slot), lasts),
    };
    faults.push(Timed { at, lasts, fault });
}
