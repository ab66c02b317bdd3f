//! The machine's words as the oracle's, and the other way round.

use std::time::Duration;

use leasehold::machine::{Answer, AttemptResult, DbTime, RetryAfter, Settle};
use sim_oracle::End;

pub(crate) fn plain(answer: Answer) -> sim_oracle::Answer {
    match answer {
        Answer::Applied => sim_oracle::Answer::Applied,
        Answer::Ended => sim_oracle::Answer::Ended,
        Answer::Refused => sim_oracle::Answer::Refused,
        Answer::Skipped => sim_oracle::Answer::Skipped,
    }
}

pub(crate) fn plain_settle(settle: &Settle) -> sim_oracle::Settle {
    let us = |duration: &Duration| duration.as_micros() as u64;
    match settle {
        Settle::Delivered { .. } => sim_oracle::Settle::Delivered,
        Settle::Retry { delay, .. } => sim_oracle::Settle::Retry(us(delay)),
        Settle::Failed { tried, .. } => sim_oracle::Settle::Failed { tried: *tried },
        Settle::Release { delay } => sim_oracle::Settle::Release(delay.as_ref().map(us)),
    }
}

/// What the end of a request tells the machine.
pub(crate) fn attempt_result(end: End) -> AttemptResult {
    let error = String::new();
    match end {
        End::Status(status, asked) => {
            let retry_after = asked.map(|asked| match asked {
                sim_oracle::RetryAfter::Delay(delay) => RetryAfter::Delay(Duration::from_micros(delay)),
                sim_oracle::RetryAfter::Date(date) => RetryAfter::Date(DbTime::from_micros(date)),
            });
            AttemptResult::Responded { status, retry_after }
        }
        End::Error | End::Closed => AttemptResult::Errored { error },
        End::Undeliverable => AttemptResult::Undeliverable { error },
    }
}
