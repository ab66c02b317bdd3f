//! What the tests of the real binary share: worker processes, and receivers that write down what they see.

pub(crate) mod receiver;
mod worker;

use std::time::Duration;

pub(crate) use self::receiver::{Receiver, Seen};
pub(crate) use self::worker::{Worker, leasehold, start_worker};

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
pub(crate) const MS: Duration = Duration::from_millis(1);
/// Long enough for any machine; reaching it means that something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
