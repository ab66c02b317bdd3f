//! Claiming and embargoes (rules P1, P10, P11, P13).

use alloc::format;
use alloc::vec::Vec;
use core::time::Duration;

use super::super::id::{DestinationKey, LeaseKey, RequestId, Token};
use super::super::io::{
    Action, AttemptResult, ClaimReply, ClaimRequest, CycleSummary, EmbargoCause, Grant, HeartbeatEnd,
    Observation, Place, StoreCall, StoreFault, Unsendable,
};
use super::super::row::{ClaimTerms, PROBATION_RECLAIMS};
use super::super::time::{Age, DbTime, Moment};
use super::front::{Front, LEAST_BACK};
use super::portion::Portion;
use super::{Cycle, Heartbeat, Held, Outcome, Phase, Worker};

/// How long a worker polls eagerly after it found something: long enough that under load none ever sleeps.
const AWAKE: Duration = Duration::from_secs(1);

/// The pause between two polls of a worker that is awake is a 64th of the time since it found something: what comes as
/// often as before waits little, and many workers that find little ask little.
const EAGERNESS: u32 = 64;

/// But at least that often.
const SELDOM: Duration = Duration::from_millis(4);

/// What commits up to that long after it fell due, as producers' transactions do, is found by the next claim, and a lease
/// that commits up to that long after it was granted by the next search.
const LATE: Age = Age::of(Duration::from_secs(1));

/// How often claims start ahead of the front of the queue, for what came into it later still.
const RESCAN: Age = Age::of(Duration::from_secs(2));

/// Searches for expired leases take a fiftieth of the time at the most: each reads every lease there is. But none waits
/// for the next one longer than `2G` for it, or the poll interval.
const SEARCH_SHARE: u32 = 50;

/// What a claim reads at least, where there is room for it.
const LEAST_REACH: u32 = 32;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct UnderWay {
    request: RequestId,
    sent: Moment,
    /// It starts ahead of the front of the queue.
    rescans: bool,
    /// It searches for expired leases from ahead of the front of the leases.
    searches_again: bool,
    /// It takes nothing if it begins or has its locks later than that.
    valid_until: Option<DbTime>,
    /// It searches for expired leases.
    searches: bool,
    /// It says that this worker sleeps.
    asleep: bool,
    limit: u32,
    /// There was room for more.
    reduced: bool,
    /// As in the request, in the order of the keys.
    shares: Vec<(DestinationKey, u32)>,
}

impl UnderWay {
    /// Whether it took nothing, since it was too late.
    fn is_void(&self, db_now: DbTime) -> bool {
        self.valid_until.is_some_and(|until| until < db_now)
    }
}

/// When to claim, and whether expired leases may be among it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Claims {
    under_way: Option<UnderWay>,
    /// The next poll.
    at: Moment,
    /// When a claim found something last; polling is eager for a second after that.
    found_at: Moment,
    /// The last claim was full: there is likely more.
    backlog: bool,
    queue: Front<Place>,
    /// By their tokens, which follow the database's clock.
    leases: Front<Token>,
    /// How long the last claim took that started at both fronts, or as little ahead of them as any.
    usual: Age,
    /// The next claim reads no more of the queue than that. What shares keep out of a claim is read, and locked, for
    /// nothing, so that after one which shares limited it is twice what that one found.
    reach: u32,
    portion: Portion,
    /// The last claim was answered.
    pub(super) answered: bool,
    /// Claims in a row of which it is not known whether they were applied, and until when the next one waits for that.
    unknown: u32,
    not_before: Moment,
    /// A destination whose share limited the last claim has room again.
    pub(super) refill: bool,
    /// The next search for expired leases.
    search_at: Moment,
    embargo_until: Moment,
    /// The next claim takes nothing that is ranked before it is locked.
    unranked: bool,
}

impl Claims {
    pub(super) fn new(now: Moment) -> Self {
        Self {
            under_way: None,
            at: now,
            found_at: now,
            backlog: false,
            queue: Front::new(now),
            leases: Front::new(now),
            usual: Age::ZERO,
            reach: u32::MAX,
            portion: Portion::default(),
            answered: false,
            unknown: 0,
            not_before: Moment::default(),
            refill: false,
            search_at: now,
            embargo_until: Moment::default(),
            unranked: false,
        }
    }

    pub(super) fn idle(&self) -> bool {
        self.under_way.is_none()
    }

    fn awake(&self, now: Moment) -> bool {
        now < self.found_at.after(AWAKE)
    }
}

