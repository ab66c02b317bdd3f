//! One rule each, told as a story.

use std::time::Duration;

use leasehold::machine::{
    Action, Answer, AttemptResult, ClaimAnswer, ClaimFailure, ClaimReply, ClaimRequest, ClaimTerms, DbTime,
    EmbargoCause, HeartbeatEnd, Incarnation, Input, LeaseKey, Limits, Observation, Place, RawTiming,
    RenewReply, RequestId, RetryAfter, RetryPolicy, RowId, SettleKind, SettleReply, Status, StoreFault,
    Timing, Token, WorkerId, WorkerSettings,
};

use crate::bed::{Bed, MS, SECOND, aborts, limits, retry, settings, timing};

mod claims;
mod drain;
mod fences;
mod fronts;
mod inputs;
mod reclaims;
mod renewals;
mod settles;
mod unknown;

fn unknown() -> StoreFault {
    StoreFault::Unknown { error: "timed out".into() }
}

/// A bed with one event whose request is open.
fn one_open() -> (Bed, LeaseKey) {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.run(MS);
    let key = bed.opened()[0];
    (bed, key)
}

/// The next claim's request, the ones before it answered.
fn next_claim(bed: &mut Bed) -> RequestId {
    loop {
        bed.now = bed.now.max(bed.worker.next_wakeup().expect("it polls"));
        let claim = bed.wake().into_iter().find(|action| matches!(action, Action::Claim(..)));
        if let Some(claim) = claim {
            bed.pending.clear();
            return Bed::request_of(&claim);
        }
        bed.answer_all();
    }
}

/// The reply to a claim that took nothing.
fn empty(db_now: DbTime, next_due_in: Option<Duration>) -> ClaimReply {
    ClaimReply {
        db_now,
        incarnation: Incarnation::new("1"),
        searched_expired: false,
        grants: Vec::new(),
        failed: Vec::new(),
        front: None,
        leases_front: None,
        next_due_in,
        any_pending: None,
    }
}

/// Of a claim that takes whatever is due or has run out.
const TERMS: ClaimTerms = ClaimTerms {
    lease: SECOND,
    grace: Duration::ZERO,
    expired: true,
    reclaim_limit: 0,
    retry_budget: 0,
    valid_until: None,
};

/// The claims that are sent within `duration`, and when.
fn claims_within(bed: &mut Bed, duration: Duration) -> Vec<(Duration, ClaimRequest)> {
    let (start, until) = (bed.now, bed.now.after(duration));
    let mut claims = Vec::new();
    while let Some(at) = bed.worker.next_wakeup().filter(|at| *at < until) {
        bed.now = bed.now.max(at);
        let mut actions = bed.wake();
        actions.extend(bed.answer_all());
        for action in actions {
            if let Action::Claim(_, claim) = action {
                claims.push((bed.now.since(start), claim));
            }
        }
    }
    claims
}
