//! How long each stage of building a machine took: always on, a clock reading per stage.

use std::fmt;
use std::time::{Duration, Instant};

/// A stage of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The consoles are opened, if they are not yet.
    Console,
    /// The hypervisor makes a VM.
    Vm,
    /// Guest memory is mapped and registered.
    Memory,
    /// Buses and devices.
    Devices,
    /// ACPI tables, kernel and initramfs are loaded.
    Kernel,
    /// The vCPUs and their threads are made, or waited for: at power-on they are made from the VM's stage on.
    Vcpus,
    /// Devices and vCPUs take their saved state over, of a restore.
    State,
}

impl Stage {
    /// All of them, in the order of a boot; a restore has no kernel, and takes state over in two steps.
    pub const ALL: [Self; 7] =
        [Self::Console, Self::Vm, Self::Memory, Self::Devices, Self::Kernel, Self::Vcpus, Self::State];

    /// The stage's name in events and traces.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Vm => "vm",
            Self::Memory => "memory",
            Self::Devices => "devices",
            Self::Kernel => "kernel",
            Self::Vcpus => "vcpus",
            Self::State => "state",
        }
    }
}

/// A stage that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Which.
    pub stage: Stage,
    /// When it began.
    pub start: Instant,
    /// How long it took, whether it succeeded or not.
    pub duration: Duration,
}

type Watcher = Box<dyn FnMut(&Span) + Send>;

/// The stages of one boot, in the order in which they began. It has one entry a stage, so it stays small.
#[derive(Default)]
pub struct Stages {
    spans: Vec<Span>,
    watcher: Option<Watcher>,
}

impl Stages {
    /// Tells `watcher` of each stage when it is over.
    pub fn watched(watcher: impl FnMut(&Span) + Send + 'static) -> Self {
        Self { spans: Vec::new(), watcher: Some(Box::new(watcher)) }
    }

    /// Does the work of a stage and writes down how long it took.
    pub fn time<R>(&mut self, stage: Stage, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        let span = Span { stage, start, duration: start.elapsed() };
        if let Some(watcher) = &mut self.watcher {
            watcher(&span);
        }
        self.spans.push(span);
        result
    }

    /// What is over so far. Of a boot that failed, the last one is the stage that failed.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }
}

impl fmt::Debug for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spans.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_kept_in_order_with_their_times_whatever_comes_of_them() {
        let (sender, told) = std::sync::mpsc::channel();
        let mut stages = Stages::watched(move |span| sender.send(*span).unwrap());
        let before = Instant::now();
        stages.time(Stage::Console, || std::thread::sleep(Duration::from_millis(1)));
        let failed: Result<(), &str> = stages.time(Stage::Vm, || Err("no"));
        assert_eq!(failed, Err("no"));
        let [console, vm] = stages.spans() else { panic!("{stages:?}") };
        assert_eq!((console.stage, vm.stage), (Stage::Console, Stage::Vm));
        assert!(console.start >= before && console.duration >= Duration::from_millis(1));
        assert!(vm.start >= console.start + console.duration);
        assert_eq!(told.try_iter().collect::<Vec<_>>(), stages.spans());
    }

    #[test]
    fn names_are_distinct() {
        let names: std::collections::BTreeSet<_> = Stage::ALL.iter().map(|stage| stage.name()).collect();
        assert_eq!(names.len(), Stage::ALL.len());
    }
}
