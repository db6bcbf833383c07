//! The back: a virtio-pci device as the thread that owns the VM sees it.

use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vmm_device_model::device::{Attention, Blocker, DeviceChange, DeviceError, Lifecycle, SaveState};
use vmm_device_model::dma::DmaMemory;
use vmm_device_model::limiter::Limiter;
use vmm_device_model::metrics::{Family, Kind, Measures, Metered, Value};
use vmm_device_model::thread::ThreadHook;
use vmm_pci::bdf::Bdf;
use vmm_pci::host_bridge::Attachment;
use vmm_snapshot::RecordError;

use super::VIRTIO_F_EVENT_IDX;
use super::front::Front;
use super::phase::{Event, Phase};
use super::state::VirtioPciV1;
use crate::device::{Start, StartQueue, VirtioDevice, VirtioInterrupt};

/// How long the thread that owns the VM waits in one go for a device that a driver resets, or whose quiescing
/// was given up.
const STOP_SLICE: Duration = Duration::from_millis(50);

/// Changes that wait to be taken; a driver that is faster is not told of further.
const MOST_CHANGES: usize = 64;

/// A virtio device on a PCI bus. Made by [`VirtioPciRecipe`](super::VirtioPciRecipe).
#[derive(Debug)]
pub struct VirtioPci {
    id: String,
    device: Box<dyn VirtioDevice>,
    front: Arc<Mutex<Front>>,
    attachment: Attachment,
    host: Host,
    threads: Threads,
    /// The VM is paused: what a driver asked for waits until it resumes.
    quiesced: bool,
    /// The driver has not been interrupted since a restore.
    restored: bool,
    slow_stop: Limiter,
    /// A driver set the device up, and did not reset it since.
    active: bool,
    changes: Vec<DeviceChange>,
}

/// What a device works with, whatever its driver does.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) memory: DmaMemory,
    pub(super) attention: Arc<dyn Attention>,
    /// What the device's threads go through.
    pub(super) threads: Arc<dyn ThreadHook>,
}

/// Who has the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Threads {
    /// The front, as numbers.
    Idle,
    /// The device.
    Started,
    /// The device, which was told to give them back.
    Stopping,
}

impl VirtioPci {
    pub(super) fn new(
        id: String,
        device: Box<dyn VirtioDevice>,
        front: Arc<Mutex<Front>>,
        attachment: Attachment,
        host: Host,
    ) -> Self {
        Self {
            id,
            device,
            front,
            attachment,
            host,
            threads: Threads::Idle,
            quiesced: false,
            restored: false,
            slow_stop: Limiter::for_guest(),
            active: false,
            changes: Vec::new(),
        }
    }

    /// Where the function is.
    pub fn bdf(&self) -> Bdf {
        self.attachment.bdf()
    }

    /// Where the device is between its driver and its threads.
    pub fn phase(&self) -> Phase {
        self.front().common.phase
    }

    /// Whether the device has its queues and works.
    pub fn is_started(&self) -> bool {
        self.threads == Threads::Started
    }

