//! A worker's settings, parsed into types that can't hold a bad combination.

use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use super::row::PROBATION_RECLAIMS;
use super::time::Age;

/// The lease timings (ARCHITECTURE.md, 'The lease protocol'). Accepted only if `H + 2R + M <= L`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    lease: Duration,
    heartbeat: Duration,
    store_timeout: Duration,
    fence_margin: Duration,
    reclaim_grace: Duration,
    // What follows from these, computed once: the machine compares ages with them at every input.
    ripe: Age,
    run: Age,
    overdue: Age,
    fence: Age,
    watch: Age,
}

/// Timings as given; what is `None` takes its default from the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawTiming {
    /// `L`, at least 1 s.
    pub lease: Duration,
    /// `H`, default `L/3`, at least 100 ms.
    pub heartbeat: Option<Duration>,
    /// `R`, default the lesser of `L/6` and 5 s.
    pub store_timeout: Option<Duration>,
    /// `M`, default `L/10`.
    pub fence_margin: Option<Duration>,
    /// `G`, default `L/10`.
    pub reclaim_grace: Option<Duration>,
}

/// Why timings were refused. The message names the values and the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TimingError {
    /// The lease is shorter than 1 s or longer than a day.
    Lease(Duration),
    /// The heartbeat is shorter than 100 ms.
    Heartbeat(Duration),
    /// The store timeout is zero or longer than 5 s.
    StoreTimeout(Duration),
    /// The fence margin is shorter than 1 ms: the clocks' resolution would eat it.
    FenceMargin(Duration),
    /// The reclaim grace is longer than the lease.
    ReclaimGrace {
        /// `G`.
        reclaim_grace: Duration,
        /// `L`.
        lease: Duration,
    },
    /// `H + 2R + M > L`: a lease could run out between two lost heartbeats.
    Rule {
        /// `H`.
        heartbeat: Duration,
        /// `R`.
        store_timeout: Duration,
        /// `M`.
        fence_margin: Duration,
        /// `L`.
        lease: Duration,
    },
}

impl fmt::Display for TimingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Lease(value) => write!(f, "lease is {}; allowed is 1s to 24h", Written(value)),
            Self::Heartbeat(value) => write!(f, "heartbeat is {}; allowed is 100ms or more", Written(value)),
            Self::StoreTimeout(value) => {
                write!(f, "store_timeout is {}; allowed is 1ms to 5s", Written(value))
            }
            Self::FenceMargin(value) => {
                write!(f, "fence_margin is {}; allowed is 1ms or more", Written(value))
            }
            Self::ReclaimGrace { reclaim_grace, lease } => write!(
                f,
                "reclaim_grace is {}; allowed is at most the lease ({})",
                Written(reclaim_grace),
                Written(lease)
            ),
            Self::Rule { heartbeat, store_timeout, fence_margin, lease } => write!(
                f,
                "heartbeat + 2 * store_timeout + fence_margin must be at most lease, but {} + 2 * {} + {} = {} is more \
                 than {}: lengthen the lease or shorten one of the others",
                Written(heartbeat),
                Written(store_timeout),
                Written(fence_margin),
                Written(
                    heartbeat.saturating_add(store_timeout.saturating_mul(2)).saturating_add(fence_margin)
                ),
                Written(lease)
            ),
        }
    }
}

impl core::error::Error for TimingError {}

/// A duration as one would write it.
struct Written(Duration);

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            _ if self.0.subsec_nanos() > 0 => write!(f, "{:?}", self.0),
            secs if secs > 0 && secs % 3_600 == 0 => write!(f, "{}h", secs / 3_600),
            secs if secs > 0 && secs % 60 == 0 => write!(f, "{}m", secs / 60),
            secs => write!(f, "{secs}s"),
        }
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);

