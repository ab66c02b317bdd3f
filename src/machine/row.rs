//! The row machine: one event under claim, renew and settle. It is the specification of the SQL, the store of the
//! simulator, and what the differential tests hold the databases against.
//!
//! ```text
//!              claim                     settle delivered
//!   pending ----------> pending, leased ------------------> delivered
//!   unleased <--------- (token rises)   ------------------> failed
//!            settle retry, release        settle failed
//! ```
//! A claim of an expired lease (a *reclaim*) goes from leased to leased under a higher token. A claim that finds the
//! attempts or the reclaims spent, or a number at its bound, fails the event. Not its job: row locks, batches and clocks
//! (they are the store's).

use alloc::string::String;
use core::time::Duration;

use super::id::{Token, WorkerId};
use super::time::{DbClock, DbTime};

/// From this many run-outs on an event is on probation (rule P11).
pub const PROBATION_RECLAIMS: u32 = 3;

/// The most that the column `reclaims` takes.
const RECLAIMS_BOUND: u32 = 1_000_000_000;

/// Delivery status, as in the column `delivery_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Not yet terminal; leased or not.
    Pending,
    /// A destination answered 2xx. Terminal.
    Delivered,
    /// Given up. Terminal.
    Failed,
}

/// The lease columns of a row. Owner and until are both set or both null.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// `lease_owner`.
    pub owner: WorkerId,
    /// `lease_until`, by the database's clock.
    pub until: DbTime,
}

/// One outbox row, without what no transition reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// `delivery_status`.
    pub status: Status,
    /// `attempts`: settled tries.
    pub attempts: u32,
    /// `max_attempts`, at least 1.
    pub max_attempts: u32,
    /// `next_attempt_at`.
    pub next_attempt_at: DbTime,
    /// `lease_owner` and `lease_until`; only ever set while pending.
    pub lease: Option<Lease>,
    /// `lease_token`.
    pub token: Token,
    /// `reclaims`: run-outs since the last settled try.
    pub reclaims: u32,
    /// `last_error`.
    pub last_error: Option<String>,
    /// `last_status`.
    pub last_status: Option<u16>,
    /// `delivered_at`.
    pub delivered_at: Option<DbTime>,
}

/// What a claim needs to know besides its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimTerms {
    /// `L`.
    pub lease: Duration,
    /// `G`.
    pub grace: Duration,
    /// Whether expired leases may be taken (rule P10).
    pub expired: bool,
    /// `RECLAIM_LIMIT`; 0 is off.
    pub reclaim_limit: u32,
    /// `RETRY_BUDGET`; 0 is off.
    pub retry_budget: u32,
    /// A claim that begins or has its locks later than this takes nothing: nobody waits for it any more (rule P7). `None`
    /// is never.
    pub valid_until: Option<DbTime>,
}

impl ClaimTerms {
    /// Whether a claim may take anything at that time.
    pub fn valid(&self, now: DbTime) -> bool {
        self.valid_until.is_none_or(|until| now <= until)
    }
}

/// What a claim did to one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ClaimAnswer {
    /// Not eligible; nothing changed.
    NotEligible,
    /// Leased to the claimer under this token.
    Granted {
        /// The new token.
        token: Token,
        /// Whether the previous lease ran out unsettled.
        reclaimed: bool,
    },
    /// The event's attempts or reclaims are spent, or a number is at its bound: failed by the claim, without a request.
    Failed(ClaimFailure),
}

/// Why a claim failed an event (rules P1, P9 and P11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClaimFailure {
    /// `attempts` has reached the limit.
    AttemptsSpent,
    /// Its leases ran out more often than `RECLAIM_LIMIT`: it keeps killing workers.
    ReclaimsSpent,
    /// `lease_token` or `reclaims` would pass what the table takes, and with it the claim of all others fail.
    AtBound,
}

impl ClaimFailure {
    /// The text for `last_error`, the same from every store.
    pub const fn last_error(self) -> &'static str {
        match self {
            Self::AttemptsSpent => "attempts spent: the attempt limit was reached before this claim",
            Self::ReclaimsSpent => {
                "reclaim limit: the lease ran out unsettled too often, so this event may be killing workers"
            }
            Self::AtBound => "lease_token or reclaims is at its bound: nothing can claim it",
        }
    }
}

/// The answer to a renew or settle of one lease (rule P2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// The guard matched and the change was made.
    Applied,
    /// Token equal, no owner: an earlier try of the same settle landed.
    Ended,
    /// Another owner or token was seen: the lease is lost.
    Refused,
    /// The row was locked by somebody: unknown, ask again.
    Skipped,
}

/// With what a lease is settled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Settle {
    /// A destination answered 2xx.
    Delivered {
        /// The status.
        status: u16,
    },
    /// The try failed; the next one is due after `delay`.
    Retry {
        /// From the settle's late clock on.
        delay: Duration,
        /// For `last_error`, cleaned.
        error: String,
        /// For `last_status`, if there was a response.
        status: Option<u16>,
    },
    /// Given up.
    Failed {
        /// For `last_error`, cleaned.
        error: String,
        /// For `last_status`, if there was a response.
        status: Option<u16>,
        /// Whether this was a try, which spends an attempt (rule P9).
        tried: bool,
    },
    /// Given back untried: spends no attempt and keeps `reclaims`.
    Release {
        /// When set, `next_attempt_at` becomes the late clock plus this; otherwise it stays.
        delay: Option<Duration>,
    },
}