    fn front(&self) -> MutexGuard<'_, Front> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the device's threads where the phase says, however often the driver changes it meanwhile.
    fn follow(&mut self) -> Result<(), DeviceError> {
        loop {
            let phase = self.phase();
            match (phase, self.threads) {
                (Phase::Starting | Phase::Running, Threads::Idle) => self.start()?,
                (Phase::Running, Threads::Stopping)
                | (Phase::Resetting, Threads::Started | Threads::Stopping) => {
                    self.begin_stop();
                    self.finish_stop(Instant::now() + STOP_SLICE)?;
                }
                (Phase::Resetting, Threads::Idle) => {
                    self.device.reset();
                    {
                        let mut front = self.front();
                        front.driver_reset();
                        front.common.advance(Event::ResetDone);
                    }
                    if std::mem::take(&mut self.active) {
                        self.note(DeviceChange::Reset);
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    /// As [`follow`](Self::follow); if the device takes its time to stop, goes on at the next service. Others'
    /// requests come first.
    fn follow_or_later(&mut self) -> Result<(), DeviceError> {
        match self.follow() {
            Err(e) if self.threads == Threads::Stopping || self.phase() == Phase::Resetting => {
                if let Some(admitted) = self.slow_stop.admit(Instant::now()) {
                    log::warn!(device = self.id.as_str(); "the device takes long to stop: {e}{admitted}");
                }
                self.host.attention.request();
                Ok(())
            }
            done => done,
        }
    }

    /// Gives the device its queues, from a copy of what the driver wrote; no lock is held.
    fn start(&mut self) -> Result<(), DeviceError> {
        let started = self.frozen().and_then(|start| self.device.start(start));
        let event = match started {
            Ok(()) => {
                self.threads = Threads::Started;
                Event::Started
            }
            Err(_) => Event::StartFailed,
        };
        let (before, interrupt) = {
            let mut front = self.front();
            let before = front.common.phase;
            front.common.advance(event);
            (before, (front.common.phase == Phase::Failed).then(|| Arc::clone(&front.interrupt)))
        };
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
            self.note(DeviceChange::NeedsReset);
        } else if started.is_ok() {
            self.active = true;
            // Of a device that ran before a pause there is nothing to tell.
            if before == Phase::Starting {
                self.note(DeviceChange::Activated);
            }
        }
        started.map_err(|e| DeviceError::caused(format!("virtio device {} does not start", self.id), e))
    }

    fn frozen(&self) -> Result<Start, DeviceError> {
        let front = self.front();
        let features = front.common.agreed();
        let view = self.host.memory.view();
        let mut queues = Vec::new();
        let configured = (0_u16..).zip(&front.common.queues).zip(&front.kicks);
        for ((index, config), kick) in configured.filter(|((_, config), _)| config.enabled) {
            let queue = config
                .build(&view, features & VIRTIO_F_EVENT_IDX != 0)
                .map_err(|e| DeviceError::caused(format!("virtqueue {index} is impossible"), e))?;
            let kick =
                kick.try_clone().map_err(|e| DeviceError::caused("cannot clone an eventfd".to_owned(), e))?;
            queues.push(StartQueue { index, queue, kick });
        }
        let interrupt = Arc::clone(&front.interrupt) as _;
        let Host { memory, threads, .. } = &self.host;
        Ok(Start { memory: memory.clone(), features, queues, interrupt, threads: Arc::clone(threads) })
    }

    fn note(&mut self, change: DeviceChange) {
        if self.changes.len() < MOST_CHANGES {
            self.changes.push(change);
        }
    }

    fn begin_stop(&mut self) {
        if self.threads == Threads::Started {
            self.device.stop_begin();
            self.threads = Threads::Stopping;
        }
    }

    fn finish_stop(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        if self.threads == Threads::Stopping {
            let queues = self.device.stop_finish(deadline)?;
            self.threads = Threads::Idle;
            self.keep_positions(&queues);
        }
        Ok(())
    }

    /// Writes down where the device was in each ring.
    fn keep_positions(&self, queues: &[Queue]) {
        let mut front = self.front();
        let enabled = front.common.queues.iter_mut().filter(|config| config.enabled);
        for (config, queue) in enabled.zip(queues) {
            (config.next_available, config.next_used) = (queue.next_avail(), queue.next_used());
        }
    }
}

static INTERRUPTS: Family = Family {
    name: "vmm_virtio_interrupts",
    help: "Interrupts from a virtqueue to its driver.",
    unit: "",
    kind: Kind::Counter,
};

impl Metered for VirtioPci {
    fn measure(&self, measures: &mut Measures) {
        self.device.measure(measures);
        let interrupt = Arc::clone(&self.front().interrupt);
        for (queue, raised) in interrupt.raised().enumerate() {
            measures.sample(&INTERRUPTS, &[("queue", &queue.to_string())], Value::Counter(raised));
        }
    }
}

impl Lifecycle for VirtioPci {
    fn service(&mut self) -> Result<(), DeviceError> {
        if self.quiesced {
            return Ok(());
        }
        self.follow_or_later()
    }

    fn quiesce_begin(&mut self) {
        self.quiesced = true;
        self.begin_stop();
    }

    fn quiesce_finish(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        self.finish_stop(deadline)
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.quiesced = false;
        let starts = self.phase() == Phase::Starting;
        let followed = self.follow_or_later();
        if std::mem::take(&mut self.restored) && self.threads == Threads::Started {
            // An interrupt may have been on its way when the state was saved. A driver that finds nothing goes on.
            let interrupt = Arc::clone(&self.front().interrupt);
            interrupt.interrupt_all();
        }
        match followed {
            // What the driver asked for just before the pause, and its mistake: its status register tells.
            Err(error) if starts => {
                let cause = error.source().map(ToString::to_string).unwrap_or_default();
                log::warn!(device = self.id.as_str(); "{error}: {cause}");
                Ok(())
            }
            done => done,
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        if self.threads != Threads::Idle {
            return Err(DeviceError::new(format!("virtio device {} is not quiesced", self.id)));
        }
        self.device.reset();
        (self.active, self.restored) = (false, false);
        self.front().power_on();
        self.attachment.sync_bars();
        Ok(())
    }

    fn blockers(&self) -> Vec<Blocker> {
        self.device.blockers()
    }

    fn take_changes(&mut self) -> Vec<DeviceChange> {
        std::mem::take(&mut self.changes)
    }
}

impl SaveState for VirtioPci {
    type State = VirtioPciV1;

    fn save(&self) -> VirtioPciV1 {
        self.front().save(self.device.device_type(), self.device.save_record())
    }

    fn restore(&mut self, state: VirtioPciV1) -> Result<(), RecordError> {
        if self.threads != Threads::Idle {
            return Err(RecordError::invalid::<VirtioPciV1>("the device is running"));
        }
        self.quiesced = true;
        self.front().restore(self.device.device_type(), &state, &self.host.memory)?;
        self.device.restore_record(&state.device)?;
        self.attachment.sync_bars();
        self.restored = true;
        Ok(())
    }
}