impl Timing {
    /// Fills in defaults and checks every bound.
    ///
    /// # Errors
    /// Every bound that is broken, with its value; the rule only if none is.
    pub fn parse(raw: RawTiming) -> Result<Self, Vec<TimingError>> {
        let lease = raw.lease;
        let heartbeat = raw.heartbeat.unwrap_or(lease / 3);
        let store_timeout = raw.store_timeout.unwrap_or((lease / 6).min(Duration::from_secs(5)));
        let fence_margin = raw.fence_margin.unwrap_or(lease / 10);
        let reclaim_grace = raw.reclaim_grace.unwrap_or(lease / 10);
        let bounds = [
            (
                lease >= Duration::from_secs(1) && lease <= Duration::from_secs(86_400),
                TimingError::Lease(lease),
            ),
            (
                raw.heartbeat.is_none_or(|heartbeat| heartbeat >= Duration::from_millis(100)),
                TimingError::Heartbeat(heartbeat),
            ),
            (
                raw.store_timeout
                    .is_none_or(|timeout| timeout >= MILLISECOND && timeout <= Duration::from_secs(5)),
                TimingError::StoreTimeout(store_timeout),
            ),
            (
                raw.fence_margin.is_none_or(|margin| margin >= MILLISECOND),
                TimingError::FenceMargin(fence_margin),
            ),
            (reclaim_grace <= lease, TimingError::ReclaimGrace { reclaim_grace, lease }),
        ];
        let broken: Vec<_> = bounds.into_iter().filter(|(kept, _)| !kept).map(|(_, error)| error).collect();
        if !broken.is_empty() {
            return Err(broken);
        }
        if heartbeat.saturating_add(store_timeout * 2).saturating_add(fence_margin) > lease {
            return Err(vec![TimingError::Rule { heartbeat, store_timeout, fence_margin, lease }]);
        }
        let ripe = heartbeat / 2;
        Ok(Self {
            lease,
            heartbeat,
            store_timeout,
            fence_margin,
            reclaim_grace,
            ripe: Age::of(ripe),
            run: Age::of(ripe + ripe * 3 / 4),
            overdue: Age::of(heartbeat + store_timeout),
            fence: Age::of(lease - fence_margin),
            watch: Age::of(fence_margin / 2),
        })
    }

    /// `L`: how long a claim or renewal grants.
    pub const fn lease(&self) -> Duration {
        self.lease
    }

    /// `H`: the oldest that a held lease's last confirmed send may grow before it is renewed.
    pub const fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// `R`: bounds a whole store call, getting a connection included.
    pub const fn store_timeout(&self) -> Duration {
        self.store_timeout
    }

    /// `M`: how long before its local deadline a lease is fenced.
    pub const fn fence_margin(&self) -> Duration {
        self.fence_margin
    }

    /// `G`: how long after it ran out a lease is left alone.
    pub const fn reclaim_grace(&self) -> Duration {
        self.reclaim_grace
    }

    /// `H/2`: from that age on a lease is renewed along with others (rule P5).
    pub(super) const fn ripe(&self) -> Age {
        self.ripe
    }

    /// Seven eighths of `H`: at that age the oldest lease begins a run of renewals (rule P5).
    pub(super) const fn run(&self) -> Age {
        self.run
    }

    /// `H + R`: a lease of that age should have been renewed (rule P4).
    pub(super) const fn overdue(&self) -> Age {
        self.overdue
    }

    /// `L - M`: the age at which a lease is fenced (rule P4).
    pub(super) const fn fence(&self) -> Age {
        self.fence
    }

    /// `M/2`: how long who holds leases sleeps at most (rule P4).
    pub(super) const fn watch(&self) -> Age {
        self.watch
    }
}

/// How much one worker takes on (rule P13), and its pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Open requests, at least 1.
    pub max_in_flight: u32,
    /// Open requests per destination key, at least 1.
    pub max_in_flight_per_destination: u32,
    /// Leases held, at least 1.
    pub max_leased: u32,
    /// Events asked for in one claim, at least 1.
    pub claim_batch: u32,
    /// The slowest polling.
    pub poll_interval: Duration,
    /// Length of a drain (rule P8); must be longer than `2R`.
    pub drain_timeout: Duration,
    /// `RECLAIM_LIMIT`: 0 is off, else more than 3.
    pub reclaim_limit: u32,
}

/// Retry semantics. Integers only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RetryPolicy {
    /// Delay after the first failed attempt.
    pub initial: Duration,
    /// The longest delay.
    pub max: Duration,
    /// Jitter in basis points, `0..=10000`: `base * (1 ± bps/10000)`.
    pub jitter_bps: u16,
    /// Attempts beyond the first, 0 = off (the row's own limit alone counts).
    pub budget: u32,
    /// Cap on `Retry-After`.
    pub retry_after_max: Duration,
    /// Statuses that fail at once.
    pub fail_statuses: BTreeSet<u16>,
}

