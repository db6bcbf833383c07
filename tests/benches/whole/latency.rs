//! Latency of the API, at rest and while other clients keep the VMM busy.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use crate::figure::{Figure, Goal, median, percentile};
use crate::http::{Connection, VM_INFO, put};
use crate::process::Process;
use crate::{Bench, MEMORY_MIB, Result, micros};

const ROUNDS: usize = 10;
const REQUESTS: usize = 1000;
/// Of those at fixed times.
const PACED_REQUESTS: usize = 500;
const PAUSES: usize = 1000;
/// Targets: ours over the floor's for the median, microseconds for the slowest hundredth.
const P50: Goal = Goal::RatioAtMost(2.5);
const P99: Goal = Goal::AtMost(1000.0);

impl Bench {
    /// Latency of vm.info over one connection, with a guest that has halted.
    pub(crate) fn vm_info(&self) -> Result<Vec<Figure>> {
        let mut subject = Subject::start(self, 1)?;
        subject.ask(&[put("vm.boot", "")])?;
        subject.figures(self, ["vm.info p50", "vm.info p99"], [P50, Goal::None])
    }

    /// The same while other clients boot, pause or stall.
    pub(crate) fn vm_info_busy(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        let mut subject = Subject::start(self, 1)?;
        let boots = Other::repeat(subject.connect()?, [put("vm.boot", ""), put("vm.shutdown", "")]);
        figures.extend(subject.figures(
            self,
            ["vm.info p50, a VM boots and ends", "vm.info p99, a VM boots and ends"],
            [P50, P99],
        )?);
        figures.extend(boots.during_first(&mut subject, "vm.boot")?);
        boots.stop()?;

        let mut subject = Subject::start(self, 1)?;
        subject.ask(&[put("vm.boot", "")])?;
        let pauses = Other::repeat(subject.connect()?, [put("vm.pause", ""), put("vm.resume", "")]);
        figures.extend(subject.figures(
            self,
            ["vm.info p50, a VM pauses and resumes", "vm.info p99, a VM pauses and resumes"],
            [P50, P99],
        )?);
        pauses.stop()?;

        let mut stalled = subject.connect()?;
        stalled.send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")?;
        figures.extend(subject.figures(
            self,
            ["vm.info p50, a client stalls", "vm.info p99, a client stalls"],
            [P50, P99],
        )?);
        Ok(figures)
    }

    /// vm.pause and vm.resume of a guest with two vCPUs.
    pub(crate) fn pause_resume(&self) -> Result<Figure> {
        let mut subject = Subject::start(self, 2)?;
        subject.ask(&[put("vm.boot", "")])?;
        let both = [put("vm.pause", ""), put("vm.resume", "")];
        subject.ask(&both)?;
        let mut times = Vec::new();
        for _ in 0..PAUSES {
            let start = Instant::now();
            subject.ask(&both)?;
            times.push(micros(start.elapsed()));
        }
        let median = median(&mut times);
        Ok(Figure::alone("vm.pause and vm.resume, 2 vCPUs", "us", median, Goal::AtMost(1000.0)))
    }
}

/// A VMM with a VM that was created, and a client.
struct Subject {
    vmm: Process,
    socket: PathBuf,
    client: Connection,
}

impl Subject {
    fn start(bench: &Bench, vcpus: u32) -> Result<Self> {
        let socket = bench.folder.join("info.sock");
        // One that was killed has left it.
        let _ = std::fs::remove_file(&socket);
        let option = format!("path={}", socket.display());
        let mut vmm = Process::start(&bench.vmm, &["--api-socket", &option])?;
        let client = Connection::wait_for(&socket, &mut vmm)?;
        let mut new = Self { vmm, socket, client };
        new.ask(&[put("vm.create", &config(&bench.kernel, vcpus))])?;
        Ok(new)
    }

    fn connect(&mut self) -> Result<Connection> {
        Connection::wait_for(&self.socket, &mut self.vmm)
    }

    fn ask(&mut self, requests: &[Vec<u8>]) -> Result<()> {
        requests.iter().try_for_each(|request| self.client.request(request))
    }

