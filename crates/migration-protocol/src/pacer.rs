//! A limit of bandwidth: [`Pacer`] says how long to wait before the next bytes.

use std::time::Duration;

/// So much may be sent at once after a pause, in time at the limit.
const BURST: Duration = Duration::from_millis(10);

/// Keeps what is sent below a number of bytes per second, over all connections.
#[derive(Debug, Clone)]
pub struct Pacer {
    /// Bytes per second; 0: no limit.
    limit: u64,
    /// When all that was let through so far has gone at the limit.
    free: Duration,
}

impl Pacer {
    /// For so many bytes per second; 0 is no limit.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self { limit, free: Duration::ZERO }
    }

    /// Takes `bytes` into account, which are sent at `now` or after the time that this gives: wait for it, then send them.
    #[must_use]
    pub fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        // Unused time is lost, but for a burst's worth.
        let begin = self.free.max(now.saturating_sub(BURST));
        let nanos = u128::from(bytes).saturating_mul(1_000_000_000).checked_div(u128::from(self.limit));
        let Some(nanos) = nanos else { return Duration::ZERO };
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.free = begin.saturating_add(takes);
        begin.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `count` times `bytes` as soon as it may, each send itself taking `takes`; gives how long all took.
    fn run(limit: u64, count: u32, bytes: u64, takes: Duration) -> Duration {
        let began = Duration::from_secs(7);
        let (mut now, mut pacer) = (began, Pacer::new(limit));
        for _ in 0..count {
            now += pacer.take(now, bytes) + takes;
        }
        now - began
    }

    #[test]
    fn the_limit_holds_but_for_a_burst_and_the_last() {
        let second = Duration::from_secs(1);
        for (count, bytes) in [(100, 10_000), (1000, 1000), (4, 250_000)] {
            let took = run(1_000_000, count, bytes, Duration::ZERO);
            let last = Duration::from_micros(bytes);
            assert!(took <= second && took + BURST + last >= second, "{count} of {bytes}: {took:?}");
        }
    }

    #[test]
    fn a_slow_sender_never_waits_and_saves_nothing_up() {
        let slow = Duration::from_millis(20);
        assert_eq!(run(1_000_000, 50, 10_000, slow), slow * 50);
        let mut pacer = Pacer::new(1_000_000);
        assert_eq!(pacer.take(Duration::from_secs(100), 1_000_000), Duration::ZERO);
        let wait = pacer.take(Duration::from_secs(100), 1);
        assert_eq!(wait, Duration::from_secs(1) - BURST);
    }

    #[test]
    fn no_limit_is_no_wait_and_nothing_overflows() {
        assert_eq!(run(0, 10, u64::MAX, Duration::ZERO), Duration::ZERO);
        let mut pacer = Pacer::new(1);
        assert_eq!(pacer.take(Duration::ZERO, u64::MAX), Duration::ZERO);
        assert!(pacer.take(Duration::ZERO, u64::MAX) > Duration::from_secs(1 << 30));
        assert!(pacer.take(Duration::MAX, u64::MAX) < Duration::MAX);
    }
}
