//! A worker's own clock (rules P3 and P4), and the timer that its short pauses are taken on.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::machine::Moment;
use crate::ports::Clock;

/// `CLOCK_BOOTTIME`: counts on while the machine sleeps, and no setting of the wall clock moves it.
#[derive(Debug)]
pub struct BootClock {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    timer: fine::Timer,
}

impl BootClock {
    /// The clock, and a timer of its own.
    ///
    /// # Errors
    /// If the operating system has no more descriptors.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            #[cfg(any(target_os = "linux", target_os = "android"))]
            timer: fine::Timer::new()?,
        })
    }
}

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

    /// To the microsecond where a millisecond more would matter: between two looks of a worker that polls eagerly.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    async fn sleep(&self, nap: Duration) {
        const SHORT: Duration = Duration::from_millis(10);
        if nap.is_zero() || nap >= SHORT || self.timer.wait(nap).await.is_err() {
            tokio::time::sleep(nap).await;
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod fine {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    /// A timer of the kernel's.
    #[derive(Debug)]
    pub(super) struct Timer(AsyncFd<OwnedFd>);

    impl Timer {
        pub(super) fn new() -> io::Result<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
            #[allow(deprecated, reason = "sound for an owned descriptor, and what replaces it is `unsafe`")]
            let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
            Ok(Self(timer))
        }

        /// Sets the timer anew, whatever it was set to, and waits for it.
        pub(super) async fn wait(&self, nap: Duration) -> io::Result<()> {
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec::try_from(nap).map_err(io::Error::other)?,
            };
            timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
            self.0.async_io(Interest::READABLE, |timer| Ok(rustix::io::read(timer, &mut [0; 8])?)).await?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_nap_is_cut_short_by_one_that_was_given_up() {
        let clock = BootClock::new().expect("a clock");
        for nap in [100, 5_000, 12_000].map(Duration::from_micros) {
            tokio::select! {
                biased;
                () = clock.sleep(Duration::from_millis(1)) => {}
                () = std::future::ready(()) => {}
            }
            // That timer has run out meanwhile.
            std::thread::sleep(Duration::from_millis(2));
            let begun = clock.now();
            clock.sleep(nap).await;
            assert!(clock.now().since(begun) >= nap, "{nap:?}");
        }
    }
}
