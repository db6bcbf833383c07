//! What the protocol has done here: checks, memory, machines.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use vmm_api::spec::Checked;
use vmm_device_model::thread;
use vmm_memory_manager::map::HostMemory;
use vmm_migration_protocol::{
    DescriptorRange, DestinationInput, DestinationStep, DestinationUndo, Fault, Features, Hello, Output,
    Reason,
};
use vmm_snapshot::Record;

use super::{Arrival, Driver, Heard, Live, ReceiveStep};
use crate::exit::chain;
use crate::machine;
use crate::migration::ahead::Ahead;
use crate::migration::making::Made;
use crate::migration::postcopy::filling::Filling;
use crate::migration::{THREAD, descriptors, fit, making};

/// Steps that are done beside the driver, one at a time.
#[derive(Default)]
pub(super) struct Beside {
    /// The last one's number.
    begun: u64,
    /// It is under way.
    goes_on: bool,
    /// It is to end, and is waited for until then.
    pub(super) until: Option<Instant>,
}

impl Beside {
    /// The number of one that begins.
    pub(super) fn begin(&mut self) -> u64 {
        *self = Self { begun: self.begun + 1, goes_on: true, until: None };
        self.begun
    }

    /// Whether that is the end of the one under way.
    pub(super) fn ends(&mut self, number: u64) -> bool {
        self.begun == number && std::mem::take(&mut self.goes_on)
    }

    /// Whether the one under way is not to be waited for any longer. It is not under way then.
    pub(super) fn is_overdue(&mut self) -> bool {
        let is_late = self.until.is_some_and(|until| until <= Instant::now());
        is_late && std::mem::take(&mut self.goes_on)
    }
}

/// What is there of the VM.
#[derive(Default)]
pub(super) struct Vm {
    checked: Option<Checked>,
    pub(super) memory: Option<HostMemory>,
    /// What came to map it from.
    pub(super) files: Vec<OwnedFd>,
    /// The control thread has it.
    handed_over: bool,
}

impl Driver {
    pub(super) fn step(&mut self, step: DestinationStep) {
        let result = match step {
            DestinationStep::Check(config) => return self.check(config),
            DestinationStep::Build => return self.build(),
            DestinationStep::Restore(state) => match self.arrival(&state) {
                Ok(arrival) => {
                    self.vm.handed_over = true;
                    return (self.desk)(ReceiveStep::Restore(Box::new(arrival)));
                }
                Err(fault) => Err(fault),
            },
            DestinationStep::TakeLocks => return (self.desk)(ReceiveStep::TakeLocks),
            DestinationStep::Run => match self.filling.leave() {
                Ok(()) => return (self.desk)(ReceiveStep::Run(self.to_come())),
                Err(fault) => Err(fault),
            },
            DestinationStep::MapMemory(ranges) => return self.map(&ranges),
        };
        self.answer(result);
    }

    pub(super) fn undo(&mut self, undo: DestinationUndo) {
        match undo {
            DestinationUndo::Discard => {
                self.ground.close();
                self.ground.refuse_files();
                self.ground.follow(None);
                self.filling = Filling::default();
                let handed_over = std::mem::take(&mut self.vm).handed_over;
                if handed_over {
                    return (self.desk)(ReceiveStep::Discard);
                }
                self.answer(Ok(()));
            }
            DestinationUndo::ReleaseLocks => (self.desk)(ReceiveStep::ReleaseLocks),
        }
    }

    /// The answer to a step that is done here. Its actions come after those that are there.
    pub(super) fn answer(&mut self, result: Result<(), Fault>) {
        let now = self.clock.now();
        if let Some(live) = &mut self.live {
            live.machine.handle(now, input(result));
        }
    }

    /// Looks whether a VM of this configuration can run here.
    fn check(&mut self, config: Vec<u8>) {
        let (spec, host) = (self.spec.clone(), self.host.clone());
        let Some(hello) = self.hello().cloned() else {
            return self.answer(Err(Fault::new(Reason::Violation, "no Hello")));
        };
        self.make(move || Made::Checked(fit::check(&spec, &host, &hello, &config).map(Box::new)));
    }

    fn build(&mut self) {
        let (Some(checked), Some(live)) = (&self.vm.checked, &self.live) else {
            return self.answer(Err(Fault::new(Reason::Failed, "there is no configuration")));
        };
        let Some(hello) = live.machine.hello().cloned() else {
            return self.answer(Err(Fault::new(Reason::Violation, "no Hello")));
        };
        let (spec, local) = (checked.spec.clone(), live.is_local());
        self.make(move || Made::Memory(making::memory(&spec, &hello, local)));
    }

