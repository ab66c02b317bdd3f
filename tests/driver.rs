//! The driver between fakes of its ports, on tokio's paused clock: what it carries, bounds and refuses to survive.

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use leasehold::driver::{Driver, Panicked};
use leasehold::machine::{
    Answer, AttemptResult, ClaimReply, ClaimRequest, DbTime, DestinationKey, Ended, Grant, HeartbeatEnd,
    Incarnation, LeaseKey, Limits, Moment, Observation, OwnedReply, OwnedRequest, RawTiming, RenewReply,
    RenewRequest, RetryPolicy, RowId, Settle, SettleReply, SettleRequest, StoreFault, Timing, Token,
    WorkerId, WorkerSettings,
};
use leasehold::ports::{Attempt, Claimed, Clock, Events, Gateway, Message, Observer, Outbox};
use tokio::sync::Notify;
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Answers,
    RenewsHang,
    SettlesHang,
}

/// Hands out `events` once, renews everything, remembers settles.
struct FakeOutbox {
    mode: Mode,
    events: Mutex<Vec<i64>>,
    settled: Mutex<BTreeMap<i64, Settle>>,
    renewals: Mutex<u32>,
    start: Instant,
    hint: Notify,
}

impl FakeOutbox {
    fn new(mode: Mode, events: &[i64]) -> Arc<Self> {
        Arc::new(Self {
            mode,
            events: Mutex::new(events.to_vec()),
            settled: Mutex::default(),
            renewals: Mutex::default(),
            start: Instant::now(),
            hint: Notify::new(),
        })
    }

    fn now(&self) -> DbTime {
        DbTime::from_micros(1_700_000_000_000_000).after(self.start.elapsed())
    }
}

impl Outbox for FakeOutbox {
    async fn claim(&self, claim: ClaimRequest) -> Result<Claimed, StoreFault> {
        let rows: Vec<i64> = std::mem::take(&mut self.events.lock().expect("no panic"));
        assert!(rows.len() <= claim.limit as usize);
        let grants = rows.iter().map(|row| Grant {
            key: LeaseKey { row: RowId(*row), token: Token(1) },
            destination: DestinationKey::new("http://a"),
            attempts: 0,
            max_attempts: 20,
            reclaims: 0,
            reclaimed: false,
            unsendable: None,
        });
        let messages = rows.iter().map(|row| {
            Arc::new(Message {
                event_id: format!("evt-{row}"),
                event_type: "t".into(),
                destination_url: "http://a/".into(),
                payload: Bytes::from_static(b"{}"),
            })
        });
        let reply = ClaimReply {
            db_now: self.now(),
            incarnation: Incarnation::new("1"),
            searched_expired: claim.terms.expired,
            grants: grants.collect(),
            failed: vec![],
            front: None,
            leases_front: None,
            next_due_in: None,
            any_pending: Some(self.settled.lock().expect("no panic").is_empty()),
        };
        Ok(Claimed { reply, messages: messages.collect() })
    }

    async fn renew(&self, renew: RenewRequest) -> Result<RenewReply, StoreFault> {
        *self.renewals.lock().expect("no panic") += 1;
        if self.mode == Mode::RenewsHang {
            pending::<()>().await;
        }
        let answers = renew.keys.into_iter().map(|key| (key, Answer::Applied)).collect();
        Ok(RenewReply { db_now: self.now(), answers })
    }

    async fn settle(&self, settle: SettleRequest) -> Result<SettleReply, StoreFault> {
        if self.mode == Mode::SettlesHang {
            pending::<()>().await;
        }
        let mut settled = self.settled.lock().expect("no panic");
        let answers = settle.entries.iter().map(|(key, _)| (*key, Answer::Applied)).collect();
        settled.extend(settle.entries.into_iter().map(|(key, outcome)| (key.row.0, outcome)));
        Ok(SettleReply { db_now: self.now(), answers })
    }

    async fn owned(&self, _: OwnedRequest) -> Result<OwnedReply, StoreFault> {
        Ok(OwnedReply { db_now: self.now(), keys: vec![] })
    }

    async fn hint(&self) {
        self.hint.notified().await;
    }
}

/// Answers 200 after a time; counts requests whose future was dropped before.
struct FakeGateway {
    connects: Duration,
    takes: Duration,
    panics: bool,
    /// Answers at once; `takes` is the rest of its body.
    drips: bool,
    attempts: Mutex<Vec<Attempt>>,
    dropped: Arc<Mutex<u32>>,
}

impl FakeGateway {
    fn new(takes: Duration) -> Arc<Self> {
        Arc::new(Self {
            connects: Duration::ZERO,
            takes,
            panics: false,
            drips: false,
            attempts: Mutex::default(),
            dropped: Arc::default(),
        })
    }
}

