//! The story of a run: one readable line a step.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use sim_oracle::{DbClockModel, Fact};

use crate::schedule::Schedule;
use crate::world::EPOCH;

fn seconds(micros: i64) -> String {
    format!("{:.6}", micros as f64 / 1e6)
}

/// The story: true time, the database's clock since the beginning, who, what. Polls that found nothing are left out.
pub fn story(schedule: &Schedule, facts: &[(u64, Fact)]) -> String {
    let mut text = String::from("   true time     database  who      what\n");
    let mut db = DbClockModel::new(EPOCH);
    let mut begun = vec![false; schedule.faults.len()];
    let busy = busy_calls(facts);
    for (at, fact) in facts {
        if let Fact::CallSent { call, .. } | Fact::CallAnswered { call, .. } = fact
            && !busy.contains(call)
        {
            continue;
        }
        if let Fact::DbStepped { by } = fact {
            db.step(*at, *by);
        }
        let Some((who, what)) = line(schedule, fact, &mut begun) else { continue };
        let (time, clock) = (seconds(*at as i64), seconds(db.at(*at) - EPOCH));
        let _ = writeln!(text, "{time:>12} {clock:>12}  {who:<8} {what}");
    }
    text
}

/// Calls that did something, or failed.
fn busy_calls(facts: &[(u64, Fact)]) -> BTreeSet<u32> {
    let call = |(_, fact): &(u64, Fact)| match *fact {
        Fact::Claimed { call, .. }
        | Fact::ClaimFailed { call, .. }
        | Fact::Renewed { call, .. }
        | Fact::Settled { call, .. }
        | Fact::CallFailed { call, .. } => Some(call),
        _ => None,
    };
    facts.iter().filter_map(call).collect()
}

fn worker(number: u32) -> String {
    format!("w{number}")
}

fn line(schedule: &Schedule, fact: &Fact, begun: &mut [bool]) -> Option<(String, String)> {
    let db = || "db".to_owned();
    let since = |time: i64| seconds(time - EPOCH);
    Some(match *fact {
        Fact::EventCommitted { event, destination, due, max_attempts, .. } => (
            "producer".into(),
            format!("event {event} for d{destination}, due {}, {max_attempts} tries", since(due)),
        ),
        Fact::WorkerUp { worker: w, slot, local, .. } => {
            (worker(w), format!("starts in slot {slot}; its clock shows {}", seconds(local)))
        }
        Fact::WorkerStopped { worker: w } => (worker(w), "is stopped".into()),
        Fact::WorkerContinued { worker: w } => (worker(w), "goes on".into()),
        Fact::WorkerClock { worker: w, local, ppm } => {
            (worker(w), format!("its clock shows {} and gains {ppm} ppm", seconds(local)))
        }
        Fact::WorkerDown { worker: w, how } => (worker(w), format!("is gone: {how:?}")),
        Fact::DrainBegan { worker: w } => (worker(w), "drains".into()),
        Fact::CallSent { worker: w, call, lane, .. } => (worker(w), format!("sends {lane:?} (call {call})")),
        Fact::CallAnswered { worker: w, call, .. } => (worker(w), format!("has the answer to call {call}")),
        Fact::CallFailed { worker: w, call } => (worker(w), format!("gives up call {call}")),
        Fact::Claimed { worker: w, call, event, token, until, reclaimed, .. } => {
            let how = if reclaimed { "RECLAIMS" } else { "claims" };
            (db(), format!("{} {how} {event}#{token} until {} (call {call})", worker(w), since(until)))
        }
        Fact::ClaimFailed { worker: w, event, why, .. } => {
            (db(), format!("the claim of {} fails {event}: {why:?}", worker(w)))
        }
        Fact::Renewed { worker: w, call, event, token, answer, until, .. } => (
            db(),
            format!("{} renews {event}#{token}: {answer:?}, until {} (call {call})", worker(w), since(until)),
        ),
        Fact::Settled { worker: w, call, event, token, settle, answer, .. } => {
            (db(), format!("{} settles {event}#{token} as {settle:?}: {answer:?} (call {call})", worker(w)))
        }
        Fact::SettleImpossible { worker: w, event, token } => {
            (db(), format!("refuses for good the settle of {event}#{token} by {}", worker(w)))
        }
        Fact::LockDropped { event, .. } => (db(), format!("leaves {event} as it was and unlocks it")),
        Fact::RequestOpened { worker: w, event, token, number } => {
            (worker(w), format!("opens request {number} for {event}#{token}"))
        }
        Fact::RequestEnded { worker: w, event, token, end } => {
            (worker(w), format!("request for {event}#{token} ends: {end:?}"))
        }
        Fact::StartAllowed { .. } | Fact::OutcomeKnown { .. } => return None,
        Fact::RowLocked { event } => (db(), format!("an outside session locks {event}")),
        Fact::RowUnlocked { event } => (db(), format!("the outside session lets go of {event}")),
        Fact::DbStepped { by } => (db(), format!("the clock is stepped by {}", seconds(by))),
        Fact::DbDown => (db(), "is down".into()),
        Fact::DbUp { standby: false, .. } => (db(), "is up again".into()),
        Fact::DbUp { lost, standby: true } => {
            (db(), format!("a standby takes over; {lost} confirmed commits are lost"))
        }
        Fact::RowRestored { event, status, owner, .. } => {
            (db(), format!("{event} is as before: {status:?}, owner {owner:?}"))
        }
        Fact::EventVanished { event } => (db(), format!("{event} was never committed")),
        Fact::Disturbed { what } => {
            let timed = schedule.faults[usize::from(what)];
            let again = std::mem::replace(&mut begun[usize::from(what)], true);
            let text = if again { "ends" } else { "begins" };
            ("FAULT".into(), format!("{text}: {:?}", timed.fault))
        }
        Fact::Healed => ("FAULT".into(), "nothing new goes wrong from here on".into()),
        Fact::Census { pending, delivered, failed } => {
            (db(), format!("holds {pending} pending, {delivered} delivered, {failed} failed"))
        }
    })
}