impl Worker {
    pub(super) fn hint(&mut self) {
        self.claims.at = self.now;
        // Whoever woke this worker may have committed late.
        self.rescan_soon();
    }

    /// Something may have come in far ahead of the front.
    pub(super) fn rescan_soon(&mut self) {
        self.claims.queue.ask();
    }

    /// How many more leases may be asked for (rule P13).
    fn room(&self) -> u32 {
        let limits = self.settings.limits();
        let held = u32::try_from(self.leases.len()).unwrap_or(u32::MAX);
        if planted!(self, LeasesUnlimited) {
            return limits.claim_batch;
        }
        limits.claim_batch.min(limits.max_leased.saturating_sub(held))
    }

    fn poll_interval(&self) -> Duration {
        let interval = self.settings.limits().poll_interval;
        if planted!(self, PollSeldom) { interval * 40 } else { interval }
    }

    /// **P10**: not by the very claim that finds the store back, however long it was away.
    fn may_search(&self) -> bool {
        let away = self.failing_since.is_some() && !planted!(self, OutageForgotten);
        self.incarnation.is_some() && !away && !planted!(self, SearchNever)
    }

    fn search_due_at(&self) -> Moment {
        self.claims.search_at.max(self.claims.embargo_until)
    }

    /// **P7**: a call that was given up on may lie somewhere on its way for minutes, and what it would take then would be
    /// found by no look. By the database's clock as far as it is known: a step within `G` voids no claim in time.
    fn valid_until(&self, db_now: DbTime) -> Option<DbTime> {
        let timing = self.timing();
        let valid = Age::of(timing.store_timeout()).plus(Age::of(timing.reclaim_grace()));
        self.db.map(|_| db_now.aged(valid))
    }

    pub(super) fn claim_due_at(&self) -> Moment {
        if !self.neither_claims_nor_looks() || self.drain.is_some()
            || (self.settles.failing() && !planted!(self, ClaimsUnsettled))
            // Who doesn't know what it owns claims nothing more, nor makes the next look wait.
            || (self.looks.failing() && !planted!(self, ClaimsUnsure))
            || self.renewal_overdue()
        {
            return Moment::NEVER;
        }
        let room = self.room();
        if room == 0 {
            return Moment::NEVER;
        }
        // Worth a statement: half a batch, or nothing is left to start.
        let worth = self.queued == 0 || room >= self.settings.limits().claim_batch.div_ceil(2);
        if (self.claims.backlog && worth) || self.claims.refill {
            return self.now.max(self.claims.not_before);
        }
        let mut due = self.claims.at;
        if self.may_search() {
            due = due.min(self.search_due_at());
        }
        // A hint may come while a claim is under way, or so soon after a claim from the beginning that the one it led to
        // started at the front.
        if let Some(soonest) = self.claims.queue.asked_for() {
            due = due.min(soonest);
        }
        due.max(self.claims.not_before)
    }

    pub(super) fn start_claim(&mut self) {
        if self.claim_due_at() > self.now {
            return;
        }
        let limits = *self.settings.limits();
        let timing = *self.timing();
        let unranked = core::mem::take(&mut self.claims.unranked);
        let expired = !unranked && self.may_search() && self.search_due_at() <= self.now;
        // Searches are too seldom to take less than they may.
        let wanted = if expired { self.room() } else { self.room().min(self.claims.reach) };
        let limit = self.claims.portion.of(wanted as usize) as u32;
        if expired && planted!(self, SearchSeldom) {
            self.claims.search_at = self.now.after(timing.lease() * 4);
        } else if expired {
            // **P10**: at most once per max(poll, G/2).
            self.claims.search_at = self.now.after(self.poll_interval().max(timing.reclaim_grace() / 2));
        }
        let share = limits.max_in_flight_per_destination.saturating_mul(2);
        let shares: Vec<_> = self
            .destinations
            .iter()
            .map(|(name, destination)| (name.clone(), share.saturating_sub(destination.held)))
            .collect();
        // What has emptied the outbox is seen from its beginning.
        let whole = self.settings.until_empty && !self.claims.backlog;
        let db_now = self.db_now();
        let (from, rescans) = if whole {
            self.claims.queue.start_over()
        } else {
            self.claims.queue.start(self.now, |back| Place::ahead_of(db_now.before(back)))
        };
        let from = if planted!(self, FrontKept) { self.claims.queue.place } else { from };
        let (leases_from, searches_again) = if expired {
            self.claims.leases.start(self.now, |back| Token::of(db_now.before(back)))
        } else {
            (None, false)
        };
        if planted!(self, RescanNear) && self.claims.queue.back.is_some() {
            self.claims.queue.back = Some(LEAST_BACK);
        }
        let leases_from =
            if planted!(self, LeasesFrontKept) { self.claims.leases.place } else { leases_from };
        let request = self.next_request();
        let valid_until = self.valid_until(db_now);
        let asleep = !self.claims.awake(self.now);
        self.claims.refill = false;
        self.claims.under_way = Some(UnderWay {
            request,
            sent: self.now,
            valid_until,
            searches: expired,
            rescans,
            searches_again,
            asleep,
            limit,
            reduced: limit < wanted,
            shares: shares.clone(),
        });
        let claim = ClaimRequest {
            owner: self.id.clone(),
            terms: ClaimTerms {
                lease: timing.lease(),
                grace: timing.reclaim_grace(),
                expired,
                reclaim_limit: limits.reclaim_limit,
                retry_budget: self.settings.retry().budget,
                valid_until: valid_until.filter(|_| !planted!(self, ClaimsValidForEver)),
            },
            limit,
            incarnation: self.incarnation.clone(),
            probation: if planted!(self, ProbationTogether) {
                limit
            } else {
                u32::from(self.probation == 0 && !unranked)
            },
            share,
            shares,
            from,
            leases_from,
            count_pending: self.settings.until_empty && from.is_none(),
            asleep: asleep.then_some(limits.poll_interval),
        };
        self.actions.push_back(Action::Claim(request, claim));
    }

