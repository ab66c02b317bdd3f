//! What the worker machine itself costs: the life of an event, and the heartbeats of many leases.

use std::collections::BTreeSet;
use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;
use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimReply, ClaimRequest, DbTime, DestinationKey, Grant, Incarnation,
    Input, LeaseKey, Limits, Moment, RawTiming, RenewReply, RetryPolicy, RowId, SettleReply, Timing, Token,
    Worker, WorkerId, WorkerSettings,
};

fn main() {
    divan::main();
}

/// A worker and the clock that it is told.
struct Bench {
    worker: Worker,
    now: Moment,
    rows: i64,
    /// Leases whose requests are open.
    open: Vec<LeaseKey>,
}

impl Bench {
    fn new(leases: u32, in_flight: u32) -> Self {
        let raw = RawTiming {
            lease: Duration::from_secs(30),
            heartbeat: None,
            store_timeout: None,
            fence_margin: None,
            reclaim_grace: None,
        };
        let limits = Limits {
            max_in_flight: in_flight,
            max_in_flight_per_destination: 1_000_000,
            max_leased: leases,
            claim_batch: 1_000,
            poll_interval: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(30),
            reclaim_limit: 0,
        };
        let retry = RetryPolicy {
            initial: Duration::from_secs(5),
            max: Duration::from_secs(3_600),
            jitter_bps: 1_000,
            budget: 0,
            retry_after_max: Duration::from_secs(3_600),
            fail_statuses: BTreeSet::new(),
        };
        let timing = Timing::parse(raw).expect("good timings");
        let settings = WorkerSettings::parse(timing, limits, retry, 1).expect("good limits");
        let now = Moment::from_micros(1);
        Self { worker: Worker::new(WorkerId::new("bench"), settings, now), now, rows: 0, open: Vec::new() }
    }

    fn db_now(&self) -> DbTime {
        DbTime::from_micros(i64::try_from(self.now.as_micros()).expect("a short run"))
    }

    fn grants(&mut self, claim: &ClaimRequest) -> ClaimReply {
        let grants = (0..claim.limit).map(|_| {
            self.rows += 1;
            Grant {
                key: LeaseKey { row: RowId(self.rows), token: Token(1) },
                destination: DestinationKey::new(
                    ["https://a", "https://b", "https://c"][self.rows as usize % 3],
                ),
                attempts: 0,
                max_attempts: 20,
                reclaims: 0,
                reclaimed: false,
                unsendable: None,
            }
        });
        ClaimReply {
            grants: grants.collect(),
            db_now: self.db_now(),
            incarnation: Incarnation::new("1"),
            searched_expired: false,
            failed: Vec::new(),
            front: None,
            leases_front: None,
            next_due_in: None,
            any_pending: None,
        }
    }

    /// Takes one input and answers every store call that follows from it.
    fn handle(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            self.worker.handle(self.now, input);
            while self.worker.poll_observation().is_some() {}
            while let Some(action) = self.worker.poll_action() {
                match action {
                    Action::Claim(request, claim) => {
                        let reply = Ok(self.grants(&claim));
                        inputs.push(Input::Claimed { request, reply });
                    }
                    Action::Settle(request, settle) => {
                        let answers = settle.entries.iter().map(|(key, _)| (*key, Answer::Applied)).collect();
                        let reply = Ok(SettleReply { db_now: self.db_now(), answers });
                        inputs.push(Input::Settled { request, reply });
                    }
                    Action::Renew(request, renew) => {
                        let answers = renew.keys.iter().map(|key| (*key, Answer::Applied)).collect();
                        let reply = Ok(RenewReply { db_now: self.db_now(), answers });
                        inputs.push(Input::Renewed { request, reply });
                    }
                    Action::Send { key, .. } => self.open.push(key),
                    Action::Owned(..) | Action::Abort { .. } | Action::Forget { .. } => {}
                }
            }
        }
    }
}

/// Claimed, sent, answered with 204, settled, while 1,000 others are held.
#[divan::bench]
fn life_of_an_event(bencher: Bencher<'_, '_>) {
    let mut bench = Bench::new(1_000, 64);
    bench.handle(Input::Wake);
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        bench.now = bench.now.after(Duration::from_micros(30));
        let key = bench.open.pop().expect("something is open");
        let result = AttemptResult::Responded { status: 204, retry_after: None };
        bench.handle(Input::Attempted { key, result });
    });
}

/// One interval's renewals of that many leases whose requests are open.
#[divan::bench(args = [1_000, 10_000, 100_000])]
fn heartbeats(bencher: Bencher<'_, '_>, leases: u32) {
    let mut bench = Bench::new(leases, leases);
    bench.handle(Input::Wake);
    bencher.counter(ItemsCount::new(leases)).bench_local(|| {
        bench.now = bench.now.after(Duration::from_millis(7_600));
        bench.handle(Input::Wake);
    });
}
