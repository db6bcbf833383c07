//! What a disk has done so far.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_device_model::metrics::{
    Counter, Family, Kind, Latencies, LatencyCounter, Measures, Metered, Padded, Value,
};

/// Counts of a disk, a part for each queue; kept across resets. Shared with its threads.
#[derive(Debug)]
pub struct BlockCounters(Vec<Arc<Padded<QueueCounters>>>);

/// Counts of one queue, by its thread alone. Reads and writes are counted when they succeeded.
#[derive(Debug, Default)]
struct QueueCounters {
    reads: Transfers,
    writes: Transfers,
    /// Requests that ended by an error of the host's I/O.
    errors: Counter,
    /// Requests that the engine has.
    in_flight: Counter,
}

/// One kind of transfer.
#[derive(Debug, Default)]
struct Transfers {
    bytes: Counter,
    /// From when the request was taken off the ring until it was answered.
    latency: LatencyCounter,
}

impl Transfers {
    fn count(&self, bytes: u32, latency: Duration) {
        self.bytes.add(bytes.into());
        self.latency.count(latency);
    }
}

/// What a queue's thread counts with. It looks at the clock once for each batch of requests that it takes, and once for
/// each batch that is done.
#[derive(Debug)]
pub(super) struct QueueWatch {
    counters: Arc<Padded<QueueCounters>>,
    now: Instant,
}

impl QueueWatch {
    /// A batch begins or ends.
    pub(super) fn look(&mut self) {
        self.now = Instant::now();
    }

    /// The last look.
    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// A read of the batch is done.
    pub(super) fn read(&self, bytes: u32, taken: Instant) {
        self.counters.reads.count(bytes, self.now.saturating_duration_since(taken));
    }

    /// A write of the batch is done.
    pub(super) fn written(&self, bytes: u32, taken: Instant) {
        self.counters.writes.count(bytes, self.now.saturating_duration_since(taken));
    }

    /// A request ended by an I/O error.
    pub(super) fn failed(&self) {
        self.counters.errors.add(1);
    }

    /// So many requests are being worked on.
    pub(super) fn in_flight(&self, requests: usize) {
        self.counters.in_flight.set(requests as u64);
    }
}

/// Counts at one moment; successful requests only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub write_bytes: u64,
    /// Read requests.
    pub read_ops: u64,
    /// Write requests.
    pub write_ops: u64,
}

/// All queues' transfers of one kind.
struct Total {
    bytes: u64,
    latency: Latencies,
}

impl BlockCounters {
    pub(super) fn new(queues: u16) -> Self {
        Self((0..queues).map(|_| Arc::default()).collect())
    }

    /// For the thread of one queue; there is at most one at a time.
    pub(super) fn watch(&self, index: u16) -> QueueWatch {
        // Only queues that exist are started; the counts of another would be lost.
        let counters = self.0.get(usize::from(index)).cloned().unwrap_or_default();
        QueueWatch { counters, now: Instant::now() }
    }

    /// The counts now.
    pub fn get(&self) -> BlockCounts {
        let (reads, writes) = (self.reads(), self.writes());
        BlockCounts {
            read_bytes: reads.bytes,
            write_bytes: writes.bytes,
            read_ops: reads.latency.count(),
            write_ops: writes.latency.count(),
        }
    }

    fn reads(&self) -> Total {
        self.total(|queue| &queue.reads)
    }

    fn writes(&self) -> Total {
        self.total(|queue| &queue.writes)
    }

    fn total(&self, kind: fn(&QueueCounters) -> &Transfers) -> Total {
        let mut total = Total { bytes: 0, latency: Latencies::default() };
        for queue in &self.0 {
            let Transfers { bytes, latency } = kind(queue);
            total.bytes = total.bytes.wrapping_add(bytes.get());
            total.latency.merge(&latency.get());
        }
        total
    }
}

static BYTES: Family = Family {
    name: "vmm_block_bytes",
    help: "Bytes that the guest read from or wrote to a disk.",
    unit: "bytes",
    kind: Kind::Counter,
};

static LATENCY: Family = Family {
    name: "vmm_block_latency_seconds",
    help: "Time from taking a request of a disk off the ring to its answer; successful requests.",
    unit: "seconds",
    kind: Kind::Histogram,
};

static ERRORS: Family = Family {
    name: "vmm_block_errors",
    help: "Requests of a disk that ended by an I/O error of the host.",
    unit: "",
    kind: Kind::Counter,
};

static IN_FLIGHT: Family = Family {
    name: "vmm_block_in_flight",
    help: "Requests of a disk that are being worked on: the depth of its queue at the moment.",
    unit: "",
    kind: Kind::Gauge,
};

impl Metered for BlockCounters {
    fn measure(&self, measures: &mut Measures) {
        let (reads, writes) = (self.reads(), self.writes());
        measures.counter("read_bytes", reads.bytes);
        measures.counter("read_ops", reads.latency.count());
        measures.counter("write_bytes", writes.bytes);
        measures.counter("write_ops", writes.latency.count());
        let names = ["read_latency_min", "read_latency_max", "read_latency_avg"];
        measure_latency(&reads.latency, names, measures);
        let names = ["write_latency_min", "write_latency_max", "write_latency_avg"];
        measure_latency(&writes.latency, names, measures);
        for (op, total) in [("read", reads), ("write", writes)] {
            measures.sample(&BYTES, &[("op", op)], Value::Counter(total.bytes));
            measures.sample(&LATENCY, &[("op", op)], total.latency.value());
        }
        for (index, queue) in self.0.iter().enumerate() {
            let index = index.to_string();
            measures.sample(&ERRORS, &[("queue", &index)], Value::Counter(queue.errors.get()));
            measures.sample(&IN_FLIGHT, &[("queue", &index)], Value::Gauge(queue.in_flight.get()));
        }
    }
}

/// In microseconds, as the contract has them. Before the first request there is no latency, and nothing is told.
fn measure_latency(latency: &Latencies, names: [&'static str; 3], measures: &mut Measures) {
    let Some(mean) = latency.mean() else { return };
    for (name, time) in names.into_iter().zip([latency.shortest, latency.longest, mean]) {
        measures.counter(name, u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }
}