    pub(super) fn claimed(&mut self, request: RequestId, mut reply: Result<ClaimReply, StoreFault>) {
        let Some(under_way) = self.claims.under_way.take_if(|way| way.request == request) else {
            return self
                .observe(Observation::Unexpected { what: "a reply to a claim that is not under way" });
        };
        if let Ok(reply) = &mut reply {
            reply.searched_expired &= !under_way.is_void(reply.db_now);
        }
        self.claims.at = self.now.after(self.poll_interval());
        self.claims.backlog = false;
        self.claims.answered = reply.is_ok();
        self.note_cost(&under_way, reply.as_ref().ok());
        match reply {
            Ok(reply) => {
                self.claims.unknown = 0;
                self.take(&under_way, reply);
            }
            Err(fault) => {
                if planted!(self, ClaimStopsAfterFailure) {
                    self.claims.at = self.now.after(Duration::from_secs(1_000_000));
                    self.claims.search_at = self.claims.at;
                }
                match fault {
                    StoreFault::Unknown { .. } if !planted!(self, UnknownClaimForgotten) => {
                        self.back_off_unknown();
                        self.look_for(under_way.sent, under_way.valid_until);
                    }
                    StoreFault::Unknown { .. } | StoreFault::NotApplied { .. } => {}
                    StoreFault::Permanent { .. } => self.claims.unknown = 0,
                }
                self.store_failed(StoreCall::Claim, under_way.sent, fault, Vec::new());
            }
        }
    }

    /// How far ahead of the fronts the next claims start, how seldom they search, and how much they ask for, by what this
    /// one took.
    fn note_cost(&mut self, under_way: &UnderWay, reply: Option<&ClaimReply>) {
        let timeout = Age::of(self.timing().store_timeout());
        // However long this process was stopped.
        let took = self.now.age_of(under_way.sent).min(timeout);
        let failed = reply.is_none();
        // A quarter of the timeout more than without: a store that is slow in itself keeps nothing from being found.
        let too_far = took.less(self.claims.usual).times(4) > timeout;
        if !failed
            && (!under_way.rescans || self.claims.queue.is_nearest())
            && (!under_way.searches_again || self.claims.leases.is_nearest())
        {
            self.claims.usual = took;
        }
        if under_way.rescans {
            let took = if planted!(self, RescanSeldom) { took.times(400) } else { took };
            self.claims.queue.rescanned(self.now, took, failed, too_far, RESCAN);
        }
        if under_way.searches_again && reply.is_none_or(|reply| reply.searched_expired) {
            // Searches are seldom as it is: as long as that is cheap, each looks at every lease.
            self.claims.leases.rescanned(self.now, took, failed, too_far, Age::ZERO);
        }
        if under_way.searches && reply.is_some_and(|reply| reply.searched_expired) {
            let pause = took.times(SEARCH_SHARE).min(Age::of(self.timing().reclaim_grace()).times(2));
            self.claims.search_at = self.claims.search_at.max(under_way.sent.aged(pause));
        }
        match reply {
            Some(reply) => self.claims.portion.answered(reply.grants.len() + reply.failed.len()),
            None if self.took_long(under_way.sent) && !planted!(self, ClaimsWhole) => {
                self.claims.portion.unanswered(under_way.limit as usize);
            }
            None => {}
        }
    }