impl Row {
    /// A fresh event as a producer's `INSERT` makes it.
    pub fn new(max_attempts: u32, next_attempt_at: DbTime) -> Self {
        Self {
            status: Status::Pending,
            attempts: 0,
            max_attempts,
            next_attempt_at,
            lease: None,
            token: Token::default(),
            reclaims: 0,
            last_error: None,
            last_status: None,
            delivered_at: None,
        }
    }

    /// The attempt limit: `min(max_attempts, budget + 1)`, budget 0 = off.
    pub fn attempt_limit(max_attempts: u32, retry_budget: u32) -> u32 {
        if retry_budget == 0 { max_attempts } else { max_attempts.min(retry_budget.saturating_add(1)) }
    }

    /// Whether a claim under these terms would take the row at `early` (rule P1).
    pub fn eligible(&self, early: DbTime, terms: &ClaimTerms) -> bool {
        self.status == Status::Pending
            && self.next_attempt_at <= early
            && self
                .lease
                .as_ref()
                .is_none_or(|lease| terms.expired && lease.until.after(terms.grace) <= early)
    }

    /// Whether the event would be on probation under its next lease (rule P11).
    pub fn on_probation(&self) -> bool {
        self.reclaims.saturating_add(u32::from(self.lease.is_some())) >= PROBATION_RECLAIMS
    }

    /// **P1** claim, **P11** poison.
    ///
    /// A claim that fails an event raises the token only if it takes the row from an owner: that owner's late settle
    /// must be refused, whereas a repeat of a settle that landed must still be answered *ended*. No lease is granted under
    /// the last token, so that there is one left for that.
    pub fn claim(&mut self, now: DbClock, owner: &WorkerId, terms: &ClaimTerms) -> ClaimAnswer {
        if !terms.valid(now.early.max(now.late)) || !self.eligible(now.early, terms) {
            return ClaimAnswer::NotEligible;
        }
        let reclaimed = self.lease.is_some();
        let next_token = self.token.next().max(Token::of(now.late));
        let reclaims = self.reclaims.saturating_add(u32::from(reclaimed));
        let spent = if self.attempts >= Self::attempt_limit(self.max_attempts, terms.retry_budget) {
            Some(ClaimFailure::AttemptsSpent)
        } else if terms.reclaim_limit > 0 && reclaims > terms.reclaim_limit {
            Some(ClaimFailure::ReclaimsSpent)
        } else if next_token >= Token::BOUND || reclaims > RECLAIMS_BOUND {
            Some(ClaimFailure::AtBound)
        } else {
            None
        };
        self.reclaims = reclaims.min(RECLAIMS_BOUND);
        if let Some(failure) = spent {
            if reclaimed {
                self.token = next_token.min(Token::BOUND);
            }
            self.status = Status::Failed;
            self.lease = None;
            self.last_error = Some(failure.last_error().into());
            return ClaimAnswer::Failed(failure);
        }
        self.token = next_token;
        self.lease = Some(Lease { owner: owner.clone(), until: now.late.after(terms.lease) });
        ClaimAnswer::Granted { token: next_token, reclaimed }
    }

    /// **P2** guard: owner and token must both match.
    fn guard(&self, owner: &WorkerId, token: Token) -> Answer {
        match &self.lease {
            _ if self.token != token => Answer::Refused,
            None => Answer::Ended,
            Some(lease) if lease.owner != *owner => Answer::Refused,
            Some(_) => Answer::Applied,
        }
    }

    /// **P5** renew: `late + L` under the row lock. Expiry alone never refuses. Never shortens a lease.
    pub fn renew(&mut self, now: DbClock, owner: &WorkerId, token: Token, lease: Duration) -> Answer {
        let answer = self.guard(owner, token);
        if answer == Answer::Applied
            && let Some(held) = &mut self.lease
        {
            held.until = held.until.max(now.late.after(lease));
        }
        answer
    }

    /// **P6** settle: clears owner and until, leaves the token. **P9**: a settled try spends one attempt.
    pub fn settle(&mut self, now: DbClock, owner: &WorkerId, token: Token, settle: &Settle) -> Answer {
        let answer = self.guard(owner, token);
        if answer != Answer::Applied {
            return answer;
        }
        self.lease = None;
        match settle {
            Settle::Delivered { status } => {
                self.spend_attempt();
                self.status = Status::Delivered;
                self.delivered_at = Some(now.late);
                self.last_status = Some(*status);
                self.last_error = None;
            }
            Settle::Retry { delay, error, status } => {
                self.spend_attempt();
                self.next_attempt_at = now.late.after(*delay);
                self.last_status = *status;
                self.last_error = Some(error.clone());
            }
            Settle::Failed { error, status, tried } => {
                self.attempts = self.attempts.saturating_add(u32::from(*tried));
                self.reclaims = 0;
                self.status = Status::Failed;
                self.last_status = *status;
                self.last_error = Some(error.clone());
            }
            Settle::Release { delay } => {
                if let Some(delay) = delay {
                    self.next_attempt_at = now.late.after(*delay);
                }
            }
        }
        answer
    }

    fn spend_attempt(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
        self.reclaims = 0;
    }
}
