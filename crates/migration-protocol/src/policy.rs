//! When to stop copying a running guest: [`Policy`] looks at each pass over memory and decides.

use std::time::Duration;

/// What happens when the time for a migration has passed; `timeout_strategy` of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TimeoutStrategy {
    /// The guest stays where it is.
    #[default]
    Cancel,
    /// The guest is moved, however long it stands still.
    Ignore,
}

/// What a migration aims for. The defaults are the contract's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Goals {
    /// Longest that the guest should stand still (`downtime_ms`).
    pub downtime: Duration,
    /// What of that is not memory: saving, restoring, the hand-over. Never more than half of it is taken off.
    pub overhead: Duration,
    /// Longest that all should take (`timeout_s`).
    pub timeout: Duration,
    /// What happens after that.
    pub strategy: TimeoutStrategy,
    /// Most passes over memory, the last one not counted; then it is as if the time had passed.
    pub passes: u32,
    /// Whether vCPUs may be slowed down when passes do not get shorter.
    pub auto_converge: bool,
}

impl Default for Goals {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            overhead: Duration::from_millis(5),
            timeout: Duration::from_secs(3600),
            strategy: TimeoutStrategy::Cancel,
            passes: u32::MAX,
            auto_converge: false,
        }
    }
}

/// One pass over memory, as it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Bytes on the link.
    pub sent: u64,
    /// Bytes of memory that they stood for: more, where it was compressed or zero. What need not be said, as zeros in the first
    /// pass, does not count.
    pub memory: u64,
    /// From its begin until all had landed.
    pub took: Duration,
    /// Bytes that the guest wrote to meanwhile.
    pub dirty: u64,
}

/// Why the guest is stopped for the last pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stop {
    /// What is left fits the downtime.
    Converged,
    /// The time has passed, and does not matter.
    Timeout,
    /// There were enough passes, and the downtime does not matter.
    Passes,
}

/// What to do after a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another pass, with vCPUs slowed down by so many percent of their time.
    Again {
        /// 0 to 99.
        throttle: u8,
    },
    /// Stop the guest and send the rest.
    Finish(Stop),
    /// Let the guest stay.
    GiveUp(Stop),
}

/// Slows vCPUs down by this first, then by more in steps, up to the most, in percent of their time.
const THROTTLE: (u8, u8, u8) = (20, 10, 99);

/// So many passes that do not get shorter, before vCPUs are slowed down (more).
const PATIENCE: u8 = 2;

/// All of memory is on the link.
const WHOLE: u64 = 1 << 16;

/// Looks at passes and decides.
#[derive(Debug, Clone)]
pub struct Policy {
    goals: Goals,
    /// Bytes per second on the link; 0 until something was sent.
    bandwidth: u64,
    /// How much of memory is on the link, in parts of [`WHOLE`], of late; `None` until some was moved.
    share: Option<u64>,
    /// Bytes of memory per second in the fastest pass.
    best: u64,
    last: Option<Pass>,
    passes: u32,
    throttle: u8,
    /// Passes in a row that left about as much as the one before, or more.
    stuck: u8,
}

impl Policy {
    /// Before the first pass.
    #[must_use]
    pub fn new(goals: Goals) -> Self {
        Self { goals, bandwidth: 0, share: None, best: 0, last: None, passes: 0, throttle: 0, stuck: 0 }
    }

    /// What it aims for.
    #[must_use]
    pub fn goals(&self) -> &Goals {
        &self.goals
    }

    /// Bandwidth of the link, in bytes per second, of late; 0 when it is not known.
    #[must_use]
    pub fn bandwidth(&self) -> u64 {
        self.bandwidth
    }

    /// How fast the guest writes to memory it had not written to since, in bytes per second, in the last pass.
    #[must_use]
    pub fn dirty_rate(&self) -> u64 {
        self.last.map_or(0, |pass| per_second(pass.dirty, pass.took))
    }