    fn take(&mut self, under_way: &UnderWay, reply: ClaimReply) {
        self.store_answered(under_way.sent, reply.db_now);
        if self.incarnation.as_ref().is_some_and(|known| *known != reply.incarnation) {
            if !planted!(self, EmbargoNever) {
                self.embargo(EmbargoCause::NewIncarnation);
            }
            // What it has forgotten may be anywhere in the queue.
            self.rescan_soon();
            // That was no search: the next one comes as the embargo ends.
            self.claims.search_at = self.now;
        }
        let found = u32::try_from(reply.grants.len() + reply.failed.len()).unwrap_or(u32::MAX);
        self.advance(under_way, &reply);
        self.plan_next(under_way, &reply, found);
        self.incarnation = Some(reply.incarnation);
        for &(row, why) in &reply.failed {
            self.observe(Observation::FailedByClaim { row, why });
        }
        if found > 0 {
            let summary =
                CycleSummary { failed_by_claim: reply.failed.len() as u32, ..CycleSummary::default() };
            let cycle = Cycle { sent: under_way.sent, outstanding: 0, summary };
            self.cycles.insert(under_way.request, cycle);
        }
        for grant in reply.grants {
            self.hold(under_way, grant);
        }
        let limited = self.note_hunger(under_way) && !self.claims.backlog;
        self.claims.reach = if limited { found.saturating_mul(2).max(LEAST_REACH) } else { u32::MAX };
        if found > 0 && self.cycles.get(&under_way.request).is_some_and(|cycle| cycle.outstanding == 0) {
            self.end_cycle(under_way.request);
        }
        let empty = reply.any_pending == Some(false)
            || (planted!(self, UntilEmptyEarly) && self.settings.until_empty && found == 0);
        if empty && self.leases.is_empty() {
            self.shutdown();
        }
    }

    /// When the next claim comes, by what this one found, and whether that one searches.
    fn plan_next(&mut self, under_way: &UnderWay, reply: &ClaimReply, found: u32) {
        self.claims.backlog = found >= under_way.limit;
        if self.claims.backlog && under_way.reduced && reply.searched_expired {
            // Orphans that it left would wait for a whole interval each time.
            self.claims.search_at = self.now;
        }
        if found > 0 {
            self.claims.found_at = self.now;
        }
        // After a full claim the next one waits until it is worth it. Who wasn't said to sleep yet is woken by nobody.
        let awake = self.claims.awake(self.now) || !under_way.asleep;
        if awake && !self.claims.backlog {
            // Claims that each take what came since the last one may fill half of the time.
            let pause = if found > 0 {
                self.now.since(under_way.sent)
            } else {
                (self.now.since(self.claims.found_at) / EAGERNESS).min(SELDOM)
            };
            self.claims.at = self.claims.at.min(self.now.after(pause.max(self.settings.eager_poll)));
        }
        if let Some(due) = reply.next_due_in {
            // One that found nothing where more may be due was cut off on its way there.
            let cut_off = found == 0 && due.is_zero();
            let due = if cut_off { self.settings.eager_poll } else { due };
            self.claims.at = self.claims.at.min(self.now.after(due));
        }
        if under_way.is_void(reply.db_now) {
            // The database's clock was set forward by more than `G`, and now it is known.
            self.claims.at = self.now;
            if under_way.searches {
                self.claims.search_at = self.now;
            }
        }
        let left = reply.front.is_some_and(|front| front != Place::behind(front.due));
        if reply.searched_expired && !self.claims.backlog && left {
            // Expired leases that others keep locked may have had the seats of what is due.
            self.claims.unranked = true;
            self.claims.at = self.now;
        }
    }

    /// Where the next claim starts. Never so late that it would pass over what falls due, or is granted, from [`LATE`]
    /// before the start of this one on: a clock that was set back takes the front back with it.
    fn advance(&mut self, under_way: &UnderWay, reply: &ClaimReply) {
        let latest = reply.db_now.ago(self.now.age_of(under_way.sent).plus(LATE));
        let latest = if planted!(self, FrontAtNow) { reply.db_now } else { latest };
        self.claims.queue.place = reply.front.map(|front| front.min(Place::ahead_of(latest)));
        if reply.searched_expired {
            self.claims.leases.place = reply.leases_front.map(|front| front.min(Token::of(latest)));
        }
    }

