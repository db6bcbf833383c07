//! What devices and vCPUs count, and how it is told.
//!
//! Counting is for hot paths: a [`Counter`] belongs to one thread at a time, which adds without a locked instruction
//! and without a look at what others count; anybody may read it at any time. Whoever counts keeps his numbers in a
//! [`Padded`], so that two threads never write to one cache line.
//!
//! Telling is for whoever asks, seldom: [`Metered::measure`] writes into [`Measures`] what was counted since the device
//! was built. Counts live as long as the device: they go on over pause, reset by the driver and restore in place, and
//! begin at 0 with a new machine (boot, reboot). They are no part of saved state.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only one thread at a time changes. Others that read it see it late, never torn.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`, wrapping around.
    #[inline]
    pub fn add(&self, n: u64) {
        // One writer: no other addition can come between the two.
        self.set(self.get().wrapping_add(n));
    }

    /// Replaces the number, for what goes up and down.
    #[inline]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The number now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Keeps what one thread writes off the cache lines that others use.
#[derive(Debug, Default)]
// Two lines: processors fetch them in pairs.
#[repr(align(128))]
pub struct Padded<T>(pub T);

impl<T> Deref for Padded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Upper bounds of the buckets of a [`LatencyCounter`] in nanoseconds, inclusive.
const LATENCY_BOUNDS_NS: [u64; 16] = [
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    500_000_000,
    2_000_000_000,
];

/// The same in seconds, as they are told: 5 us to 2 s.
pub const LATENCY_BOUNDS: [f64; 16] = [
    5e-6, 10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 500e-3,
    2.0,
];

/// A histogram of durations with the buckets of [`LATENCY_BOUNDS`]. Like a [`Counter`], it has one writer at a time.
#[derive(Debug, Default)]
pub struct LatencyCounter {
    buckets: [Counter; LATENCY_BOUNDS_NS.len()],
    /// What is longer than the last bound.
    over: Counter,
    /// In nanoseconds.
    sum: Counter,
    /// In nanoseconds; 0 until there is one.
    shortest: Counter,
    /// In nanoseconds.
    longest: Counter,
}

impl LatencyCounter {
    /// Counts one duration. A duration of 0, which no clock shows, counts as 1 ns.
    #[inline]
    pub fn count(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1);
        let at = LATENCY_BOUNDS_NS.iter().position(|bound| nanos <= *bound);
        at.and_then(|at| self.buckets.get(at)).unwrap_or(&self.over).add(1);
        self.sum.add(nanos);
        let shortest = self.shortest.get();
        if nanos < shortest || shortest == 0 {
            self.shortest.set(nanos);
        }
        if nanos > self.longest.get() {
            self.longest.set(nanos);
        }
    }

    /// What was counted so far. While somebody counts, the parts may be one duration apart.
    pub fn get(&self) -> Latencies {
        let nanos = |counter: &Counter| Duration::from_nanos(counter.get());
        Latencies {
            buckets: self.buckets.iter().chain([&self.over]).map(Counter::get).collect(),
            sum: nanos(&self.sum),
            shortest: nanos(&self.shortest),
            longest: nanos(&self.longest),
        }
    }
}

/// What a [`LatencyCounter`] showed at one moment, or several together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies {
    /// Durations per bucket of [`LATENCY_BOUNDS`], and at the end those that were longer. Empty before the first merge.
    pub buckets: Vec<u64>,
    /// Sum of all.
    pub sum: Duration,
    /// The shortest; 0 if there is none.
    pub shortest: Duration,
    /// The longest; 0 if there is none.
    pub longest: Duration,
}

impl Latencies {
    /// How many durations.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }

    /// The mean; `None` if there is none.
    pub fn mean(&self) -> Option<Duration> {
        let nanos = self.sum.as_nanos().checked_div(self.count().into())?;
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Adds what another counted.
    pub fn merge(&mut self, other: &Self) {
        self.buckets.resize(self.buckets.len().max(other.buckets.len()), 0);
        for (sum, n) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum = sum.wrapping_add(*n);
        }
        self.sum = self.sum.saturating_add(other.sum);
        let known = [self.shortest, other.shortest].into_iter().filter(|shortest| !shortest.is_zero());
        self.shortest = known.min().unwrap_or_default();
        self.longest = self.longest.max(other.longest);
    }

    /// As a value of a family with unit seconds.
    pub fn value(&self) -> Value {
        let mut counts = self.buckets.clone();
        counts.resize(LATENCY_BOUNDS.len() + 1, 0);
        Value::Histogram { bounds: &LATENCY_BOUNDS, counts, sum: self.sum.as_secs_f64() }
    }
}

/// Metrics that mean the same (OpenMetrics 1.0, "MetricFamily"). There is one static of each; equal by name.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name: lower case, ends with `_` and the unit if there is one, without the suffix `_total`.
    pub name: &'static str,
    /// What it counts, for people.
    pub help: &'static str,
    /// `bytes`, `seconds`, or empty for plain numbers.
    pub unit: &'static str,
    /// Which kind of [`Value`] its samples have.
    pub kind: Kind,
}

/// The kind of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`Value::Counter`].
    Counter,
    /// [`Value::Gauge`].
    Gauge,
    /// [`Value::Histogram`].
    Histogram,
}

/// One metric at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Which.
    pub family: &'static Family,
    /// Names and values that tell it from others of its family; values may hold any characters.
    pub labels: Vec<(&'static str, String)>,
    /// Its value, in the family's unit.
    pub value: Value,
}

