//! The host's side of a console: what is typed, and the size of the window.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{DeviceConfig, VirtioInterrupt};

/// Most bytes typed ahead.
pub(super) const INPUT_CAPACITY: usize = 64 * 1024;

/// Bytes of the configuration space: columns, rows, ports, emergency write (virtio 1.3, section 5.3.4).
const CONFIG_LEN: usize = 12;

/// The host's handle on a console. Clones are the same console; calls never block.
#[derive(Clone)]
pub struct ConsoleInput {
    shared: Arc<Shared>,
}

struct Shared {
    typed: Mutex<Typed>,
    /// Told when there is room again for who was refused.
    on_room: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Signalled when something was typed.
    event: EventFd,
    driver: Mutex<Driver>,
}

/// What the driver has not got yet.
#[derive(Default)]
struct Typed {
    bytes: VecDeque<u8>,
    /// Not everything was taken, and nobody was told of room since.
    refused: bool,
}

/// The size, and who is told about it. One lock for both: a driver that read a part of the old size and a part of the
/// new one finds another generation afterwards (virtio 1.3, section 4.1.4.3.1).
struct Driver {
    /// Columns in the upper half, rows in the lower.
    size: u32,
    /// While the device runs.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// The size changed while it did not.
    missed: bool,
}

impl ConsoleInput {
    pub(super) fn new(columns: u16, rows: u16) -> io::Result<Self> {
        let shared = Shared {
            typed: Mutex::default(),
            on_room: OnceLock::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
            driver: Mutex::new(Driver { size: pack(columns, rows), interrupt: None, missed: false }),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Types `bytes` as far as there is room. Returns how many were taken; see
    /// [`ConsoleDevice::on_room`](super::ConsoleDevice::on_room) for when to try again.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut typed = lock(&self.shared.typed);
        let taken = bytes.len().min(INPUT_CAPACITY.saturating_sub(typed.bytes.len()));
        typed.bytes.extend(bytes.iter().take(taken));
        typed.refused |= taken < bytes.len();
        drop(typed);
        if taken > 0 {
            // A full counter is a signal already.
            drop(self.shared.event.write(1));
        }
        taken
    }

    /// Bytes that [`enqueue`](Self::enqueue) would take now.
    pub fn room(&self) -> usize {
        INPUT_CAPACITY.saturating_sub(lock(&self.shared.typed).bytes.len())
    }

    /// Changes the size of the window, and tells the driver, now or when it runs again.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = pack(columns, rows);
        let mut driver = lock(&self.shared.driver);
        if std::mem::replace(&mut driver.size, size) == size {
            return;
        }
        match &driver.interrupt {
            Some(interrupt) => interrupt.config_changed(),
            None => driver.missed = true,
        }
    }

    /// Columns and rows of the window.
    pub fn size(&self) -> (u16, u16) {
        let size = lock(&self.shared.driver).size;
        ((size >> 16) as u16, size as u16)
    }

    /// Only the first call counts.
    pub(super) fn on_room(&self, tell: Box<dyn Fn() + Send + Sync>) {
        self.shared.on_room.get_or_init(|| tell);
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.shared.typed).bytes.is_empty()
    }

    /// Copies what was typed first, as far as it goes. Returns how much.
    pub(super) fn peek(&self, to: &mut [u8]) -> usize {
        let typed = lock(&self.shared.typed);
        let count = to.len().min(typed.bytes.len());
        for (to, from) in to.iter_mut().zip(&typed.bytes) {
            *to = *from;
        }
        count
    }

    /// The driver got the first `count` bytes.
    pub(super) fn forget(&self, count: usize) {
        self.change(|bytes| drop(bytes.drain(..count.min(bytes.len()))));
    }

    /// All that was typed.
    pub(super) fn save(&self) -> Vec<u8> {
        lock(&self.shared.typed).bytes.iter().copied().collect()
    }

    /// Takes over what [`save`](Self::save) gave, and the size. The driver may have seen another one.
    pub(super) fn restore(&self, columns: u16, rows: u16, saved: Vec<u8>) {
        self.resize(columns, rows);
        lock(&self.shared.driver).missed = true;
        self.change(|bytes| *bytes = saved.into());
    }

    /// Takes bytes away, and tells who was refused once half the ring is free: drivers read in bursts.
    fn change(&self, change: impl FnOnce(&mut VecDeque<u8>)) {
        let mut typed = lock(&self.shared.typed);
        change(&mut typed.bytes);
        let tell = typed.refused && typed.bytes.len() <= INPUT_CAPACITY / 2;
        typed.refused &= !tell;
        drop(typed);
        if let (true, Some(on_room)) = (tell, self.shared.on_room.get()) {
            on_room();
        }
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// The driver runs, and wants to know about the size.
    pub(super) fn attach(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        let mut driver = lock(&self.shared.driver);
        if std::mem::take(&mut driver.missed) {
            interrupt.config_changed();
        }
        driver.interrupt = Some(interrupt);
    }

    /// The driver does not run.
    pub(super) fn detach(&self) {
        lock(&self.shared.driver).interrupt = None;
    }
}

impl DeviceConfig for ConsoleInput {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size();
        let size = u32::from(rows) << 16 | u32::from(columns);
        let space = size.to_le_bytes().into_iter().chain([0; CONFIG_LEN - 4]);
        // Past the end there is nothing to copy.
        let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_LEN);
        for (to, from) in data.iter_mut().zip(space.skip(skip)) {
            *to = from;
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

impl fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleInput").field("size", &self.size()).finish_non_exhaustive()
    }
}

fn pack(columns: u16, rows: u16) -> u32 {
    u32::from(columns) << 16 | u32::from(rows)
}

/// Nothing in this module panics with a lock held in a state that does not hold together.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
