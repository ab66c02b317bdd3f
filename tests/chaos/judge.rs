//! Judges a story from the receivers' records, the table, and the history of its leases.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Instant;

use sqlx::{PgConnection, Row};

use crate::bed::{FENCE_MARGIN, GRACE, LEASE, POLL, STORE_TIMEOUT, Stalls};
use crate::common::Seen;
use crate::faults::{Disturbance, Fault};
use crate::rooms::Rooms;

/// What the judge is shown.
pub(crate) struct Evidence<'a> {
    pub(crate) events: u32,
    /// Each with the number of its receiver.
    pub(crate) requests: Vec<(usize, Seen)>,
    pub(crate) disturbances: Vec<Disturbance>,
    /// Whether a failover may have lost confirmed commits.
    pub(crate) lossy: bool,
    /// One moment by both clocks.
    pub(crate) anchor: (Instant, i64),
    /// When the last event was written.
    pub(crate) produced: i64,
    pub(crate) stalls: Stalls,
    pub(crate) memory: Memory,
    pub(crate) connection: &'a mut PgConnection,
}

/// The resident memory of one worker that lived through it all, in KiB.
#[derive(Default)]
pub(crate) struct Memory(pub(crate) Vec<u64>);

impl Memory {
    /// The most in a part of the samples, in quarters.
    pub(crate) fn most(&self, quarters: std::ops::Range<usize>) -> u64 {
        let at = |quarter: usize| self.0.len() * quarter / 4;
        self.0[at(quarters.start)..at(quarters.end)].iter().copied().max().unwrap_or(0)
    }
}

/// What was seen. Whatever may not be is in `wrong`.
#[derive(Default)]
pub(crate) struct Verdict {
    pub(crate) events: u32,
    pub(crate) requests: usize,
    pub(crate) faults: BTreeMap<String, u32>,
    /// Requests after one that was answered 2xx.
    pub(crate) duplicates: usize,
    /// Requests that the worker broke off or left behind.
    pub(crate) broken_off: usize,
    /// Pairs of requests for one event open at once, of workers that were stopped or cut off from the destination.
    pub(crate) overlaps: usize,
    pub(crate) takeovers: usize,
    /// The longest that one worker had room for a lease after its end and grace, or after the embargo that follows an
    /// outage, before it was taken, in microseconds.
    pub(crate) latest_takeover: i64,
    /// Of these, those that had to wait until a worker had room for the destination.
    pub(crate) crowded_takeovers: usize,
    /// The longest until work went on after an outage, in microseconds.
    pub(crate) latest_resume: i64,
    /// Requests whose leases a failover forgot.
    pub(crate) forgotten: usize,
    /// How long the machine starved this process, in microseconds.
    pub(crate) starved: i64,
    pub(crate) memory: Memory,
    pub(crate) wrong: Vec<String>,
}

impl Verdict {
    /// Fails unless all is as it must be.
    pub(crate) fn hold(&self, name: &str) {
        println!("{name}: {self}");
        assert!(
            self.wrong.is_empty(),
            "{name}: {} things are wrong:\n{}",
            self.wrong.len(),
            self.first_wrong()
        );
    }

    fn first_wrong(&self) -> String {
        self.wrong.iter().take(20).map(|wrong| format!("  {wrong}\n")).collect()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<String> = self.faults.iter().map(|(name, count)| format!("{count} {name}")).collect();
        write!(
            f,
            "{} events, {} requests, {} duplicates, {} broken off, {} excused overlaps, {} forgotten; {} takeovers, {} \
             of them for want of room, the latest {} ms after lease and grace; work resumed within {} ms; \
             starved for {} ms; memory {} to {} KiB; faults: {}",
            self.events,
            self.requests,
            self.duplicates,
            self.broken_off,
            self.overlaps,
            self.forgotten,
            self.takeovers,
            self.crowded_takeovers,
            self.latest_takeover / 1_000,
            self.latest_resume / 1_000,
            self.starved / 1_000,
            self.memory.most(0..2),
            self.memory.most(3..4),
            faults.join(", ")
        )
    }
}