/// A value in its family's unit.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// What only grows.
    Counter(u64),
    /// What goes up and down.
    Gauge(u64),
    /// How often a value fell into each of several ranges.
    Histogram {
        /// Upper bounds of the ranges but the last, inclusive, ascending.
        bounds: &'static [f64],
        /// Values per range, not added up; one more than there are bounds.
        counts: Vec<u64>,
        /// Sum of all values.
        sum: f64,
    },
}

impl Value {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Counter(_) => Kind::Counter,
            Self::Gauge(_) => Kind::Gauge,
            Self::Histogram { .. } => Kind::Histogram,
        }
    }
}

/// Takes the counts of one device, in two forms.
#[derive(Debug, Default)]
pub struct Measures {
    /// Label of all samples.
    common: Option<(&'static str, String)>,
    counters: Vec<(&'static str, u64)>,
    samples: Vec<Sample>,
}

impl Measures {
    /// For the device `id`: each sample is labelled with it.
    pub fn of_device(id: &str) -> Self {
        Self { common: Some(("device", id.to_owned())), ..Self::default() }
    }

    /// Tells a number that `vm.counters` has, by the contract's name and in its unit.
    pub fn counter(&mut self, name: &'static str, value: u64) {
        self.counters.push((name, value));
    }

    /// Tells a metric, whose value is of the family's kind; `labels` come beside the device's.
    pub fn sample(&mut self, family: &'static Family, labels: &[(&'static str, &str)], value: Value) {
        let own = labels.iter().map(|(name, value)| (*name, (*value).to_owned()));
        let labels = self.common.clone().into_iter().chain(own).collect();
        self.samples.push(Sample { family, labels, value });
    }

    /// What was told for `vm.counters`, and what was told as metrics.
    pub fn into_parts(self) -> (Vec<(&'static str, u64)>, Vec<Sample>) {
        (self.counters, self.samples)
    }
}

/// Bytes through a console of any kind, counted under its lock or by its thread.
#[derive(Debug, Default)]
pub struct ConsoleCounter {
    /// Given to the guest.
    pub input: Counter,
    /// From the guest.
    pub output: Counter,
}

static CONSOLE_INPUT: Family = Family {
    name: "vmm_console_input_bytes",
    help: "Bytes that a console took for the guest.",
    unit: "bytes",
    kind: Kind::Counter,
};

static CONSOLE_OUTPUT: Family = Family {
    name: "vmm_console_output_bytes",
    help: "Bytes that the guest wrote to a console.",
    unit: "bytes",
    kind: Kind::Counter,
};

impl Metered for ConsoleCounter {
    fn measure(&self, measures: &mut Measures) {
        measures.sample(&CONSOLE_INPUT, &[], Value::Counter(self.input.get()));
        measures.sample(&CONSOLE_OUTPUT, &[], Value::Counter(self.output.get()));
    }
}

/// Who counts.
pub trait Metered {
    /// Tells what was counted since this was built. Takes no lock that the guest's accesses wait for longer than a
    /// few loads take. Without a body: nothing is counted.
    fn measure(&self, _: &mut Measures) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn bounds_are_the_same_in_both_units_and_ascend() {
        for (nanos, seconds) in LATENCY_BOUNDS_NS.iter().zip(LATENCY_BOUNDS) {
            assert!((*nanos as f64 / 1e9 - seconds).abs() < 1e-12, "{nanos} {seconds}");
        }
        assert!(LATENCY_BOUNDS_NS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn durations_fall_into_the_bucket_whose_bound_includes_them() {
        let latency = LatencyCounter::default();
        for nanos in [0, 5_000, 5_001, 2_000_000_000, 2_000_000_001] {
            latency.count(Duration::from_nanos(nanos));
        }
        latency.count(Duration::MAX);
        let found = latency.get();
        assert_eq!(found.buckets[..2], [2, 1]);
        assert_eq!(found.buckets[14..], [0, 1, 2]);
        assert_eq!(found.count(), 6);
        assert_eq!(found.shortest, Duration::from_nanos(1));
        assert_eq!(found.longest, Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn several_are_told_as_one() {
        let (first, second, none) = <(LatencyCounter, LatencyCounter, LatencyCounter)>::default();
        first.count(micros(30));
        second.count(micros(10));
        second.count(micros(80));
        let mut all = Latencies::default();
        assert_eq!((all.mean(), all.count()), (None, 0));
        for part in [&none, &first, &second, &none] {
            all.merge(&part.get());
        }
        assert_eq!((all.shortest, all.longest), (micros(10), micros(80)));
        assert_eq!((all.count(), all.mean()), (3, Some(micros(40))));
        match all.value() {
            Value::Histogram { bounds, counts, sum } => {
                assert_eq!((bounds.len() + 1, counts.len()), (counts.len(), 17));
                assert_eq!(counts[..6], [0, 1, 0, 1, 1, 0]);
                assert!((sum - 120e-6).abs() < 1e-12);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn samples_carry_the_devices_id_first() {
        static READS: Family = Family { name: "test_reads", help: "Reads.", unit: "", kind: Kind::Counter };
        let mut measures = Measures::of_device("_disk0");
        measures.counter("read_ops", 3);
        measures.sample(&READS, &[("queue", "1")], Value::Counter(3));
        let (counters, samples) = measures.into_parts();
        assert_eq!(counters, [("read_ops", 3)]);
        assert_eq!(samples[0].labels, [("device", "_disk0".to_owned()), ("queue", "1".to_owned())]);
    }

    #[test]
    fn counters_of_two_threads_share_no_cache_line() {
        let both: [Padded<Counter>; 2] = Default::default();
        let [first, second] = both.each_ref().map(|counter| std::ptr::from_ref(counter).addr());
        assert!(second - first >= 128);
        both[0].add(u64::MAX);
        both[0].add(3);
        assert_eq!((both[0].get(), both[1].get()), (2, 0));
    }
}
