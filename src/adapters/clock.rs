//! The one place that reads the machine's clock.

use rustix::time::{ClockId, clock_gettime};

use crate::machine::Moment;
use crate::ports::Clock;

/// `CLOCK_BOOTTIME`: counts on while the machine sleeps, and no setting of the wall clock moves it.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> Moment {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let time = clock_gettime(ClockId::Boottime);
        // macOS: the clock that `mach_continuous_time` reads, which counts on in sleep as well.
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let time = clock_gettime(ClockId::Monotonic);
        let micros = time.tv_sec.saturating_mul(1_000_000).saturating_add(time.tv_nsec / 1_000);
        Moment::from_micros(u64::try_from(micros).unwrap_or(0))
    }
}
