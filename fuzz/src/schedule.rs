//! Whole schedules against the oracle: a seed's world, with faults that the script names instead of the seed's own.

use sim::schedule::{Asked, Cut, Fault, Manner, Schedule, Timed};
use sim::{Options, Profile};

use crate::script::{Step, steps};

/// `S` seed, profile: the world. Then faults; each has the millisecond in which it begins, the milliseconds for which
/// it lasts, and up to two numbers of its own: a slot, rate, row or destination, and a size.
///
/// # Panics
/// With the line that a search prints, if the schedule breaks a promise.
pub fn schedule(data: &[u8]) {
    let script = steps(data, 40);
    let start = script.iter().find(|step| step.letter == b'S');
    let seed = start.map_or(0, |step| step.numbers[0].unsigned_abs());
    // The liveness profile breaks things for ever on purpose; what stays whole is known to its generator alone.
    let profiles = Profile::ALL.into_iter().filter(|profile| *profile != Profile::Liveness);
    let profile = start.map_or(0, |step| step.below(1, Profile::ALL.len() - 1));
    let Some(profile) = profiles.into_iter().nth(profile) else { return };
    let mut schedule = sim::generate(seed, profile);
    schedule.faults = script.iter().filter_map(|step| timed(step, &schedule)).collect();
    schedule.faults.sort_by_key(|timed| timed.at);
    let outcome = sim::run(&schedule, Options::default());
    if let Some(violation) = outcome.violation {
        panic!("{violation}: {:?}", schedule.faults);
    }
}

fn timed(step: &Step, schedule: &Schedule) -> Option<Timed> {
    const MS: u64 = 1_000;
    let heal_at = schedule.heal_at;
    let settings = &schedule.settings[0];
    let at = (step.numbers[0].unsigned_abs() % (heal_at / MS)) * MS;
    let lasts = step.within(1, 1, heal_at / MS) * MS;
    let slot = step.below(2, schedule.slots.len());
    let rate = step.within(2, 1, 40_000) as u32;
    let timeout = schedule.settings.iter().map(|settings| settings.store_timeout).min().unwrap_or(MS);
    let slow = (step.numbers[3].unsigned_abs().saturating_mul(MS)).clamp(MS, timeout + timeout / 4);
    let shift = step.signed(3, (2 * settings.lease / MS) as i64) * MS as i64;
    let destination = step.below(2, schedule.destinations.len()) as u16;
    let down = settings.lease / 2;
    let (fault, lasts) = match step.letter {
        b'c' => (Fault::Crash(slot), lasts),
        b'a' => (Fault::CrashAmid(slot, step.below(3, 12) as u32), lasts.max(down)),
        b'n' => (Fault::CrashOnAnswer(slot), lasts.max(down)),
        b'p' => (Fault::Pause(slot), lasts),
        b'q' => (Fault::PauseAtSend(slot, step.below(3, 2) == 0), lasts.max(settings.fence_margin)),
        b'u' => (Fault::Suspend(slot), lasts),
        b'v' => (Fault::Starve(slot, MS, step.within(3, 1, 2 * settings.fence_margin / MS) * MS), lasts),
        b'k' => (Fault::ClockStep(slot, shift), 1),
        b'd' => (Fault::Drift(slot, step.signed(3, 20_000) as i32), lasts),
        b't' => (Fault::Partition(slot, [Cut::ToStore, Cut::FromStore, Cut::Both][step.below(3, 3)]), lasts),
        b'l' => (Fault::Loss(rate), lasts),
        b'e' => (Fault::Duplicate(rate), lasts),
        b'r' => (Fault::LostReply(rate), lasts),
        b'm' => (Fault::LateCommit(rate, slow.max(timeout / 2 + 1)), lasts),
        b'b' => (Fault::Abort(rate), lasts),
        b'y' => (Fault::Delay(slow), lasts),
        b'w' => (Fault::Stall(slow), lasts),
        b'o' => (Fault::LockRow(step.below(2, schedule.events.len()) as u32), lasts),
        b'g' => (Fault::DbStep(shift), 1),
        b'x' => (Fault::Restart, lasts),
        b'f' => {
            let lost = step.within(2, 1, settings.lease / MS) * MS;
            let grace = settings.reclaim_grace as i64;
            (Fault::Failover(lost, shift.clamp(-grace, grace)), lasts)
        }
        b'h' => (Fault::ReadOnly, lasts),
        b'i' => (Fault::Manner(destination, manner(step, settings.lease)), lasts),
        b'z' => (Fault::Drain(slot), lasts),
        _ => return None,
    };
    Some(Timed { at, lasts: lasts.min(heal_at - at).max(1), fault })
}

fn manner(step: &Step, lease: u64) -> Manner {
    match step.below(3, 9) {
        0 => Manner::Ok(lease, 2 * lease),
        1 => Manner::Status(500),
        2 => Manner::Status(302),
        3 => Manner::RetryAfter(429, Asked::Delay(lease)),
        4 => Manner::RetryAfter(503, Asked::Date(lease as i64)),
        5 => Manner::Hang,
        6 => Manner::ResetBefore,
        7 => Manner::ResetAfter,
        _ => Manner::TooLate,
    }
}
