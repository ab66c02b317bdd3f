//! What a run has shown: promises tested, promises excused, and the situations that it visited.

use std::fmt;

use crate::violation::{Excuse, Invariant, named};

named! {
    /// Situations that a search must have visited, or it has not tested them.
    Sometimes {
        /// A settle was refused since somebody else has the event.
        StaleSettleRefused = "a stale settle was refused",
        /// A successful delivery's settle was refused.
        StaleSuccessRefused = "a success was refused by the store",
        /// A renewal was refused.
        StaleRenewRefused = "a stale renewal was refused",
        /// A renewal or settle was answered *ended*.
        SettleRepeated = "a repeated settle found that it had landed",
        /// A row was locked when a renewal came.
        RenewSkipped = "a renewal skipped a locked row",
        /// A row was locked when a settle came.
        SettleSkipped = "a settle skipped a locked row",
        /// A renewal waited for a row alone.
        RenewedAlone = "a row skipped twice was renewed alone",
        /// One event had three owners, one after the other.
        ThreeOwners = "three owners had one event",
        /// An event was reclaimed while the last owner's request was open.
        ReclaimWhileOpen = "an event was reclaimed while a request was open",
        /// Two requests for one event were open.
        Overlap = "two requests for one event were open (excused)",
        /// All leases were fenced.
        ToldAhead = "a worker with open requests saw that the database's clock had run ahead",
        /// A request started past its fence after a stop.
        LateStart = "a stopped worker's request started past the fence (excused)",
        /// A request stayed open past its fence through a stop.
        LateClose = "a stopped worker's request stayed open past the fence (excused)",
        /// A request outlasted the lease it was claimed with.
        OutlastedLease = "a request outlasted the first lease",
        /// A worker was stopped for longer than a lease.
        StopBeyondLease = "a stop beyond the lease",
        /// A worker crashed after an answer and before its settle.
        CrashBeforeSettle = "a crash between answer and settle",
        /// A worker crashed with a request open.
        CrashWhileOpen = "a crash with a request open",
        /// A worker's calls failed for `H` or more and then one had an answer.
        OutageOver = "a worker's outage was over",
        /// A call committed after its client had given it up.
        LateCommit = "a late commit",
        /// A retried call met what its earlier try had committed.
        LateCommitSeen = "a retry saw an earlier try's late commit",
        /// The database's clock was stepped while a lease was live.
        DbStepUnderLease = "a database clock step under a live lease",
        /// An event became `failed` after all its tries.
        FailedAfterAll = "failed after all tries",
        /// A claim found the attempts spent.
        ClaimAttemptsSpent = "a claim failed an event with its attempts spent",
        /// A claim found the run-outs spent.
        ClaimReclaimsSpent = "a claim failed an event that kills workers",
        /// An event was on probation.
        Probation = "an event on probation was claimed",
        /// A drain ended with nothing left.
        DrainClean = "a drain in time",
        /// A drain ended with leases unsettled.
        DrainUnsettled = "a drain that left leases",
        /// A release by guard.
        Released = "a lease was released",
        /// A confirmed claim was lost.
        ClaimLost = "a failover lost a claim",
        /// A confirmed settle was lost.
        SettleLost = "a failover lost a settle",
        /// A duplicate delivery: a second 2xx.
        DeliveredTwice = "a receiver got an event twice",
        /// `Retry-After` was longer than the backoff.
        RetryAfterHonoured = "a Retry-After beyond the backoff",
        /// `Retry-After` was capped.
        RetryAfterCapped = "a Retry-After beyond the cap",
        /// A whole lease was spent waiting in the queue, renewed.
        ExpiredUnderLock = "a lease ran out while its row was locked",
        /// Renewed after it had run out.
        RenewedExpired = "an expired lease was renewed by its holder",
        /// An event that came into the queue long after it was due was taken.
        CameLate = "an event that committed more than a second after it was due was taken",
        /// An orphan whose claim committed late, or was brought back, was taken.
        LeaseBehind = "an expired lease that a search may have passed over was taken",
        /// Settled after it had run out.
        SettledExpired = "an expired lease was settled by its holder",
        /// A worker that ends when nothing is pending did so.
        EndedEmpty = "a worker ended as nothing was pending",
        /// An event that can't be sent was settled.
        Unsendable = "an event that can't be sent was settled",
        /// As many leases were renewed by one statement as it may name.
        FullRenewal = "a statement renewed a thousand leases",
    }
}

named! {
    /// What a row can be when something is asked of it.
    RowState {
        /// Due and unleased.
        Due = "due",
        /// Unleased, its time has not come.
        Waiting = "waiting",
        /// Leased, live.
        Live = "leased",
        /// Leased, run out.
        Expired = "expired",
        /// Delivered.
        Delivered = "delivered",
        /// Failed.
        Failed = "failed",
    }
}