/// All that a worker machine is built from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkerSettings {
    timing: Timing,
    limits: Limits,
    retry: RetryPolicy,
    /// Keys the jitter: equal seeds draw equal jitter for the same event and attempt.
    pub seed: u64,
    /// The shortest pause between two polls that find nothing: after a claim that found something, before the worker
    /// sleeps.
    pub eager_poll: Duration,
    /// End by itself once no event is pending (`run --until-empty`).
    pub until_empty: bool,
    /// A mistake for the simulator to find.
    #[cfg(feature = "planted-bugs")]
    pub planted: Option<super::planted::Planted>,
}

/// Why limits or the retry policy were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitError {
    /// A duration outside its bounds.
    Duration {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: Duration,
        /// What is allowed.
        allowed: &'static str,
        /// What the setting is that bounds it.
        bound: Option<Duration>,
    },
    /// A number outside its bounds.
    Number {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        allowed: &'static str,
    },
}

impl LimitError {
    /// The name of the setting, in lower case.
    pub const fn setting(&self) -> &'static str {
        match self {
            Self::Duration { setting, .. } | Self::Number { setting, .. } => setting,
        }
    }
}

impl fmt::Display for LimitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Duration { setting, value, allowed, bound } => {
                write!(f, "{setting} is {}; allowed is {allowed}", Written(*value))?;
                bound.map_or(Ok(()), |bound| write!(f, " ({})", Written(bound)))
            }
            Self::Number { setting, value, allowed } => {
                write!(f, "{setting} is {value}; allowed is {allowed}")
            }
        }
    }
}

impl core::error::Error for LimitError {}

impl WorkerSettings {
    /// Checks limits and retry policy.
    ///
    /// # Errors
    /// Every bound that is broken, with its value.
    pub fn parse(
        timing: Timing,
        limits: Limits,
        retry: RetryPolicy,
        seed: u64,
    ) -> Result<Self, Vec<LimitError>> {
        let mut errors = Vec::new();
        for (setting, value) in [
            ("max_in_flight", limits.max_in_flight),
            ("max_in_flight_per_destination", limits.max_in_flight_per_destination),
            ("max_leased", limits.max_leased),
            ("claim_batch", limits.claim_batch),
        ] {
            if !(1..=1_000_000).contains(&value) {
                let value = u64::from(value);
                errors.push(LimitError::Number { setting, value, allowed: "1 to 1000000" });
            }
        }
        let mut bounded = |setting, value: Duration, least: Duration, most: Duration, allowed, bound| {
            if value < least || value > most {
                errors.push(LimitError::Duration { setting, value, allowed, bound });
            }
        };
        const MOST: Duration = Duration::from_secs(10 * 365 * 86_400);
        const HOUR: Duration = Duration::from_secs(3_600);
        bounded("poll_interval", limits.poll_interval, MILLISECOND, HOUR, "1ms to 1h", None);
        if retry.max < MILLISECOND || retry.max > MOST {
            bounded("retry_initial", retry.initial, MILLISECOND, MOST, "1ms to ten years", None);
        } else {
            let most = retry.max;
            bounded("retry_initial", retry.initial, MILLISECOND, most, "1ms to retry_max", Some(most));
        }
        bounded("retry_max", retry.max, MILLISECOND, MOST, "1ms to ten years", None);
        bounded("retry_after_max", retry.retry_after_max, Duration::ZERO, MOST, "0s to ten years", None);
        let twice = timing.store_timeout * 2;
        let allowed = "more than 2 * store_timeout";
        bounded("drain_timeout", limits.drain_timeout, twice + MILLISECOND, MOST, allowed, Some(twice));
        if retry.jitter_bps > 10_000 {
            let value = u64::from(retry.jitter_bps);
            errors.push(LimitError::Number { setting: "retry_jitter_bps", value, allowed: "0 to 10000" });
        }
        if (1..=PROBATION_RECLAIMS).contains(&limits.reclaim_limit) {
            let value = u64::from(limits.reclaim_limit);
            errors.push(LimitError::Number {
                setting: "reclaim_limit",
                value,
                allowed: "0 (off) or more than 3",
            });
        }
        if errors.is_empty() {
            Ok(Self {
                timing,
                limits,
                retry,
                seed,
                eager_poll: MILLISECOND / 10,
                until_empty: false,
                #[cfg(feature = "planted-bugs")]
                planted: None,
            })
        } else {
            Err(errors)
        }
    }

    /// The lease timings.
    pub const fn timing(&self) -> &Timing {
        &self.timing
    }

    /// The limits.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The retry policy.
    pub const fn retry(&self) -> &RetryPolicy {
        &self.retry
    }
}
