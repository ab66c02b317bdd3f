//! Observations as metrics, in the words of the log. No label is anything of an event or a destination.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::{end_word, settle_word};
use crate::adapters::store::Status;
use crate::machine::{
    ClaimFailure, EmbargoCause, HeartbeatEnd, Observation, SettleKind, StoreCall, StoreFault, Worker,
    WorkerId,
};
use crate::ports::{Events, Observer};

type Label = (&'static str, &'static str);
type Counters = Family<[Label; 1], Counter>;

/// What one worker has done since it started, and how it is. Clones are of the same worker.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    reclaimed: Counter,
    failed_by_claim: Counters,
    settled: Counters,
    settles_refused: Counters,
    settles_abandoned: Counter,
    heartbeats_ended: Counters,
    fenced: Counter,
    probation: Counter,
    orphans: Counter,
    embargoes: Counters,
    store_failures: Family<[Label; 2], Counter>,
    leases: Gauge,
    requests: Gauge,
    store_fails: Gauge,
    claims_work: Gauge,
    draining: Gauge,
    events: Family<[Label; 1], Gauge>,
    oldest_due_age: Family<[Label; 0], Gauge<f64, AtomicU64>>,
}

impl Metrics {
    /// Named for a scrape.
    pub fn registry(&self, worker: &WorkerId) -> Registry {
        self.begin_at_zero();
        let mut registry = Registry::with_prefix("leasehold");
        let worker =
            [("version", env!("CARGO_PKG_VERSION").to_owned()), ("worker", worker.as_str().to_owned())];
        registry.register("worker", "This worker", Info::new(worker));

        let help = "Events taken after a lease ran out, counted once all of a claim are settled or lost";
        registry.register("events_reclaimed", help, self.reclaimed.clone());
        let help = "Events that a claim failed without a request, by what is spent";
        registry.register("events_failed_by_claim", help, self.failed_by_claim.clone());
        let help = "Times an event was taken that may be killing workers";
        registry.register("probations", help, self.probation.clone());
        registry.register("settles", "Outcomes settled", self.settled.clone());
        let help = "Settles refused since the lease was lost; what was delivered goes out again";
        registry.register("settles_refused", help, self.settles_refused.clone());
        let help = "Outcomes that the database refuses for good";
        registry.register("settles_abandoned", help, self.settles_abandoned.clone());
        registry.register(
            "heartbeats_ended",
            "Leases whose heartbeat ended, by why",
            self.heartbeats_ended.clone(),
        );
        registry.register("leases_fenced", "Leases that could not be renewed in time", self.fenced.clone());
        let help = "Leases released that a claim without an answer had taken";
        registry.register("orphans_released", help, self.orphans.clone());
        let help = "Times for which expired leases were left alone, by why";
        registry.register("embargoes", help, self.embargoes.clone());
        let help = "Calls of the database that brought no reply, by call and fault";
        registry.register("store_failures", help, self.store_failures.clone());

        registry.register("leases_held", "Leases held", self.leases.clone());
        registry.register("requests_open", "Requests open", self.requests.clone());
        let help = "Whether calls of the database fail";
        registry.register("store_failing", help, self.store_fails.clone());
        let help = "Whether the last claim was answered, and what it left is known";
        registry.register("claims_answered", help, self.claims_work.clone());
        registry.register("draining", "Whether the worker was told to end", self.draining.clone());
        registry.register(
            "outbox_events",
            "Events in the outbox when it was last counted",
            self.events.clone(),
        );
        let help = "Age of the oldest event that is due and not leased, when the outbox was last counted";
        registry.register_with_unit(
            "outbox_oldest_due_age",
            help,
            Unit::Seconds,
            self.oldest_due_age.clone(),
        );
        registry
    }

    /// A rate needs a sample before the first of anything.
    fn begin_at_zero(&self) {
        for kind in [SettleKind::Delivered, SettleKind::Retry, SettleKind::Failed, SettleKind::Release] {
            self.settled.get_or_create(&outcome(kind)).inc_by(0);
            self.settles_refused.get_or_create(&outcome(kind)).inc_by(0);
        }
        use HeartbeatEnd::{Abandoned, Drained, Fenced, Lost, Settled};
        for end in [Settled, Lost, Fenced, Drained, Abandoned] {
            self.heartbeats_ended.get_or_create(&why(end)).inc_by(0);
        }
        for spent in [ClaimFailure::AttemptsSpent, ClaimFailure::ReclaimsSpent, ClaimFailure::AtBound] {
            self.failed_by_claim.get_or_create(&what(spent)).inc_by(0);
        }
        for call in [StoreCall::Claim, StoreCall::Renew, StoreCall::Settle, StoreCall::Owned] {
            let error = String::new;
            for fault in [
                StoreFault::Unknown { error: error() },
                StoreFault::NotApplied { error: error() },
                StoreFault::Permanent { error: error() },
            ] {
                self.store_failures.get_or_create(&failed(call, &fault)).inc_by(0);
            }
        }
        for cause in [EmbargoCause::Outage, EmbargoCause::NewIncarnation] {
            self.embargoes.get_or_create(&after(cause)).inc_by(0);
        }
    }