named! {
    /// What is done to a row.
    Change {
        /// Claimed.
        Grant = "granted",
        /// Failed by a claim, attempts.
        FailAttempts = "claim fails it: attempts",
        /// Failed by a claim, reclaims.
        FailReclaims = "claim fails it: reclaims",
        /// A renewal.
        RenewApplied = "renew applied",
        /// A renewal.
        RenewEnded = "renew ended",
        /// A renewal.
        RenewRefused = "renew refused",
        /// A renewal.
        RenewSkipped = "renew skipped",
        /// A settle.
        Delivered = "delivered applied",
        /// A settle.
        Retry = "retry applied",
        /// A settle.
        Failed = "failed applied",
        /// A settle.
        Release = "release applied",
        /// A settle.
        SettleEnded = "settle ended",
        /// A settle.
        SettleRefused = "settle refused",
        /// A settle.
        SettleSkipped = "settle skipped",
        /// A failover.
        Restored = "restored by a failover",
    }
}

const STATES: usize = RowState::ALL.len();
const CHANGES: usize = Change::ALL.len();

/// Whether a change can meet a row in that state at all.
pub fn reachable(state: RowState, change: Change) -> bool {
    use Change as C;
    use RowState as R;
    match change {
        C::Grant | C::FailAttempts => matches!(state, R::Due | R::Expired),
        C::FailReclaims => state == R::Expired,
        C::RenewApplied | C::Delivered | C::Retry | C::Failed | C::Release => {
            matches!(state, R::Live | R::Expired)
        }
        // A row whose settle failed it for good, or a claim, keeps its token as well.
        C::RenewEnded | C::SettleEnded => matches!(state, R::Due | R::Waiting | R::Delivered | R::Failed),
        C::RenewRefused | C::SettleRefused => true,
        C::RenewSkipped | C::SettleSkipped | C::Restored => true,
    }
}

/// Counts of one run, or of many merged.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Leases that ended under the healthy-holder promise.
    pub healthy: u64,
    /// Of these, those that needed at least one renewal.
    pub healthy_renewed: u64,
    /// Leases that ended excused, by excuse; one lease may have several.
    pub excused: [u64; Excuse::ALL.len()],
    /// Reclaims that an excuse explained.
    pub reclaims_excused: u64,
    /// Checks made, by invariant, where they are conditional.
    pub checked: [u64; Invariant::ALL.len()],
    /// Checks that could not be made since their conditions did not hold.
    pub unchecked: [u64; Invariant::ALL.len()],
    /// Situations visited.
    pub sometimes: [u64; Sometimes::ALL.len()],
    /// Row state by change.
    pub matrix: [[u64; CHANGES]; STATES],
    /// Facts observed.
    pub facts: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            healthy: 0,
            healthy_renewed: 0,
            excused: [0; Excuse::ALL.len()],
            reclaims_excused: 0,
            checked: [0; Invariant::ALL.len()],
            unchecked: [0; Invariant::ALL.len()],
            sometimes: [0; Sometimes::ALL.len()],
            matrix: [[0; CHANGES]; STATES],
            facts: 0,
        }
    }
}

impl Stats {
    /// Counts a situation.
    pub(crate) fn saw(&mut self, what: Sometimes) {
        self.sometimes[what as usize] += 1;
    }

    /// Adds another run's counts.
    pub fn merge(&mut self, other: &Self) {
        fn add(into: &mut [u64], from: &[u64]) {
            into.iter_mut().zip(from).for_each(|(into, from)| *into += from);
        }
        self.healthy += other.healthy;
        self.healthy_renewed += other.healthy_renewed;
        self.reclaims_excused += other.reclaims_excused;
        self.facts += other.facts;
        add(&mut self.excused, &other.excused);
        add(&mut self.checked, &other.checked);
        add(&mut self.unchecked, &other.unchecked);
        add(&mut self.sometimes, &other.sometimes);
        self.matrix.iter_mut().zip(&other.matrix).for_each(|(into, from)| add(into, from));
    }

    /// Whether the run tested the promise at all: its faults did not excuse everything.
    pub fn searched(&self) -> bool {
        self.healthy > 0
    }

    /// Situations and matrix cells that were never visited.
    pub fn unvisited(&self) -> Vec<String> {
        let situations = Sometimes::ALL.iter().filter(|what| self.sometimes[**what as usize] == 0);
        let mut missing: Vec<String> = situations.map(|what| what.name().to_owned()).collect();
        for state in RowState::ALL {
            for change in Change::ALL {
                if reachable(*state, *change) && self.matrix[*state as usize][*change as usize] == 0 {
                    missing.push(format!("{state} x {change}"));
                }
            }
        }
        missing
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.healthy + self.excused.iter().sum::<u64>();
        writeln!(
            f,
            "leases under the promise: {} ({} renewed) of {all}",
            self.healthy, self.healthy_renewed
        )?;
        write!(f, "excused:")?;
        for excuse in Excuse::ALL {
            write!(f, " {excuse} {};", self.excused[*excuse as usize])?;
        }
        writeln!(f, " reclaims explained {}", self.reclaims_excused)?;
        write!(f, "conditional checks made/not made:")?;
        for invariant in Invariant::ALL {
            let (made, not) = (self.checked[*invariant as usize], self.unchecked[*invariant as usize]);
            if made + not > 0 {
                write!(f, " {invariant} {made}/{not};")?;
            }
        }
        Ok(())
    }
}