/// A request by the wall clock.
struct Request {
    destination: usize,
    owner: Option<String>,
    token: i64,
    opened: i64,
    closed: i64,
    answered: Option<u16>,
}

impl Request {
    fn accepted(&self) -> bool {
        self.answered.is_some_and(|status| (200..300).contains(&status))
    }
}

const fn micros(time: std::time::Duration) -> i64 {
    time.as_micros() as i64
}

const LEASE_MICROS: i64 = micros(LEASE);

/// How long it may take until work goes on after an outage.
const RESUMES_WITHIN: i64 = micros(POLL) + 1_000_000;

/// How long a settle or a heartbeat may take on a machine that is busy, a failed try included.
const SETTLES_WITHIN: i64 = 2 * micros(STORE_TIMEOUT);

pub(crate) async fn judge(evidence: Evidence<'_>) -> Verdict {
    let mut judge = Judge {
        verdict: Verdict {
            events: evidence.events,
            requests: evidence.requests.len(),
            starved: evidence.stalls.between(i64::MIN, i64::MAX),
            memory: evidence.memory,
            ..Verdict::default()
        },
        disturbances: evidence.disturbances,
        lossy: evidence.lossy,
        stalls: evidence.stalls,
    };
    for disturbance in &judge.disturbances {
        let name = format!("{:?}", disturbance.fault);
        *judge.verdict.faults.entry(name).or_default() += 1;
    }
    let owners = owners(evidence.connection).await;
    let mut events: BTreeMap<String, Vec<Request>> = BTreeMap::new();
    let (instant, wall) = evidence.anchor;
    let micros_of = |at: Instant| wall + micros(at.duration_since(instant));
    for (destination, seen) in evidence.requests {
        let owner = owners.get(&(seen.event.clone(), seen.token)).cloned();
        events.entry(seen.event).or_default().push(Request {
            destination,
            owner,
            token: seen.token,
            opened: micros_of(seen.opened),
            closed: seen.closed.map_or(i64::MAX, micros_of),
            answered: seen.answered,
        });
    }
    judge.nothing_is_lost(evidence.events, &events, evidence.connection).await;
    for (event, requests) in &mut events {
        requests.sort_by_key(|request| request.opened);
        judge.requests(event, requests);
    }
    judge.takeovers(evidence.connection).await;
    judge.resumes(evidence.produced, evidence.connection).await;
    judge.verdict
}

/// Which worker was granted which lease.
async fn owners(connection: &mut PgConnection) -> HashMap<(String, i64), String> {
    let rows = sqlx::query("select event, token, owner from chaos.history where owner is not null")
        .fetch_all(connection)
        .await
        .expect("the history");
    let owner =
        |owner: String| owner.rsplit_once('-').map(|(name, _)| name.to_owned()).expect("name and suffix");
    rows.iter().map(|row| ((row.get(0), row.get(1)), owner(row.get(2)))).collect()
}

struct Judge {
    verdict: Verdict,
    disturbances: Vec<Disturbance>,
    lossy: bool,
    stalls: Stalls,
}

impl Judge {
    fn wrong(&mut self, text: String) {
        self.verdict.wrong.push(text);
    }

    /// A disturbance of a worker within a span of time, that is such; or a machine that starved it (S2).
    fn disturbed(
        &self,
        owner: Option<&str>,
        begin: i64,
        end: i64,
        such: impl Fn(&Disturbance) -> bool,
    ) -> bool {
        if self.stalls.longest(begin, end) > micros(FENCE_MARGIN) {
            return true;
        }
        let slack = self.stalls.between(begin, end);
        self.disturbances.iter().any(|disturbance| {
            let concerns = match (&disturbance.worker, owner) {
                (Some(worker), Some(owner)) => worker == owner,
                _ => true,
            };
            concerns
                && such(disturbance)
                && disturbance.begin <= end.saturating_add(slack)
                && disturbance.end >= begin - slack
        })
    }