    fn hold(&mut self, under_way: &UnderWay, grant: Grant) {
        let key = grant.key;
        if self.leases.contains_key(&key) {
            return self.observe(Observation::Unexpected { what: "a grant of a lease that is held" });
        }
        // A higher token for a row that is held means that the older lease is lost.
        let older: Vec<LeaseKey> = self.leases_of(key.row).map(|(other, _)| *other).collect();
        for other in &older {
            self.lost(*other);
        }
        let behind = self.leases_of(key.row).next().is_some() && !planted!(self, BehindIgnored);
        let destination = self.destinations.entry(grant.destination.clone()).or_default();
        destination.held += 1;
        destination.granted += 1;
        if let Some(cycle) = self.cycles.get_mut(&under_way.request) {
            cycle.outstanding += 1;
            cycle.summary.claimed += 1;
            cycle.summary.reclaimed += u32::from(grant.reclaimed);
        }
        if grant.reclaims >= PROBATION_RECLAIMS {
            self.probation += 1;
            self.observe(Observation::Probation { key, reclaims: grant.reclaims });
        }
        let held = Held {
            cycle: Some(under_way.request),
            destination: Some(grant.destination),
            attempts: grant.attempts,
            max_attempts: grant.max_attempts,
            reclaims: grant.reclaims,
            confirmed: under_way.sent,
            heartbeat: Heartbeat::Batched,
            phase: Phase::Behind,
        };
        self.heartbeats.insert((held.confirmed, key));
        self.fences.insert((held.confirmed, key));
        self.leases.insert(key, held);
        match grant.unsendable {
            Some(Unsendable::Oversized { .. }) if planted!(self, OversizedSent) => self.enqueue(key),
            Some(Unsendable::Oversized { bytes }) => {
                let error = format!("payload of {bytes} bytes is larger than max_payload");
                let outcome = self.judge(key, AttemptResult::Errored { error });
                self.conclude(key, outcome);
            }
            Some(Unsendable::Malformed { error }) => {
                let outcome = self.judge(key, AttemptResult::Undeliverable { error });
                self.conclude(key, outcome);
            }
            None if self.drain.is_some() && !behind => {
                self.conclude(key, Outcome::Release { due: None, why: HeartbeatEnd::Drained });
            }
            // The reply came so late that the lease is past its fence.
            None if self.fence_at(under_way.sent) <= self.now => self.fence(key),
            None if !behind => self.enqueue(key),
            None => {}
        }
    }

    /// Which destinations were limited by their share rather than by the outbox. Answers whether any was.
    fn note_hunger(&mut self, under_way: &UnderWay) -> bool {
        let mut any = false;
        let cap = self.settings.limits().max_in_flight_per_destination;
        for (name, destination) in &mut self.destinations {
            let share = under_way.shares.binary_search_by(|(other, _)| other.cmp(name));
            let room = share.map_or(cap.saturating_mul(2), |at| under_way.shares[at].1);
            destination.hungry = core::mem::take(&mut destination.granted) >= room;
            self.claims.refill |= destination.hungry && destination.held <= cap;
            any |= destination.hungry;
        }
        any
    }

    /// **P7**: whatever keeps claims from their answers, such as commits that wait for a standby, may keep their sessions
    /// and the rows that these have locked as well, while looks are answered. The first is followed as usual, the others
    /// ever later, until after `L`.
    fn back_off_unknown(&mut self) {
        let pause = self.poll_interval().saturating_mul(1 << self.claims.unknown.min(16));
        if self.claims.unknown > 0 {
            self.claims.not_before = self.now.after(pause.min(self.timing().lease()));
        }
        self.claims.unknown = self.claims.unknown.saturating_add(1);
    }

    /// **P10**: an outage is over. It extends no embargo: or calls that are lost now and then would keep orphans waiting.
    pub(super) fn embargo_after_outage(&mut self) {
        if self.claims.embargo_until <= self.now || planted!(self, EmbargoAlways) {
            self.embargo(EmbargoCause::Outage);
        }
    }

    /// **P10**: for one `L` no expired leases.
    fn embargo(&mut self, cause: EmbargoCause) {
        if planted!(self, EmbargoOnce) && self.claims.embargo_until > Moment::default() {
            return;
        }
        let length = if planted!(self, EmbargoAlways) { 12 } else { 1 };
        self.claims.embargo_until = self.now.after(self.timing().lease() * length);
        self.observe(Observation::Embargo(cause));
    }
}