struct CountDrop(Option<Arc<Mutex<u32>>>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        if let Some(count) = &self.0 {
            *count.lock().expect("no panic") += 1;
        }
    }
}

impl Gateway for FakeGateway {
    async fn send(
        &self,
        attempt: Attempt,
        may_start: impl Fn() -> bool + Send + Sync,
        known: &OnceLock<AttemptResult>,
    ) -> Option<AttemptResult> {
        assert!(!self.panics, "the gateway breaks");
        tokio::time::sleep(self.connects).await;
        if !may_start() {
            return None;
        }
        self.attempts.lock().expect("no panic").push(attempt);
        let mut guard = CountDrop(Some(Arc::clone(&self.dropped)));
        let answer = AttemptResult::Responded { status: 200, retry_after: None };
        if self.drips {
            known.set(answer.clone()).expect("known once");
        }
        tokio::time::sleep(self.takes).await;
        guard.0 = None;
        Some(answer)
    }
}

struct PausedClock(Instant);

impl Clock for PausedClock {
    fn now(&self) -> Moment {
        Moment::default().after(self.0.elapsed())
    }
}

/// Observations, and the event id that the log could name.
type Log = Vec<(Observation, Option<String>)>;

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Log>>);

impl Observer for Seen {
    fn observe(&mut self, observation: &Observation, events: &Events) {
        let id = match observation {
            Observation::HeartbeatEnded { key, .. } => events.id(*key).map(str::to_owned),
            _ => None,
        };
        self.0.lock().expect("no panic").push((observation.clone(), id));
    }
}

fn settings(until_empty: bool) -> WorkerSettings {
    let raw = RawTiming {
        lease: 30 * SECOND,
        heartbeat: None,
        store_timeout: None,
        fence_margin: None,
        reclaim_grace: None,
    };
    let limits = Limits {
        max_in_flight: 8,
        max_in_flight_per_destination: 8,
        max_leased: 16,
        claim_batch: 16,
        poll_interval: SECOND / 4,
        drain_timeout: 28 * SECOND,
        reclaim_limit: 100,
    };
    let retry = RetryPolicy {
        initial: 5 * SECOND,
        max: 60 * SECOND,
        jitter_bps: 0,
        budget: 0,
        retry_after_max: 60 * SECOND,
        fail_statuses: [].into(),
    };
    let mut settings =
        WorkerSettings::parse(Timing::parse(raw).expect("sound"), limits, retry, 0).expect("sound");
    settings.until_empty = until_empty;
    settings
}

async fn drive(
    outbox: &Arc<FakeOutbox>,
    gateway: &Arc<FakeGateway>,
    until_empty: bool,
    shutdown: impl Future<Output = ()>,
) -> (Result<Ended, Panicked>, Seen) {
    let seen = Seen::default();
    let driver = Driver {
        outbox: Arc::clone(outbox),
        gateway: Arc::clone(gateway),
        clock: Arc::new(PausedClock(Instant::now())),
        observer: seen.clone(),
    };
    (driver.run(WorkerId::new("w"), settings(until_empty), shutdown).await, seen)
}

#[tokio::test(start_paused = true)]
async fn a_slow_delivery_is_renewed_and_settled_once() {
    let (outbox, gateway) = (FakeOutbox::new(Mode::Answers, &[1, 2]), FakeGateway::new(120 * SECOND));
    let (ended, seen) = drive(&outbox, &gateway, true, pending()).await;
    assert_eq!(ended.expect("no panic"), Ended { aborted: 0, unsettled: 0 });
    assert_eq!(gateway.attempts.lock().expect("no panic").len(), 2);
    assert!(*outbox.renewals.lock().expect("no panic") >= 8);
    let settled = outbox.settled.lock().expect("no panic").clone();
    assert_eq!(settled, [1, 2].map(|row| (row, Settle::Delivered { status: 200 })).into());
    let named = seen.0.lock().expect("no panic").iter().any(|(seen, id)| {
        matches!(seen, Observation::HeartbeatEnded { why: HeartbeatEnd::Settled, .. })
            && id.as_deref() == Some("evt-1")
    });
    assert!(named, "the log can name the event when its heartbeat ends");
}

#[tokio::test(start_paused = true)]
async fn a_request_starts_though_connecting_took_longer_than_a_lease() {
    let (outbox, mut gateway) = (FakeOutbox::new(Mode::Answers, &[1]), FakeGateway::new(SECOND));
    Arc::get_mut(&mut gateway).expect("not shared yet").connects = 100 * SECOND;
    let (ended, _) = drive(&outbox, &gateway, true, pending()).await;
    assert_eq!(ended.expect("no panic"), Ended { aborted: 0, unsettled: 0 });
    assert_eq!(outbox.settled.lock().expect("no panic")[&1], Settle::Delivered { status: 200 });
}

