//! Mistakes that can be planted into a worker machine, so that the simulator can show that it finds them. Compiled in
//! only with the feature `planted-bugs`, which no production build has.

macro_rules! planted {
    ($($bug:ident,)*) => {
        /// A mistake of the worker machine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs, reason = "the simulator's list says what each one is")]
        pub enum Planted { $($bug,)* }
    };
}

planted! {
    HeartbeatOnce,
    HeartbeatLate,
    HeartbeatForgottenOnFailure,
    QueueNotRenewed,
    OutcomeNotRenewed,
    AloneNever,
    TwoRenewals,
    DeadlineFromReply,
    FenceNever,
    FenceWithoutMargin,
    FenceReleasesAtOnce,
    ClockAheadIgnored,
    AbortSpends,
    SettleOnce,
    SettlesWhole,
    SettleDelayRestarts,
    UnknownClaimForgotten,
    LateClaimForgotten,
    LateLookAtLease,
    LooksReplaced,
    ClaimsUnsure,
    ClaimsUnsettled,
    LateLocksForgotten,
    ClaimStopsAfterFailure,
    ClaimsWhole,
    SearchNever,
    SearchSeldom,
    PollSeldom,
    FrontKept,
    LeasesFrontKept,
    ClaimsValidForEver,
    FrontAtNow,
    RescanSeldom,
    RescanNear,
    EmbargoAlways,
    EmbargoNever,
    EmbargoOnce,
    OutageForgotten,
    LeasesUnlimited,
    RequestsUnlimited,
    DestinationUnlimited,
    BehindIgnored,
    OversizedSent,
    UntilEmptyEarly,
    DrainWaits,
    DrainAbortsAtOnce,
    DrainStopsRenewing,
    DrainKeepsQueue,
    DrainReleasesDue,
    RetryBeyondLimit,
    FailBeforeLimit,
    RetryAfterIgnored,
    RetryAfterUncapped,
    BackoffStuck,
    BackoffOffByOne,
    DelayFromClaim,
    RedirectIsSuccess,
    UndeliverableRetried,
    ProbationTogether,
}