    /// Median and slowest hundredth of vm.info beside the floor's, which is measured in turn under the same load.
    fn figures(&mut self, bench: &Bench, names: [&'static str; 2], goals: [Goal; 2]) -> Result<Vec<Figure>> {
        let socket = bench.folder.join("echo.sock");
        let _ = std::fs::remove_file(&socket);
        let mut process = Process::start(&bench.floor, &["echo", &socket.display().to_string()])?;
        let mut floor = Connection::wait_for(&socket, &mut process)?;
        let (mut middle, mut slowest) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        // The first round warms caches.
        for round in 0..=ROUNDS {
            let mut ours = in_a_row(|| self.client.request(VM_INFO))?;
            let mut floors = in_a_row(|| floor.echo(VM_INFO))?;
            let mut paced_ours = paced(|| self.client.request(VM_INFO))?;
            let mut paced_floors = paced(|| floor.echo(VM_INFO))?;
            if round > 0 {
                middle.0.push(percentile(&mut ours, 0.5));
                middle.1.push(percentile(&mut floors, 0.5));
                slowest.0.push(percentile(&mut paced_ours, 0.99));
                slowest.1.push(percentile(&mut paced_floors, 0.99));
            }
        }
        let ([name50, name99], [goal50, goal99]) = (names, goals);
        Ok(vec![Figure::beside(name50, "us", middle, goal50), Figure::beside(name99, "us", slowest, goal99)])
    }
}

/// Another client, which makes two requests in turn until it is stopped.
struct Other {
    stopping: Arc<AtomicBool>,
    /// The first of the two is not answered yet.
    in_first: Arc<AtomicBool>,
    thread: JoinHandle<std::result::Result<(), String>>,
}

impl Other {
    fn repeat(mut client: Connection, [first, second]: [Vec<u8>; 2]) -> Self {
        let (stopping, in_first) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (stop, inside) = (Arc::clone(&stopping), Arc::clone(&in_first));
        let thread = spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                inside.store(true, Ordering::SeqCst);
                let answer = client.request(&first);
                inside.store(false, Ordering::SeqCst);
                answer.and_then(|()| client.request(&second)).map_err(|error| error.to_string())?;
            }
            Ok(())
        });
        Self { stopping, in_first, thread }
    }

    /// Latency of the requests that were sent while the other's first request was carried out.
    fn during_first(&self, subject: &mut Subject, name: &str) -> Result<[Figure; 2]> {
        let mut times = Vec::new();
        let mut pace = Pace::new();
        while times.len() < PACED_REQUESTS {
            let start = pace.next();
            let inside = self.in_first.load(Ordering::SeqCst);
            subject.client.request(VM_INFO)?;
            if inside {
                times.push(micros(start.elapsed()));
            }
            if self.thread.is_finished() {
                return Err(format!("the client of {name} has ended").into());
            }
        }
        let alone =
            |name, part, goal, times: &mut [f64]| Figure::alone(name, "us", percentile(times, part), goal);
        Ok([
            alone("vm.info p50, sent during vm.boot", 0.5, Goal::None, &mut times),
            alone("vm.info p99, sent during vm.boot", 0.99, P99, &mut times),
        ])
    }

    fn stop(self) -> Result<()> {
        self.stopping.store(true, Ordering::SeqCst);
        Ok(self.thread.join().map_err(|_| "the other client panicked")??)
    }
}

fn config(kernel: &Path, vcpus: u32) -> String {
    serde_json::json!({
        "cpus": { "boot_vcpus": vcpus, "max_vcpus": vcpus },
        "memory": { "size": MEMORY_MIB << 20 },
        "payload": { "kernel": kernel },
        "serial": { "mode": "Null" },
        "console": { "mode": "Off" },
    })
    .to_string()
}

/// Each request as soon as the one before is answered.
fn in_a_row(mut request: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    (0..REQUESTS)
        .map(|_| {
            let start = Instant::now();
            request()?;
            Ok(micros(start.elapsed()))
        })
        .collect()
}

/// Requests at fixed times. Those that are due while an earlier one waits count from when they were due: a server that stops for
/// a while keeps all of them waiting, not one.
fn paced(mut request: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut pace = Pace::new();
    (0..PACED_REQUESTS)
        .map(|_| {
            let start = pace.next();
            request()?;
            Ok(micros(start.elapsed()))
        })
        .collect()
}

pub(crate) struct Pace {
    due: Instant,
}

impl Pace {
    const INTERVAL: Duration = Duration::from_millis(1);

    pub(crate) fn new() -> Self {
        Self { due: Instant::now() }
    }

    /// Waits until the next request is due; returns the time from which it counts.
    pub(crate) fn next(&mut self) -> Instant {
        self.due += Self::INTERVAL;
        match self.due.checked_duration_since(Instant::now()) {
            // How late a timer wakes us is nobody's latency.
            Some(left) if !left.is_zero() => {
                sleep(left);
                Instant::now()
            }
            _ => self.due,
        }
    }
}
