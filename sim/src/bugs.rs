//! Planted bugs: mistakes that the simulator must find, each by the invariant that it breaks.

use leasehold::machine::Planted;
use sim_oracle::Invariant;

/// Where a mistake is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the worker machine.
    Machine(Planted),
    /// In the simulated SQL, row machine included.
    Store,
    /// In the driver or the gateway.
    Driver,
}

macro_rules! bugs {
    ($($bug:ident, $place:expr, $invariant:ident, $budget:literal, $text:literal;)*) => {
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

            /// Where the mistake is.
            pub const fn place(self) -> Place {
                match self { $(Self::$bug => $place,)* }
            }

            /// The mistake that is this one of the worker machine.
            pub fn of_machine(planted: Planted) -> Option<Self> {
                Self::ALL.iter().copied().find(|bug| bug.place() == Place::Machine(planted))
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
    GraceIgnored, Place::Store, S1, 200, "the claim takes leases as soon as they run out, without the grace";
    ReclaimEarly, Place::Store, S1, 200, "the claim takes leases that have a tenth of L to run";
    ClaimLateClock, Place::Store, S6, 5000, "the claim compares next_attempt_at with the late clock";
    LeaseFromEarlyClock, Place::Store, S1, 200, "the claim grants from the statement's start";
    LeaseHalved, Place::Store, S1, 200, "the claim grants half of L";
    RenewFromEarlyClock, Place::Store, S1, 5000, "the renewal extends from the statement's start";
    RenewHalved, Place::Store, S1, 200, "the renewal extends by half of L";
    RenewIgnoresToken, Place::Store, S5, 5000, "the renewal's guard does not look at the token";
    RenewIgnoresOwner, Place::Store, S5, 5000, "the renewal's guard does not look at the owner";
    SettleUnguarded, Place::Store, S5, 1000, "the settle has no guard";
    SettleIgnoresToken, Place::Store, S5, 5000, "the settle's guard does not look at the token";
    SettleRefusesExpired, Place::Store, S5, 5000, "a settle after the lease's end is refused";
    RenewedIsRefused, Place::Store, S5, 5000, "a settle refuses what was renewed since its snapshot";
    SettleTerminalAgain, Place::Store, S7, 5000, "a repeated settle is applied a second time";
    TokenKept, Place::Store, S5, 200, "the claim does not raise the token";
    TokenSinks, Place::Store, S5, 200, "the token of an event that nobody holds is new, and lower than the one before";
    AttemptsKept, Place::Store, S6, 200, "a settled try spends no attempt";
    ReleaseSpends, Place::Store, S6, 1000, "a release spends an attempt";
    RetryDueNow, Place::Store, S6, 200, "a retry is due at once";
    ClaimIgnoresDue, Place::Store, S6, 200, "the claim does not look at next_attempt_at";
    ClaimIgnoresSpent, Place::Store, S6, 5000, "the claim does not look at attempts";
    DoubleClaim, Place::Store, S1, 1000, "the claim does not lock what it takes";
    ClaimTerminal, Place::Store, S7, 1000, "the claim does not look at the status";
    NeverReclaim, Place::Store, L1, 200, "expired leases are never taken";
    RetiredFailed, Place::Store, S8, 200, "retention deletes failed events that nobody asked it to";
    LostRow, Place::Store, S8, 1000, "a settle that fails an event deletes its row";
    UpIgnored, Place::Store, S2, 1000, "the claim does not look at how long the server has been up";
    FrontPastLocked, Place::Store, L3, 2000, "a claim's front passes over what others have locked";
    ClaimIgnoresShare, Place::Store, S9, 1000, "the claim does not look at shares";
    FenceKept, Place::Driver, S2, 5000, "a start is compared with the fence as it was before connecting";
    StartUnchecked, Place::Driver, S3, 5000, "a start is not compared with its fence";
    AbortLost, Place::Driver, S3, 5000, "an abort is confirmed and the socket left open";
    TimeoutUnreported, Place::Driver, L1, 2000, "a store call that timed out is never reported";
    SendTwice, Place::Driver, S6, 200, "a failed request is sent again by the gateway itself";
    AcceptedIsSuccess, Place::Driver, S7, 1000, "a connection reset counts as 200";
    HeartbeatOnce, Place::Machine(Planted::HeartbeatOnce), S2, 2000, "a lease is renewed once and never again";
    HeartbeatLate, Place::Machine(Planted::HeartbeatLate), S2, 2000, "a lease is renewed when it is L old";
    HeartbeatForgottenOnFailure, Place::Machine(Planted::HeartbeatForgottenOnFailure), S3, 500, "what a failed renewal was about is neither renewed again nor fenced";
    QueueNotRenewed, Place::Machine(Planted::QueueNotRenewed), S2, 2000, "leases that wait in the queue are not renewed";
    OutcomeNotRenewed, Place::Machine(Planted::OutcomeNotRenewed), S2, 5000, "leases with an outcome are not renewed";
    AloneNever, Place::Machine(Planted::AloneNever), S2, 5000, "a row that was skipped is not renewed any more";
    TwoRenewals, Place::Machine(Planted::TwoRenewals), S9, 2000, "a second renewal is sent while one is under way";
    DeadlineFromReply, Place::Machine(Planted::DeadlineFromReply), S3, 5000, "the deadline counts from the renewal's reply";
    FenceNever, Place::Machine(Planted::FenceNever), S3, 2000, "fences are not checked";
    FenceWithoutMargin, Place::Machine(Planted::FenceWithoutMargin), S3, 2000, "the fence is the deadline, without the margin";
    FenceReleasesAtOnce, Place::Machine(Planted::FenceReleasesAtOnce), S6, 2000, "a lease is given back before its abort is confirmed";
    ClockAheadIgnored, Place::Machine(Planted::ClockAheadIgnored), S3, 5000, "a database's clock that ran ahead fences nothing";
    AbortSpends, Place::Machine(Planted::AbortSpends), S6, 1000, "a request that a fence broke off counts as a failed try";
    SettleOnce, Place::Machine(Planted::SettleOnce), S9, 2000, "an outcome whose settle failed is dropped";
    SettlesWhole, Place::Machine(Planted::SettlesWhole), L1, 5000, "a settle that the store can't answer in time is repeated as it was";
    SettleDelayRestarts, Place::Machine(Planted::SettleDelayRestarts), S6, 500, "the delay that is sent is too long by H";
    UnknownClaimForgotten, Place::Machine(Planted::UnknownClaimForgotten), S2, 2000, "after an unknown claim nothing is looked for";
    LateLookAtLease, Place::Machine(Planted::LateLookAtLease), S2, 5000, "after an unknown claim the looks are at once, after R and after L";
    LooksReplaced, Place::Machine(Planted::LooksReplaced), S2, 5000, "the looks for an unknown claim replace those for an earlier one";
    ClaimsUnsure, Place::Machine(Planted::ClaimsUnsure), S9, 5000, "a worker claims before it knows what an unknown claim left";
    ClaimsUnsettled, Place::Machine(Planted::ClaimsUnsettled), S9, 2000, "a worker claims though it can't settle";
    LateLocksForgotten, Place::Machine(Planted::LateLocksForgotten), S2, 5000, "after an unknown claim there is no look for one that has its locks as late as it is valid";
    LateClaimForgotten, Place::Machine(Planted::LateClaimForgotten), S2, 5000, "after an unknown claim there are two looks, soon";
    ClaimStopsAfterFailure, Place::Machine(Planted::ClaimStopsAfterFailure), L1, 2000, "a failed claim is the last one";
    ClaimsWhole, Place::Machine(Planted::ClaimsWhole), L1, 5000, "a claim that the store can't answer in time is repeated as it was";
    SearchNever, Place::Machine(Planted::SearchNever), L1, 2000, "no worker ever searches for expired leases";
    SearchSeldom, Place::Machine(Planted::SearchSeldom), L2, 5000, "expired leases are searched for every 4 L";
    PollSeldom, Place::Machine(Planted::PollSeldom), L3, 500, "the outbox is polled every 40 intervals";
    FrontKept, Place::Machine(Planted::FrontKept), L1, 2000, "no claim starts at the beginning of the queue again";
    ClaimsValidForEver, Place::Machine(Planted::ClaimsValidForEver), S2, 5000, "a claim that begins long after its client gave up takes events";
    LeasesFrontKept, Place::Machine(Planted::LeasesFrontKept), L1, 5000, "no search starts at the first of the leases again";
    FrontAtNow, Place::Machine(Planted::FrontAtNow), L3, 2000, "claims pass over what commits shortly after it fell due";
    RescanSeldom, Place::Machine(Planted::RescanSeldom), L3, 5000, "a scan from the beginning keeps the next one away for 400 times as long";
    RescanNear, Place::Machine(Planted::RescanNear), L1, 5000, "once a scan took long, none starts more than a minute ahead of the front";
    EmbargoAlways, Place::Machine(Planted::EmbargoAlways), L2, 5000, "an embargo lasts 12 L and is begun again at every failure";
    EmbargoNever, Place::Machine(Planted::EmbargoNever), S2, 5000, "a new incarnation begins no embargo";
    EmbargoOnce, Place::Machine(Planted::EmbargoOnce), S2, 5000, "a second outage or incarnation begins no embargo";
    OutageForgotten, Place::Machine(Planted::OutageForgotten), S2, 5000, "an outage changes nothing for searches";
    LeasesUnlimited, Place::Machine(Planted::LeasesUnlimited), S9, 500, "a worker asks for more leases than it may hold";
    RequestsUnlimited, Place::Machine(Planted::RequestsUnlimited), S9, 500, "a worker opens more requests than it may";
    DestinationUnlimited, Place::Machine(Planted::DestinationUnlimited), S9, 500, "a worker opens more requests to a destination than it may";
    BehindIgnored, Place::Machine(Planted::BehindIgnored), S4, 5000, "a new lease of an event starts while the old one's request is open";
    OversizedSent, Place::Machine(Planted::OversizedSent), S9, 1000, "what is larger than allowed is sent";
    UntilEmptyEarly, Place::Machine(Planted::UntilEmptyEarly), L1, 1000, "a worker that is to end when nothing is pending ends when nothing is due";
    DrainWaits, Place::Machine(Planted::DrainWaits), L4, 5000, "a drain waits until everything is settled";
    DrainAbortsAtOnce, Place::Machine(Planted::DrainAbortsAtOnce), S2, 5000, "a drain breaks off what is open at once";
    DrainStopsRenewing, Place::Machine(Planted::DrainStopsRenewing), S2, 5000, "a worker that drains renews nothing";
    DrainKeepsQueue, Place::Machine(Planted::DrainKeepsQueue), L4, 1000, "a drain does not give back what was not started";
    DrainReleasesDue, Place::Machine(Planted::DrainReleasesDue), S6, 1000, "what a drain broke off is due at once";
    RetryBeyondLimit, Place::Machine(Planted::RetryBeyondLimit), S6, 500, "the attempt limit is not looked at";
    FailBeforeLimit, Place::Machine(Planted::FailBeforeLimit), S6, 500, "an event fails one try early";
    RetryAfterIgnored, Place::Machine(Planted::RetryAfterIgnored), S6, 2000, "Retry-After is ignored";
    RetryAfterUncapped, Place::Machine(Planted::RetryAfterUncapped), S6, 2000, "Retry-After is not capped";
    BackoffStuck, Place::Machine(Planted::BackoffStuck), S6, 2000, "the backoff does not grow after the second try";
    BackoffOffByOne, Place::Machine(Planted::BackoffOffByOne), S6, 500, "the backoff is one doubling ahead";
    DelayFromClaim, Place::Machine(Planted::DelayFromClaim), S6, 500, "the backoff counts from the claim";
    RedirectIsSuccess, Place::Machine(Planted::RedirectIsSuccess), S7, 2000, "3xx counts as delivered";
    UndeliverableRetried, Place::Machine(Planted::UndeliverableRetried), S6, 2000, "what can never be sent is retried";
    ProbationTogether, Place::Machine(Planted::ProbationTogether), S9, 2000, "a worker takes several events on probation at a time";
}
