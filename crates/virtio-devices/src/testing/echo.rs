//! The smallest device with a thread: it copies what a chain lets it read into what it lets it write.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vmm_device_model::device::{Blocker, DeviceError, SaveState};
use vmm_device_model::metrics::Metered;
use vmm_snapshot::RecordError;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{DeviceConfig, Start, StartQueue, VirtioDevice};
use crate::transport::{VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1};

const MAX_REQUEST: usize = 64 * 1024;

/// An echo device: two queues, one writable configuration byte at offset 0.
#[derive(Debug, Default)]
pub struct EchoDevice {
    config: Arc<EchoConfig>,
    worker: Option<(JoinHandle<Vec<Queue>>, EventFd)>,
    fail_start: Arc<Mutex<bool>>,
}

#[derive(Debug, Default)]
struct EchoConfig(AtomicU8);

impl EchoDevice {
    /// A device that is not started.
    pub fn new() -> Self {
        Self::default()
    }

    /// A switch that makes the next start fail.
    pub fn failing(&self) -> Arc<Mutex<bool>> {
        Arc::clone(&self.fail_start)
    }
}

impl Metered for EchoDevice {}

impl VirtioDevice for EchoDevice {
    fn device_type(&self) -> u32 {
        // No device has this ID (virtio 1.3, section 5: 63 is the highest that was thought of).
        0x3f
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 16]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::clone(&self.config) as _
    }

    fn start(&mut self, start: Start) -> Result<(), DeviceError> {
        if std::mem::take(&mut *self.fail_start.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Err(DeviceError::new("told to fail"));
        }
        let failed = |e: std::io::Error| DeviceError::caused("cannot start the worker", e);
        let stop = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        let epoll = Epoll::new().map_err(failed)?;
        let watch = |event: &EventFd, token| {
            let fd = event.as_raw_fd();
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).map_err(failed)
        };
        watch(&stop, u64::MAX)?;
        for queue in &start.queues {
            watch(&queue.kick, queue.index.into())?;
        }
        let mine = stop.try_clone().map_err(failed)?;
        let worker = std::thread::Builder::new().name("echo".to_owned());
        // `stop` stays open in the thread, for epoll watches it.
        let worker = worker.spawn(move || work(start, &epoll, &stop)).map_err(failed)?;
        self.worker = Some((worker, mine));
        Ok(())
    }

    fn stop_begin(&mut self) {
        if let Some((_, stop)) = &self.worker {
            // A full counter is a signal already.
            drop(stop.write(1));
        }
    }

    fn stop_finish(&mut self, _: Instant) -> Result<Vec<Queue>, DeviceError> {
        // Nothing outlasts one chain, so there is no deadline to miss.
        let (worker, _) = self.worker.take().ok_or_else(|| DeviceError::new("not started"))?;
        worker.join().map_err(|_| DeviceError::new("the worker is gone"))
    }

    fn reset(&mut self) {
        self.config.0.store(0, Ordering::Relaxed);
    }

    fn blockers(&self) -> Vec<Blocker> {
        Vec::new()
    }
}

fn work(mut start: Start, epoll: &Epoll, _stop: &EventFd) -> Vec<Queue> {
    for at in 0..start.queues.len() {
        echo(&mut start, at);
    }
    let mut events = [EpollEvent::default(); 8];
    'work: loop {
        let count = epoll.wait(-1, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() == u64::MAX {
                break 'work;
            }
            let index = start.queues.iter().position(|q| u64::from(q.index) == event.data());
            if let Some(at) = index {
                echo(&mut start, at);
            }
        }
    }
    start.queues.into_iter().map(|q| q.queue).collect()
}

fn echo(start: &mut Start, at: usize) {
    let Some(StartQueue { index, queue, kick }) = start.queues.get_mut(at) else { return };
    // Empty when this is the look at the start.
    drop(kick.read());
    loop {
        let view = start.memory.view();
        let mut served = false;
        while let Some(chain) = queue.pop_descriptor_chain(view.clone()) {
            served = true;
            let head = chain.head_index();
            let written = match (chain.clone().reader(&*view), chain.writer(&*view)) {
                (Ok(reader), Ok(mut writer)) => {
                    let room = writer.available_bytes().min(MAX_REQUEST);
                    let mut data = Vec::new();
                    let read = reader.take(room as u64).read_to_end(&mut data);
                    read.and_then(|_| writer.write_all(&data)).map_or(0, |()| data.len())
                }
                _ => 0,
            };
            let used = queue.add_used(&*view, head, written as u32);
            if used.is_ok() && queue.needs_notification(&*view).unwrap_or(true) {
                start.interrupt.queue(*index);
            }
        }
        // True if more came meanwhile, and for ever if the driver's index makes no sense.
        let more = queue.enable_notification(&*view).unwrap_or(false);
        if !more || !served {
            return;
        }
    }
}

impl DeviceConfig for EchoConfig {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = self.0.load(Ordering::Relaxed);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(first)) = (offset, data.first()) {
            self.0.store(*first, Ordering::Relaxed);
        }
    }
}

impl SaveState for EchoDevice {
    type State = EchoV1;

    fn save(&self) -> EchoV1 {
        let Self { config, worker: _, fail_start: _ } = self;
        EchoV1 { config: config.0.load(Ordering::Relaxed) }
    }

    fn restore(&mut self, state: EchoV1) -> Result<(), RecordError> {
        self.config.0.store(state.config, Ordering::Relaxed);
        Ok(())
    }
}

/// Saved state of an [`EchoDevice`].
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct EchoV1 {
    /// Its configuration byte.
    #[n(0)]
    pub config: u8,
}

vmm_snapshot::schema!(EchoV1: "virtio-echo" v1);
