//! The oracle's own books.

use crate::clock::LocalClock;
use crate::embargo::Outage;
use crate::fact::{DbMicros, Down, End, Lane, Micros, Status};
use crate::violation::Excuses;

/// No lease, no link.
pub(crate) const NONE: u32 = u32::MAX;

/// Nothing confirmed yet.
pub(crate) const UNKNOWN: i64 = i64::MIN;

/// One lease that was ever granted.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) event: u32,
    pub(crate) worker: u32,
    pub(crate) token: i64,
    /// When its claim was sent: by the clock as it was then it says until when it is valid.
    pub(crate) asked_at: Micros,
    pub(crate) claimed_at: Micros,
    /// When the claim or the last renewal that was applied had its lock, and read the clock.
    pub(crate) granted_at: Micros,
    pub(crate) renewals: u32,
    /// The holder's clock when it sent the last confirmed claim or renewal.
    pub(crate) confirmed: i64,
    /// Since when its holder knows of it.
    pub(crate) known_since: Micros,
    /// The holder's clock when it sent the claim.
    pub(crate) asked_local: i64,
    /// When its request was closed.
    pub(crate) closed_at: Micros,
    pub(crate) open: bool,
    pub(crate) opened: bool,
    pub(crate) opened_at: Micros,
    pub(crate) end: Option<End>,
    /// How the holder's request under the same number ended, of a claim that is lost.
    pub(crate) end_before: Option<End>,
    /// The holder's clock when it learnt the end.
    pub(crate) known: i64,
    pub(crate) impossible: bool,
    pub(crate) born_dead: bool,
    /// Somebody has kept the row locked for longer than the holder's `R`.
    pub(crate) locked_long: bool,
    /// For how long outside sessions have kept the row locked, in all, since the last confirmed claim or renewal.
    pub(crate) locked_for: Micros,
    /// `locked_for` when its request ended.
    pub(crate) locked_to_end: Micros,
    /// From when to when the last of these locks was held.
    pub(crate) last_lock: (Micros, Micros),
    /// The call of the last renewal that met its row locked, if none was confirmed since.
    pub(crate) skipped: Option<u32>,
    /// A settle of it has met its row locked.
    pub(crate) settle_skipped: bool,
    /// Its token is so far behind the clock when it commits that a search may pass over it.
    pub(crate) behind: bool,
    /// What excused its loss when it was taken.
    pub(crate) lost: Excuses,
    /// Its holder may not count it: it committed after the claim was given up, or again after a failover, or its settle was
    /// refused for good.
    pub(crate) stray: bool,
    /// Its holder may not know what it is of: the claim had no answer.
    pub(crate) orphan: bool,
    /// The event's lease before this one.
    pub(crate) before: u32,
}

impl Lease {
    /// Its holder knows it, and of what it is.
    pub(crate) fn is_known(&self) -> bool {
        !self.stray && !self.orphan
    }
}

/// One event.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) exists: bool,
    pub(crate) status: Status,
    pub(crate) pending_since: Micros,
    pub(crate) destination: u16,
    pub(crate) attempts: u32,
    pub(crate) max_attempts: u32,
    pub(crate) due: DbMicros,
    pub(crate) reclaims: u32,
    /// The highest token ever seen.
    pub(crate) top_token: i64,
    pub(crate) token: i64,
    /// The lease in force.
    pub(crate) lease: u32,
    pub(crate) until: DbMicros,
    /// The last lease granted.
    pub(crate) last: u32,
    pub(crate) open: u32,
    pub(crate) successes: u32,
    pub(crate) poison: bool,
    /// Its payload is no larger than allowed, and its row decodes.
    pub(crate) sendable: bool,
    /// Run-outs whose holder was not killed by a poison event.
    pub(crate) other_run_outs: u32,
    pub(crate) owners: u32,
    /// Its last settle committed after the client had given it up.
    pub(crate) ended_late: bool,
    /// When commits of it were last lost.
    pub(crate) restored_at: Option<Micros>,
    /// Since when an outside session has kept its row locked.
    pub(crate) locked_since: Option<Micros>,
    /// When locks that were held for long were let go, and for how long each had been held: those before which none was
    /// held for longer.
    pub(crate) long_locks: Vec<(Micros, u64)>,
    /// When it last became free: committed, settled or restored.
    pub(crate) freed_at: Micros,
    /// When the last transaction ended that had its lock for long, whether it changed the row or not.
    pub(crate) unlocked_at: Micros,
    /// Since when and until when one transaction after another had its lock.
    pub(crate) locked: (Micros, Micros),
}