    /// How long the guest would stand still if it were stopped now; `None` when it is not known how fast memory moves.
    #[must_use]
    pub fn blackout(&self) -> Option<Duration> {
        let dirty = self.last?.dirty;
        self.transfer(dirty).map(|transfer| transfer.saturating_add(self.goals.overhead))
    }

    /// By how much vCPUs are slowed down, in percent of their time.
    #[must_use]
    pub fn throttle(&self) -> u8 {
        self.throttle
    }

    /// What to do after `pass`, `elapsed` after the migration began.
    pub fn decide(&mut self, pass: Pass, elapsed: Duration) -> Decision {
        self.passes = self.passes.saturating_add(1);
        self.estimate(pass);
        let before = self.last.replace(pass);
        let half = self.goals.downtime / 2;
        let budget = self.goals.downtime.saturating_sub(self.goals.overhead).max(half);
        if self.transfer(pass.dirty).is_some_and(|transfer| transfer <= budget) {
            return Decision::Finish(Stop::Converged);
        }
        let stop = if elapsed >= self.goals.timeout {
            Some(Stop::Timeout)
        } else {
            (self.passes >= self.goals.passes).then_some(Stop::Passes)
        };
        match (stop, self.goals.strategy) {
            (Some(stop), TimeoutStrategy::Ignore) => return Decision::Finish(stop),
            (Some(stop), TimeoutStrategy::Cancel) => return Decision::GiveUp(stop),
            (None, _) => {}
        }
        // Less than an eighth less is no progress.
        let progress = before.is_none_or(|before| pass.dirty < before.dirty.saturating_sub(before.dirty / 8));
        self.stuck = if progress { 0 } else { self.stuck.saturating_add(1) };
        if self.goals.auto_converge && self.stuck >= PATIENCE {
            self.stuck = 0;
            let (first, step, most) = THROTTLE;
            let next = if self.throttle == 0 { first } else { self.throttle.saturating_add(step) };
            self.throttle = next.min(most);
        }
        Decision::Again { throttle: self.throttle }
    }

    /// The mean of this pass and of what was so far: young passes count most. A pass that moved next to nothing says
    /// more about latency than about speed.
    fn estimate(&mut self, pass: Pass) {
        const ENOUGH: u64 = 256 << 10;
        let found = |bytes| per_second(bytes, pass.took);
        if self.bandwidth == 0 {
            self.bandwidth = found(pass.sent);
        } else if pass.sent >= ENOUGH {
            self.bandwidth = self.bandwidth.midpoint(found(pass.sent)).max(1);
        }
        self.best = self.best.max(found(pass.memory));
        let share =
            u128::from(pass.sent).saturating_mul(u128::from(WHOLE)).checked_div(u128::from(pass.memory));
        let share = share.map(|share| u64::try_from(share).unwrap_or(u64::MAX));
        match (self.share, share) {
            (Some(before), Some(share)) if pass.memory >= ENOUGH => self.share = Some(before.midpoint(share)),
            (None, Some(share)) => self.share = Some(share),
            _ => {}
        }
    }

    /// How long it takes to move `bytes` of memory: what of it is on the link, as fast as that is, and all of it no faster than it
    /// ever was, for what is zero has to be looked at.
    fn transfer(&self, bytes: u64) -> Option<Duration> {
        if bytes == 0 {
            return Some(Duration::ZERO);
        }
        let share = u128::from(self.share?);
        let on_link = u128::from(bytes).saturating_mul(share) / u128::from(WHOLE);
        let time = |bytes: u128, speed| bytes.saturating_mul(1_000_000_000).checked_div(u128::from(speed));
        let nanos = time(on_link, self.bandwidth)?.max(time(bytes.into(), self.best)?);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    // No time at all: the clock is coarser than the link is fast.
    let rate = u128::from(bytes).saturating_mul(1_000_000_000) / time.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}