    async fn nothing_is_lost(
        &mut self,
        written: u32,
        events: &BTreeMap<String, Vec<Request>>,
        connection: &mut PgConnection,
    ) {
        let rows = sqlx::query("select event_id, delivery_status, attempts from leasehold.outbox_events")
            .fetch_all(connection)
            .await
            .expect("the table");
        if rows.len() != written as usize {
            self.wrong(format!("{written} events were written, the table has {}", rows.len()));
        }
        for row in rows {
            let (event, status, attempts): (String, String, i32) = (row.get(0), row.get(1), row.get(2));
            let requests = events.get(&event).map_or(&[][..], Vec::as_slice);
            if status != "delivered" || !requests.iter().any(Request::accepted) {
                self.wrong(format!("{event} is {status}, and its receiver saw {} requests", requests.len()));
            }
            if attempts as usize > requests.len() && !self.has_cut_destinations() {
                self.wrong(format!("{event} has {attempts} attempts, but {} requests", requests.len()));
            }
        }
    }

    fn has_cut_destinations(&self) -> bool {
        let spends = |fault| matches!(fault, Fault::Destination(_) | Fault::Descriptors);
        self.disturbances.iter().any(|disturbance| spends(disturbance.fault))
    }

    /// How long a worker that goes on may take to end its requests.
    fn ends_within(&self, at: i64) -> i64 {
        micros(FENCE_MARGIN) + self.stalls.between(at, at + micros(FENCE_MARGIN))
    }

    /// The requests of one event, in the order of their arrival.
    fn requests(&mut self, event: &str, requests: &[Request]) {
        for (index, request) in requests.iter().enumerate() {
            if request.owner.is_none() {
                self.verdict.forgotten += 1;
                if !self.lossy {
                    self.wrong(format!("{event} was sent under token {}, never granted", request.token));
                }
            }
            let Some(next) = requests.get(index + 1) else { break };
            let owner = request.owner.as_deref();
            let elsewhere =
                |one: &Disturbance| one.destination.is_some_and(|number| number != request.destination);
            let may_overlap = |one: &Disturbance| one.fault.may_overlap(self.lossy) && !elsewhere(one);
            if next.token <= request.token
                && !self.disturbed(owner, request.opened, next.opened, may_overlap)
                && !self.disturbed(next.owner.as_deref(), request.opened, next.opened, may_overlap)
            {
                let text = format!("{event} was sent under token {} and then {}", request.token, next.token);
                self.verdict.wrong.push(text);
            }
            for later in requests[index + 1..].iter().take_while(|later| later.opened < request.closed) {
                let end = request.closed.min(later.closed);
                // Who was stopped ends its request when it goes on.
                let ends =
                    |one: &Disturbance| !one.fault.stops() || end < one.end + self.ends_within(one.end);
                let excused = |one: &Disturbance| may_overlap(one) && ends(one);
                if self.disturbed(owner, request.opened, end, excused) {
                    self.verdict.overlaps += 1;
                } else {
                    let text = format!(
                        "{event} had two requests open at once: {owner:?} under {} and {:?} under {}, for {} ms",
                        request.token,
                        later.owner,
                        later.token,
                        (end - later.opened) / 1_000
                    );
                    self.verdict.wrong.push(text);
                }
            }
            // A refusal explains the next request; so does nothing but a fault for the rest.
            if request.answered.is_some() && !request.accepted() {
                continue;
            }
            if request.accepted() {
                self.verdict.duplicates += 1;
            } else {
                self.verdict.broken_off += 1;
            }
            let end = request.closed.min(next.opened).saturating_add(SETTLES_WITHIN);
            let explains = |one: &Disturbance| one.fault.may_repeat() && !elsewhere(one);
            // Who lost the lease may have lost it to a fault that was over when the request began.
            let taken = next.owner.as_deref() != owner;
            let begin = request.opened - if taken { LEASE_MICROS } else { 0 } - SETTLES_WITHIN;
            if !self.disturbed(owner, begin, end, explains) {
                let text = format!(
                    "{event} was sent again without a fault: {owner:?} under {} was answered {:?} after {} ms, {:?} came \
                     {} ms later",
                    request.token,
                    request.answered,
                    (request.closed - request.opened) / 1_000,
                    next.owner,
                    (next.opened - request.closed) / 1_000
                );
                self.wrong(text);
            }
        }
        let mut tokens: Vec<i64> = requests.iter().map(|request| request.token).collect();
        tokens.sort_unstable();
        if tokens.windows(2).any(|pair| pair[0] == pair[1]) {
            self.wrong(format!("{event} was sent twice under one token"));
        }
    }

