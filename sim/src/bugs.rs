//! Planted bugs: mistakes that the simulator must find, each by the invariant that it breaks.

use sim_oracle::Invariant;

macro_rules! bugs {
    ($($(#[$doc:meta])* $bug:ident, $place:literal, $invariant:ident, $budget:literal, $text:literal;)*) => {
        /// A mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Bug { $(#[doc = $text] $bug,)* }

        impl Bug {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$bug,)*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$bug => stringify!($bug),)* }
            }

            /// Where the mistake is: machine, store or driver.
            pub const fn place(self) -> &'static str {
                match self { $(Self::$bug => $place,)* }
            }

            /// What is wrong.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$bug => $text,)* }
            }

            /// The invariant that finds it.
            pub const fn invariant(self) -> Invariant {
                match self { $(Self::$bug => Invariant::$invariant,)* }
            }

            /// Within how many seeds.
            pub const fn budget(self) -> u64 {
                match self { $(Self::$bug => $budget,)* }
            }
        }
    };
}

bugs! {
    GraceIgnored, "store", S1, 200, "the claim takes leases as soon as they run out, without the grace";
    ReclaimEarly, "store", S1, 200, "the claim takes leases that have a tenth of L to run";
    ClaimLateClock, "store", S6, 5000, "the claim compares next_attempt_at with the late clock";
    LeaseFromEarlyClock, "store", S1, 200, "the claim grants from the statement's start";
    LeaseHalved, "store", S1, 200, "the claim grants half of L";
    RenewFromEarlyClock, "store", S1, 5000, "the renewal extends from the statement's start";
    RenewHalved, "store", S1, 200, "the renewal extends by half of L";
    RenewIgnoresToken, "store", S5, 5000, "the renewal's guard does not look at the token";
    RenewIgnoresOwner, "store", S5, 5000, "the renewal's guard does not look at the owner";
    SettleUnguarded, "store", S5, 1000, "the settle has no guard";
    SettleIgnoresToken, "store", S5, 5000, "the settle's guard does not look at the token";
    SettleRefusesExpired, "store", S5, 5000, "a settle after the lease's end is refused";
    SettleTerminalAgain, "store", S7, 5000, "a repeated settle is applied a second time";
    TokenKept, "store", S5, 200, "the claim does not raise the token";
    AttemptsKept, "store", S6, 200, "a settled try spends no attempt";
    ReleaseSpends, "store", S6, 1000, "a release spends an attempt";
    RetryDueNow, "store", S6, 200, "a retry is due at once";
    ClaimIgnoresDue, "store", S6, 200, "the claim does not look at next_attempt_at";
    ClaimIgnoresSpent, "store", S6, 5000, "the claim does not look at attempts";
    DoubleClaim, "store", S1, 1000, "the claim does not lock what it takes";
    ClaimTerminal, "store", S7, 1000, "the claim does not look at the status";
    NeverReclaim, "store", L1, 200, "expired leases are never taken";
    LostRow, "store", S8, 1000, "a settle that fails an event deletes its row";
    ClaimIgnoresShare, "store", S9, 1000, "the claim does not look at shares";
    DeadlineFromReply, "driver", S3, 5000, "a start is allowed until the deadline instead of the fence";
    StartUnchecked, "driver", S3, 5000, "a start is not compared with its fence";
    AbortLost, "driver", S3, 5000, "an abort is confirmed and the socket left open";
    ReplyTwice, "driver", L1, 5000, "a store call that timed out is never reported";
    SendTwice, "driver", S6, 200, "a failed request is sent again by the gateway itself";
    AcceptedIsSuccess, "driver", S7, 1000, "a connection reset counts as 200";
}