/// Calls of one lane.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LaneBook {
    pub(crate) misses: u8,
    pub(crate) last_miss: Option<Micros>,
    /// When a second call in a row was missed.
    pub(crate) double_miss: Option<Micros>,
    pub(crate) under_way: u32,
}

/// One start of a worker process.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) terms: u16,
    pub(crate) clock: LocalClock,
    pub(crate) down: Option<Down>,
    pub(crate) stops: Vec<(Micros, Micros)>,
    pub(crate) stopped_since: Option<Micros>,
    /// Since when its clock stands still.
    pub(crate) still_since: Option<Micros>,
    pub(crate) clock_steps: Vec<(Micros, u64)>,
    /// By how much its clock was set back, in all.
    pub(crate) set_back: u64,
    /// The latest that its clock has shown before it was set.
    pub(crate) shown: i64,
    pub(crate) worst_ppm: u64,
    pub(crate) lanes: [LaneBook; 4],
    /// When a call last went unanswered.
    pub(crate) last_miss: Option<Micros>,
    pub(crate) outage: Outage,
    pub(crate) drain_began: Option<Micros>,
    pub(crate) open: u32,
    pub(crate) open_by_destination: Vec<u32>,
    /// Leases that the store shows under it.
    pub(crate) held: u32,
    /// Of these those that it counts.
    pub(crate) counted: u32,
    /// And those of which it knows the destination.
    pub(crate) counted_by_destination: Vec<u32>,
    /// A claim was answered: it knows the database.
    pub(crate) met_store: Option<Micros>,
    /// How many of its last claims had no answer.
    pub(crate) claims_missed: u8,
    /// Until when it claimed nothing because of that: from the second on for two poll intervals, then four, and so on up
    /// to `L` (rule P7).
    pub(crate) claims_back: Micros,
    /// When it sent its last claim.
    pub(crate) claimed_at: Micros,
    /// Since when it has had a settle without an answer.
    pub(crate) unsettled_since: Option<Micros>,
    /// When it sent the last call whose answer told it the time.
    pub(crate) told_at: Option<Micros>,
    /// Since when the database's clock is ahead of its own by more than it may be, of which it has not been told.
    pub(crate) ahead_since: Option<Micros>,
    /// The same, and when it was told.
    pub(crate) told_ahead: Option<(Micros, Micros)>,
    /// When something last went wrong for it that may delay its claims.
    pub(crate) quiet_since: Micros,
}

impl Worker {
    /// For how long it was stopped between two true times.
    pub(crate) fn stopped_between(&self, from: Micros, to: Micros) -> u64 {
        let open = self.stopped_since.map(|since| (since, to));
        let stops = self.stops.iter().copied().rev().take_while(|(_, end)| *end > from);
        stops.chain(open).map(|(start, end)| end.min(to).saturating_sub(start.max(from))).sum()
    }

    /// Its clock has always run as true time does.
    pub(crate) fn is_steady(&self) -> bool {
        self.clock_steps.is_empty() && self.worst_ppm == 0
    }

    /// By how much its clock was stepped at or after `since`; a step back takes as long to make up for.
    pub(crate) fn clock_stepped_since(&self, since: Micros) -> u64 {
        self.clock_steps.iter().filter(|(at, by)| at + by >= since).map(|(_, by)| by).sum()
    }
}

/// One store call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) lane: Lane,
    pub(crate) sent: Micros,
    pub(crate) sent_local: i64,
    pub(crate) over: bool,
    /// Its worker's calls had failed for `H` or more when it was sent.
    pub(crate) cut_off: bool,
    /// The leases that it was applied to: an index into the links.
    pub(crate) applied: u32,
}

/// A lease that a call was applied to, and the next one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) lease: u32,
    pub(crate) next: u32,
}

/// The entry for a destination, made if need be.
pub(crate) fn entry(counts: &mut Vec<u32>, destination: u16) -> &mut u32 {
    let at = usize::from(destination);
    if counts.len() <= at {
        counts.resize(at + 1, 0);
    }
    &mut counts[at]
}