    /// No lease is taken before it ran out; none runs out under a healthy holder; what a killed worker held is taken in
    /// time (S1, S2, L2).
    async fn takeovers(&mut self, connection: &mut PgConnection) {
        let rows = sqlx::query(
            "select event, old_owner, (extract(epoch from old_until) * 1000000)::bigint,
                 (extract(epoch from at) * 1000000)::bigint, destination
             from chaos.history where owner <> old_owner",
        )
        .fetch_all(&mut *connection)
        .await
        .expect("the history");
        self.verdict.takeovers = rows.len();
        let grace = micros(GRACE);
        let search = micros(POLL).max(grace / 2);
        let rooms = Rooms::of(connection, search).await;
        for row in rows {
            let (event, owner, until, at, destination): (String, String, i64, i64, String) =
                (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
            let owner = owner.rsplit_once('-').map_or("", |(name, _)| name);
            if at < until + grace {
                self.wrong(format!(
                    "{event} was taken from {owner} {} us before its lease ran out",
                    until + grace - at
                ));
            }
            let held_since = until - micros(LEASE) - SETTLES_WITHIN;
            if !self.disturbed(Some(owner), held_since, until, |one| one.fault.touches_leases()) {
                self.wrong(format!("the lease of {event} ran out although {owner} was healthy"));
            }
            // A database that is away, and the embargo after that, hold up every worker.
            let held_up = self.disturbances.iter().filter(|one| {
                one.worker.is_none()
                    && one.fault.touches_leases()
                    && one.begin <= at
                    && one.end >= until - LEASE_MICROS
            });
            let free =
                held_up.map(|one| one.end + RESUMES_WITHIN + LEASE_MICROS).fold(until + grace, i64::max);
            // Only who has room for the destination takes any of it.
            let late = rooms.longest(&destination, free, at);
            self.verdict.latest_takeover = self.verdict.latest_takeover.max(late);
            self.verdict.crowded_takeovers += usize::from(at - free > late + micros(POLL));
            if late > search + 1_000_000 + self.stalls.between(free, at) {
                self.wrong(format!("{event} of {owner} was taken {} ms late", late / 1_000));
            }
        }
    }

    /// Work goes on when the database is back.
    async fn resumes(&mut self, produced: i64, connection: &mut PgConnection) {
        let outages: Vec<Disturbance> = self
            .disturbances
            .iter()
            .filter(|one| one.worker.is_none() && one.fault.is_outage() && one.end < produced)
            .cloned()
            .collect();
        for (number, outage) in outages.iter().enumerate() {
            // The next one may come before work could go on.
            let next = outages.get(number + 1).map_or(i64::MAX, |next| next.begin);
            let first: Option<i64> = sqlx::query_scalar(
                "select (extract(epoch from min(at)) * 1000000)::bigint from chaos.history
                 where at > to_timestamp($1::float8 / 1000000)",
            )
            .bind(outage.end as f64)
            .fetch_one(&mut *connection)
            .await
            .expect("the history");
            let after = first.unwrap_or(i64::MAX).min(next) - outage.end;
            self.verdict.latest_resume = self.verdict.latest_resume.max(after);
            if after > RESUMES_WITHIN + self.stalls.between(outage.end, outage.end + 1_000_000) {
                self.wrong(format!("work went on only {} ms after {:?}", after / 1_000, outage.fault));
            }
        }
    }
}