#[tokio::test(start_paused = true)]
async fn the_timestamp_is_the_databases_time_carried_forward() {
    let (outbox, gateway) = (FakeOutbox::new(Mode::Answers, &[1]), FakeGateway::new(SECOND));
    drive(&outbox, &gateway, true, pending()).await.0.expect("no panic");
    assert_eq!(gateway.attempts.lock().expect("no panic")[0].timestamp, 1_700_000_000);
}

#[tokio::test(start_paused = true)]
async fn renewals_that_hang_time_out_and_the_request_is_dropped_at_the_fence() {
    let (outbox, gateway) = (FakeOutbox::new(Mode::RenewsHang, &[1]), FakeGateway::new(3_600 * SECOND));
    let start = Instant::now();
    let (ended, seen) = drive(&outbox, &gateway, false, tokio::time::sleep(40 * SECOND)).await;
    ended.expect("no panic");
    assert_eq!(*gateway.dropped.lock().expect("no panic"), 1);
    assert_eq!(outbox.settled.lock().expect("no panic")[&1], Settle::Release { delay: None });
    let seen = seen.0.lock().expect("no panic");
    let failed = |seen: &&(Observation, _)| matches!(seen.0, Observation::StoreCallFailed { .. });
    assert!(seen.iter().filter(failed).count() >= 3, "each hung call was given up after R");
    assert!(seen.iter().any(|(seen, _)| matches!(seen, Observation::Fenced { open: true, .. })));
    assert!(start.elapsed() < 60 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_at_its_timeout_though_settles_hang() {
    let (outbox, gateway) = (FakeOutbox::new(Mode::SettlesHang, &[1]), FakeGateway::new(SECOND));
    let start = Instant::now();
    let (ended, _) = drive(&outbox, &gateway, false, tokio::time::sleep(2 * SECOND)).await;
    assert_eq!(ended.expect("no panic"), Ended { aborted: 0, unsettled: 1 });
    assert!(start.elapsed() >= 30 * SECOND && start.elapsed() < 31 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_drain_aborts_what_does_not_end() {
    let (outbox, gateway) = (FakeOutbox::new(Mode::Answers, &[1]), FakeGateway::new(3_600 * SECOND));
    let (ended, _) = drive(&outbox, &gateway, false, tokio::time::sleep(SECOND)).await;
    assert_eq!(ended.expect("no panic"), Ended { aborted: 1, unsettled: 0 });
    let settled = outbox.settled.lock().expect("no panic")[&1].clone();
    assert_eq!(settled, Settle::Release { delay: Some(3 * SECOND) });
}

#[tokio::test(start_paused = true)]
async fn a_hint_claims_before_the_next_poll() {
    let (outbox, gateway) = (FakeOutbox::new(Mode::Answers, &[]), FakeGateway::new(SECOND));
    let waker = async {
        tokio::time::sleep(SECOND * 11 / 10).await;
        outbox.events.lock().expect("no panic").push(7);
        outbox.hint.notify_one();
        tokio::task::yield_now().await;
        tokio::time::sleep(SECOND / 100).await;
        assert_eq!(gateway.attempts.lock().expect("no panic").len(), 1, "before the poll at 1.25 s");
    };
    drive(&outbox, &gateway, false, waker).await.0.expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_task_ends_the_driver() {
    let outbox = FakeOutbox::new(Mode::Answers, &[1]);
    let mut gateway = FakeGateway::new(SECOND);
    Arc::get_mut(&mut gateway).expect("not shared yet").panics = true;
    let (ended, _) = drive(&outbox, &gateway, true, pending()).await;
    let error = ended.expect_err("it must not live on");
    assert!(error.to_string().contains("panicked"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_abort_while_the_body_is_read_does_not_undo_the_answer() {
    let outbox = FakeOutbox::new(Mode::Answers, &[1]);
    let mut gateway = FakeGateway::new(3_600 * SECOND);
    Arc::get_mut(&mut gateway).expect("not shared yet").drips = true;
    let (ended, _) = drive(&outbox, &gateway, false, tokio::time::sleep(SECOND)).await;
    assert_eq!(ended.expect("no panic"), Ended { aborted: 0, unsettled: 0 });
    assert_eq!(*gateway.dropped.lock().expect("no panic"), 1);
    assert_eq!(outbox.settled.lock().expect("no panic")[&1], Settle::Delivered { status: 200 });
}
