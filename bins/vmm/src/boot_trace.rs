//! The stages of a boot as a trace that Perfetto and chrome://tracing open.
//!
//! A [`BootTrace`] is made when a machine is built, and takes down what follows: the start of its vCPUs and the codes
//! that the guest posts at port 0x80. [`BootTrace::json`] shows all that it has so far. With `--boot-trace` the file is
//! written when the guest starts, and again, with the guest's codes, when its machine goes.

mod event;
mod startup;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vmm_platform_devices::debug_port::{PostCode, PostCodes};

use crate::machine::stages::Stages;
use event::{Event, Row, document};
pub use startup::{Startup, TraceFileError};

/// POST codes that a trace holds: guests use the port for delays, too.
const MAX_CODES: usize = 256;

/// What a boot did, and when.
#[derive(Debug)]
pub struct BootTrace {
    /// Where its times count from.
    origin: Instant,
    events: Vec<Event>,
    codes: Arc<Codes>,
}

impl BootTrace {
    /// The trace of machine `number`, the first being 1, from the stages that are over. The first machine's begins with
    /// the process, the others' with their own first stage.
    #[must_use]
    pub fn new(number: u64, stages: &Stages, recorder: Recorder) -> Self {
        let startup = startup::published().filter(|_| number == 1);
        let first = stages.spans().first().map(|span| span.start);
        let origin = startup.map(Startup::begun).or(first).unwrap_or_else(Instant::now);
        let mut events: Vec<Event> = startup.map(Startup::events).unwrap_or_default();
        events.extend(stages.spans().iter().map(|s| Event::span(s.stage.name(), s.start, s.duration)));
        events.extend(recorder.devices);
        Self { origin, events, codes: recorder.codes }
    }

    /// The vCPUs run for the first time, since `at`.
    pub fn started(&mut self, at: Instant) {
        self.events.push(Event::instant("first run", Row::Vmm, at));
        self.write();
    }

    /// The trace so far, in Chrome's Trace Event Format.
    #[must_use]
    pub fn json(&self) -> String {
        let codes = self.codes.0.lock().unwrap_or_else(PoisonError::into_inner);
        let posted = codes.iter().map(|(code, at)| {
            let name = format!("POST {:#04x} ({})", code.code, code.kind());
            Event::instant(name, Row::Guest, *at)
        });
        let events: Vec<Event> = self.events.iter().cloned().chain(posted).collect();
        document(std::process::id(), self.origin, &events)
    }

    /// Writes the file of `--boot-trace`, if there is one.
    fn write(&self) {
        if let Some(file) = startup::published().and_then(Startup::file) {
            file.write(&self.json());
        }
    }
}

impl Drop for BootTrace {
    fn drop(&mut self) {
        if !self.codes.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.write();
        }
    }
}

/// Takes down what the stages do not tell: how long each device took, and the guest's POST codes.
#[derive(Debug, Default)]
pub struct Recorder {
    devices: Vec<Event>,
    codes: Arc<Codes>,
}

impl Recorder {
    /// Does work for a device and writes down how long it took.
    pub fn time<R>(&mut self, name: impl Into<String>, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.devices.push(Event::span(name, start, start.elapsed()));
        result
    }

    /// Where POST codes go.
    #[must_use]
    pub fn codes(&self) -> Arc<Codes> {
        Arc::clone(&self.codes)
    }
}

/// The first codes that a guest posted.
#[derive(Debug, Default)]
pub struct Codes(Mutex<Vec<(PostCode, Instant)>>);

impl PostCodes for Codes {
    fn post(&self, code: PostCode) {
        let mut codes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if codes.len() < MAX_CODES {
            codes.push((code, Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::*;
    use crate::machine::stages::Stage;

    fn names(trace: &BootTrace) -> Vec<String> {
        let document: Value = serde_json::from_str(&trace.json()).unwrap();
        let events = document["traceEvents"].as_array().unwrap();
        let timed = events.iter().filter(|event| event["ph"] != "M");
        timed.map(|event| event["name"].as_str().unwrap().to_owned()).collect()
    }

    fn post(codes: &Codes, code: u8) {
        codes.post(PostCode { code, at: Duration::ZERO });
    }

    #[test]
    fn stages_devices_the_first_run_and_the_guests_codes() {
        let (mut stages, mut recorder) = (Stages::default(), Recorder::default());
        let codes = recorder.codes();
        stages.time(Stage::Vm, || ());
        stages.time(Stage::Devices, || recorder.time("_disk0", || ()));
        let mut trace = BootTrace::new(2, &stages, recorder);
        assert_eq!(names(&trace), ["vm", "devices", "_disk0"]);
        trace.started(Instant::now());
        post(&codes, 0x41);
        assert_eq!(names(&trace), ["vm", "devices", "_disk0", "first run", "POST 0x41 (kernel)"]);
    }

    #[test]
    fn a_guest_cannot_make_a_trace_grow_for_ever() {
        let recorder = Recorder::default();
        let codes = recorder.codes();
        let trace = BootTrace::new(2, &Stages::default(), recorder);
        (0..10_000).for_each(|_| post(&codes, 0x80));
        assert_eq!(names(&trace).len(), MAX_CODES);
    }
}