    /// Does `work` beside this thread, which hears of its end.
    pub(super) fn make(&mut self, work: impl FnOnce() -> Made + Send + 'static) {
        let (to, number) = (self.to.clone(), self.beside.begin());
        let work = move || drop(to.send(Heard::Made(number, Box::new(work()))));
        if let Err(error) = thread::spawn(&self.threads, THREAD, "migration-make", work) {
            self.beside.ends(number);
            self.answer(Err(Fault::new(Reason::Failed, &format!("a thread: {error}"))));
        }
    }

    /// A step that was to end, and has not for so long, is left to itself: what it gives is dropped.
    pub(super) fn leave_step(&mut self) {
        if self.beside.is_overdue() {
            log::warn!("migration: a step that was given up does not end yet: it is left to itself");
            self.handle(input(Err(Fault::new(Reason::Failed, "it does not end"))));
        }
    }

    pub(super) fn hello(&self) -> Option<&Hello> {
        self.live.as_ref().and_then(|live| live.machine.hello())
    }

    /// A step that may take long has been done.
    pub(super) fn made(&mut self, made: Made) {
        let result = match made {
            Made::Checked(result) => result.map(|checked| self.vm.checked = Some(*checked)),
            Made::Memory(result) => {
                // What was handed over is there.
                let is_local = self.live.as_ref().is_some_and(Live::is_local);
                result.map(|memory| match memory {
                    Some(memory) if is_local => self.vm.memory = Some(memory),
                    Some(memory) => self.land(memory),
                    None => {}
                })
            }
        };
        self.handle(input(result));
    }

    /// The source's memory goes there.
    pub(super) fn land(&mut self, memory: HostMemory) {
        let Some(live) = &self.live else { return };
        let Some(hello) = live.machine.hello() else { return };
        let accept = live.machine.accept();
        let (connections, features) =
            accept.map_or((1, Features::NONE), |accept| (accept.connections, accept.features));
        // What has been allocated could not be told from what came, where some comes after the hand-over.
        let ahead = if features.contains(Features::POST_COPY) {
            None
        } else {
            Ahead::start(&self.threads, Arc::clone(memory.memory()), connections)
                .inspect_err(|error| log::debug!("migration: nothing is allocated ahead: {error}"))
                .ok()
        };
        let (memory_too, layout) = (Arc::clone(memory.memory()), hello.memory.clone());
        self.ground.open(memory_too, layout, (live.connection, connections), features, ahead);
        self.vm.memory = Some(memory);
    }

    /// Maps the memory whose descriptors have come. Nobody writes to it before it is this end's.
    fn map(&mut self, ranges: &[DescriptorRange]) {
        self.ground.refuse_files();
        let files = std::mem::take(&mut self.vm.files);
        let (Some(checked), Some(hello)) = (&self.vm.checked, self.hello()) else {
            return self.answer(Err(Fault::new(Reason::Failed, "there is no configuration")));
        };
        let (spec, bits, pieces) = (checked.spec.clone(), hello.cpu.phys_bits, descriptors::pieces(ranges));
        self.make(move || {
            let failed = |error: &dyn std::error::Error| Fault::new(Reason::Incompatible, &chain(error));
            let zones = machine::zones(&spec).map_err(|error| failed(&error));
            let memory = zones.and_then(|zones| {
                HostMemory::adopt(&zones, bits, files, &pieces).map_err(|error| failed(&error))
            });
            Made::Memory(memory.map(Some))
        });
    }

    fn arrival(&mut self, state: &[u8]) -> Result<Arrival, Fault> {
        // Nothing may write to it any more.
        let absent = self.ground.absent();
        self.ground.close();
        let (Some(checked), Some(memory)) = (self.vm.checked.take(), self.vm.memory.take()) else {
            return Err(Fault::new(Reason::Failed, "there is no memory"));
        };
        let record: Record = minicbor::decode(state)
            .map_err(|error| Fault::new(Reason::Violation, &format!("the state: {error}")))?;
        let records = record.parse().map_err(|error| Fault::new(Reason::Incompatible, &chain(&error)))?;
        self.watch(&memory, &absent)?;
        Ok(Arrival { checked, records, memory })
    }
}

/// A step's result, for the machine.
pub(super) fn input(result: Result<(), Fault>) -> DestinationInput {
    match result {
        Ok(()) => DestinationInput::Done(Output::Nothing),
        Err(fault) => DestinationInput::Failed(fault),
    }
}
