//! The machine's words as the oracle's.

use std::time::Duration;

use leasehold::machine::{Answer, Settle};

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
