//! The settings that the promises depend on, as plain numbers of microseconds and counts.

/// One worker's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the settings in ARCHITECTURE.md")]
pub struct Terms {
    pub lease: u64,
    pub heartbeat: u64,
    pub store_timeout: u64,
    pub fence_margin: u64,
    pub reclaim_grace: u64,
    pub max_in_flight: u32,
    pub max_in_flight_per_destination: u32,
    pub max_leased: u32,
    pub claim_batch: u32,
    pub poll_interval: u64,
    pub drain_timeout: u64,
    pub request_timeout: u64,
    pub reclaim_limit: u32,
    pub retry_initial: u64,
    pub retry_max: u64,
    pub retry_jitter_bps: u32,
    pub retry_budget: u32,
    pub retry_after_max: u64,
    /// A status that fails at once; 0 for none.
    pub fail_status: u16,
}

impl Terms {
    /// How many settled tries an event may have: its own limit, and one more than the budget if there is a budget.
    pub fn tries(&self, max_attempts: u32) -> u32 {
        match self.retry_budget {
            0 => max_attempts,
            budget => max_attempts.min(budget + 1),
        }
    }

    /// The shortest and longest delay after that many settled tries (1 for the first), without `Retry-After`: the first
    /// doubled for each further try, capped, give or take the jitter, capped again.
    pub fn delay_bounds(&self, tries: u32) -> (u64, u64) {
        let mut base = self.retry_initial;
        for _ in 1..tries {
            base = (base * 2).min(self.retry_max);
            if base == self.retry_max {
                break;
            }
        }
        let base = base.min(self.retry_max);
        let swing =
            u64::try_from(u128::from(base) * u128::from(self.retry_jitter_bps) / 10_000).unwrap_or(base);
        ((base - swing).max(1), (base + swing).min(self.retry_max))
    }

    /// Whether locks of that time in all leave enough for two renewals that are answered after `R`.
    pub fn has_room_for_locks(&self, locked: u64) -> bool {
        self.heartbeat + 2 * self.store_timeout + self.fence_margin + locked <= self.lease
    }

    /// With how much of its lease left a claim that commits late can't reliably be given back: four tries and the margin,
    /// and looks are no closer than a sixteenth of a lease.
    pub fn hardly_given_back(&self) -> u64 {
        4 * self.store_timeout + self.fence_margin + (self.lease / 16).saturating_sub(self.store_timeout)
    }

    /// How seldom expired leases may be searched for, if a search takes up to `took`: so that searches take a fiftieth of
    /// the time, but no more seldom than every `2G`.
    pub fn search_interval(&self, took: u64) -> u64 {
        let pause = (50 * took).min(2 * self.reclaim_grace);
        self.poll_interval.max(self.reclaim_grace / 2).max(pause)
    }

    /// How seldom claims may start ahead of the front of the queue, or of the leases, if such a claim takes up to `took`:
    /// every other second, or so that it takes a tenth of the time.
    pub fn rescan_interval(&self, took: u64) -> u64 {
        (10 * took.min(self.store_timeout)).max(2_000_000) + self.store_timeout
    }

    /// A bound within which a single worker brings that many events to their ends once faults stop, with tries of at
    /// most `attempts` each, of which `poison` kill their worker `restart` microseconds long.
    pub fn convergence_bound(&self, events: u32, attempts: u32, poison: u32, restart: u64) -> u64 {
        let turn = self.request_timeout + 6 * self.store_timeout + self.poll_interval + 1_000_000;
        let width =
            u64::from(self.max_in_flight.min(self.max_in_flight_per_destination).min(self.max_leased)).max(1);
        let rounds = u64::from(events).div_ceil(width);
        let wait = self.retry_max.max(self.retry_after_max);
        let run_out = 2 * self.lease
            + self.reclaim_grace
            + 2 * self.search_interval(self.store_timeout)
            // Of the queue and of the leases, four times twice as far back.
            + 2 * 4 * self.rescan_interval(self.store_timeout)
            + turn;
        let deaths = u64::from(poison) * u64::from(self.reclaim_limit + 4);
        // What ran out too often is tried one at a time.
        let alone = u64::from(events) * (self.search_interval(self.store_timeout) + turn);
        2 * run_out + alone + u64::from(attempts) * (wait + rounds * turn) + deaths * (run_out + restart)
    }
}
