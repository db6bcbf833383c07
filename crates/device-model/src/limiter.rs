//! How often a guest can make the log say something.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a burst of log lines through, then one an interval, which says how many were kept back before it. Quiet
/// intervals give the burst back, a line each. What was kept back after the last line is never told.
///
/// ```
/// use std::time::{Duration, Instant};
/// use vmm_device_model::limiter::Limiter;
///
/// let (limiter, now) = (Limiter::new(1, Duration::from_secs(60)), Instant::now());
/// assert_eq!(limiter.admit(now).unwrap().to_string(), "");
/// assert!(limiter.admit(now).is_none());
/// let later = now + Duration::from_secs(60);
/// assert_eq!(limiter.admit(later).unwrap().to_string(), " (1 before it not logged)");
/// ```
#[derive(Debug)]
pub struct Limiter {
    burst: u32,
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the whole burst is there again; it lies an interval further ahead with each line.
    full: Option<Instant>,
    kept_back: u64,
}

/// A line may be logged; shown, it says how many were not since the last one, if any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Lines that were kept back since the last one.
    pub kept_back: u64,
}

impl fmt::Display for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kept_back {
            0 => Ok(()),
            count => write!(f, " ({count} before it not logged)"),
        }
    }
}

impl Limiter {
    /// At least one line at once, at most `burst`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, state: Mutex::new(State { full: None, kept_back: 0 }) }
    }

    /// For what a guest does wrong: five lines, then one a minute.
    pub const fn for_guest() -> Self {
        Self::new(5, Duration::from_secs(60))
    }

    /// Whether a line may be logged at `now`.
    pub fn admit(&self, now: Instant) -> Option<Admitted> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let full = state.full.map_or(now, |full| full.max(now));
        let ahead = self.interval.saturating_mul(self.burst.saturating_sub(1));
        if full.duration_since(now) > ahead {
            state.kept_back = state.kept_back.saturating_add(1);
            return None;
        }
        // A clock that cannot count so far has nothing left to limit.
        state.full = full.checked_add(self.interval);
        Some(Admitted { kept_back: std::mem::take(&mut state.kept_back) })
    }
}

impl Default for Limiter {
    fn default() -> Self {
        Self::for_guest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn kept_back(limiter: &Limiter, now: Instant) -> Option<u64> {
        limiter.admit(now).map(|admitted| admitted.kept_back)
    }

    #[test]
    fn a_burst_then_a_line_an_interval() {
        let (limiter, start) = (Limiter::new(3, MINUTE), Instant::now());
        let mut lines = Vec::new();
        // One attempt a second for five minutes.
        for second in 0..300 {
            if let Some(count) = kept_back(&limiter, start + Duration::from_secs(second)) {
                lines.push((second, count));
            }
        }
        assert_eq!(lines, [(0, 0), (1, 0), (2, 0), (60, 57), (120, 59), (180, 59), (240, 59)]);
    }

    #[test]
    fn quiet_intervals_give_the_burst_back_and_no_more() {
        let (limiter, start) = (Limiter::new(2, MINUTE), Instant::now());
        let at = |minutes: u32| start + MINUTE * minutes;
        let turn = |now| (0..4).map(|_| kept_back(&limiter, now)).collect::<Vec<_>>();
        assert_eq!(turn(at(0)), [Some(0), Some(0), None, None]);
        assert_eq!(turn(at(1)), [Some(2), None, None, None]);
        assert_eq!(turn(at(100)), [Some(3), Some(0), None, None]);
    }

    #[test]
    fn a_burst_of_none_is_one_of_one_and_time_may_stand_still_or_go_back() {
        let (limiter, start) = (Limiter::new(0, MINUTE), Instant::now() + MINUTE);
        assert_eq!(kept_back(&limiter, start), Some(0));
        assert_eq!(kept_back(&limiter, start - MINUTE), None);
        assert_eq!(kept_back(&limiter, start + MINUTE), Some(1));
        let endless = Limiter::new(u32::MAX, Duration::MAX);
        assert!((0..3).all(|_| kept_back(&endless, start) == Some(0)));
    }

    #[test]
    fn threads_together_get_one_burst() {
        let (limiter, now) = (Limiter::new(5, MINUTE), Instant::now());
        let lines = || (0..1000).filter(|_| limiter.admit(now).is_some()).count();
        let total: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(lines)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!((total, kept_back(&limiter, now + MINUTE)), (5, Some(3995)));
    }
}
