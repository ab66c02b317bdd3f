//! Retry semantics: what the result of an attempt means for the event. Integers only.

use alloc::format;
use alloc::string::String;
use core::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::id::RowId;
use super::io::{AttemptResult, RetryAfter};
use super::row::Row;
use super::settings::RetryPolicy;
use super::time::{DbTime, micros};

/// What the result of an attempt means. Delays count from when the result was known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// 2xx.
    Delivered {
        /// The status.
        status: u16,
    },
    /// Try again after `delay`.
    Retry {
        /// From now on.
        delay: Duration,
        /// For `last_error`.
        error: String,
        /// For `last_status`.
        status: Option<u16>,
    },
    /// Give up.
    Failed {
        /// For `last_error`.
        error: String,
        /// For `last_status`.
        status: Option<u16>,
        /// Whether this was a try (rule P9).
        tried: bool,
    },
}

/// The event and the attempt whose result is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Judged {
    /// Which event: keys the jitter.
    pub row: RowId,
    /// 1-based number of the attempt.
    pub number: u32,
    /// The row's `max_attempts`.
    pub max_attempts: u32,
    /// The database's time as carried forward.
    pub db_now: DbTime,
}

impl RetryPolicy {
    /// Decides what the result of an attempt means.
    pub fn judge(&self, seed: u64, judged: Judged, result: AttemptResult) -> Verdict {
        let (error, status, retry_after) = match result {
            AttemptResult::Responded { status, .. } if (200..300).contains(&status) => {
                return Verdict::Delivered { status };
            }
            AttemptResult::Undeliverable { error } => {
                return Verdict::Failed { error, status: None, tried: false };
            }
            AttemptResult::Responded { status, retry_after } => {
                (format!("destination answered {status}"), Some(status), retry_after)
            }
            AttemptResult::Errored { error } => (error, None, None),
        };
        let spent = judged.number >= Row::attempt_limit(judged.max_attempts, self.budget);
        if spent || status.is_some_and(|status| self.fail_statuses.contains(&status)) {
            return Verdict::Failed { error, status, tried: true };
        }
        let least = match (status, retry_after) {
            (Some(429 | 503), Some(RetryAfter::Delay(delay))) => delay,
            (Some(429 | 503), Some(RetryAfter::Date(date))) => date.since(judged.db_now),
            _ => Duration::ZERO,
        };
        let delay = self.backoff(seed, judged.row, judged.number).max(least.min(self.retry_after_max));
        Verdict::Retry { delay, error, status }
    }

    /// `initial * 2^(number-1)`, at most `max`, times `1 ± jitter`, within `(0, max]`. The same arguments always give
    /// the same delay, so that repeating a decision does not redraw it.
    pub fn backoff(&self, seed: u64, row: RowId, number: u32) -> Duration {
        let factor = 1_u64.checked_shl(number.saturating_sub(1)).unwrap_or(u64::MAX);
        let max = micros(self.max);
        let base = micros(self.initial).saturating_mul(factor).min(max);
        if self.jitter_bps == 0 {
            return Duration::from_micros(base);
        }
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&row.0.to_le_bytes());
        key[16..20].copy_from_slice(&number.to_le_bytes());
        let draw = ChaCha8Rng::from_seed(key).next_u32();
        let bps = u64::from(self.jitter_bps);
        let points = 10_000 - bps + ((u64::from(draw) * (2 * bps + 1)) >> 32);
        let jittered = u128::from(base) * u128::from(points) / 10_000;
        Duration::from_micros(u64::try_from(jittered).unwrap_or(max).clamp(1, max))
    }
}