    /// What the last count of the outbox showed: nothing, if it failed.
    pub fn counted(&self, status: Option<&Status>) {
        self.events.clear();
        self.oldest_due_age.clear();
        let Some(status) = status else { return };
        let waiting = status.pending.saturating_sub(status.due + status.leased);
        for (state, events) in [
            ("due", status.due),
            ("leased", status.leased),
            ("waiting", waiting),
            ("delivered", status.delivered),
            ("failed", status.failed),
        ] {
            self.events.get_or_create(&[("state", state)]).set(i64::try_from(events).unwrap_or(i64::MAX));
        }
        self.oldest_due_age.get_or_create(&[]).set(status.oldest_due_age_seconds.unwrap_or(0.0));
    }

    /// Leases held.
    pub fn leases(&self) -> i64 {
        self.leases.get()
    }

    /// Requests open.
    pub fn requests(&self) -> i64 {
        self.requests.get()
    }

    /// Whether calls of the database fail.
    pub fn store_fails(&self) -> bool {
        self.store_fails.get() != 0
    }

    /// Whether the last claim was answered.
    pub fn claims_work(&self) -> bool {
        self.claims_work.get() != 0
    }

    /// Whether the worker was told to end.
    pub fn draining(&self) -> bool {
        self.draining.get() != 0
    }
}

fn outcome(kind: SettleKind) -> [Label; 1] {
    [("outcome", settle_word(kind))]
}

fn why(end: HeartbeatEnd) -> [Label; 1] {
    [("why", end_word(end))]
}

fn what(spent: ClaimFailure) -> [Label; 1] {
    let spent = match spent {
        ClaimFailure::AttemptsSpent => "attempts",
        ClaimFailure::ReclaimsSpent => "reclaims",
        ClaimFailure::AtBound => "bound",
    };
    [("spent", spent)]
}

fn after(cause: EmbargoCause) -> [Label; 1] {
    let cause = match cause {
        EmbargoCause::Outage => "outage",
        EmbargoCause::NewIncarnation => "new_incarnation",
    };
    [("after", cause)]
}

fn failed(call: StoreCall, fault: &StoreFault) -> [Label; 2] {
    let call = match call {
        StoreCall::Claim => "claim",
        StoreCall::Renew => "renew",
        StoreCall::Settle => "settle",
        StoreCall::Owned => "look",
    };
    let fault = match fault {
        StoreFault::Unknown { .. } => "unknown",
        StoreFault::NotApplied { .. } => "not_applied",
        StoreFault::Permanent { .. } => "refused",
    };
    [("call", call), ("fault", fault)]
}

impl Observer for Metrics {
    fn observe(&mut self, observation: &Observation, _: &Events) {
        match observation {
            Observation::Cycle(cycle) => {
                self.reclaimed.inc_by(cycle.reclaimed.into());
            }
            Observation::StoreCallFailed { call, fault, .. } => {
                self.store_failures.get_or_create(&failed(*call, fault)).inc();
            }
            Observation::HeartbeatEnded { why: end, .. } => {
                self.heartbeats_ended.get_or_create(&why(*end)).inc();
            }
            Observation::Fenced { .. } => {
                self.fenced.inc();
            }
            Observation::Settled { kind, .. } => {
                self.settled.get_or_create(&outcome(*kind)).inc();
            }
            Observation::SettleRefused { kind, .. } => {
                self.settles_refused.get_or_create(&outcome(*kind)).inc();
            }
            Observation::SettleAbandoned { .. } => {
                self.settles_abandoned.inc();
            }
            Observation::FailedByClaim { why: spent, .. } => {
                self.failed_by_claim.get_or_create(&what(*spent)).inc();
            }
            Observation::Probation { .. } => {
                self.probation.inc();
            }
            Observation::OrphanReleased { .. } => {
                self.orphans.inc();
            }
            Observation::Embargo(cause) => {
                self.embargoes.get_or_create(&after(*cause)).inc();
            }
            Observation::StoreRecovered { .. }
            | Observation::ClockRanAhead { .. }
            | Observation::DrainBegan { .. }
            | Observation::DrainUnsettled { .. }
            | Observation::Unexpected { .. }
            | Observation::ClockWentBack { .. } => {}
        }
    }

    fn look(&mut self, worker: &Worker) {
        self.leases.set(i64::try_from(worker.leased()).unwrap_or(i64::MAX));
        self.requests.set(worker.open().into());
        self.store_fails.set(worker.store_fails().into());
        self.claims_work.set(worker.claims_work().into());
        self.draining.set(worker.draining().into());
    }
}
