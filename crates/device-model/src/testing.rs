//! Stand-ins for tests: resources without a VM, interrupts that count, a bus that fuzzes, and the
//! save-reset-restore harness that every device passes.
//!
//! Part of the public interface, so that a device crate of another project can use it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;
use vmm_snapshot::Record;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{Bus, BusTarget, Mapping};
use crate::device::{Attention, VmDevice};
use crate::dma::{DmaMemory, GuestRam};
use crate::doorbell::{DoorbellAddress, Doorbells};
use crate::interrupt::{InterruptLine, MsiMessage, MsiSource, MsiVectors};
use crate::recipe::{BuildError, Resources};
use crate::thread::{ThreadHook, Unconfined};

/// A line that counts its edges.
#[derive(Debug, Default)]
pub struct TestLine {
    state: Mutex<(bool, u64)>,
}

impl TestLine {
    /// The level now.
    pub fn level(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Changes from deasserted to asserted so far.
    pub fn edges(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

impl InterruptLine for TestLine {
    fn set(&self, asserted: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if asserted && !state.0 {
            state.1 += 1;
        }
        state.0 = asserted;
    }
}

/// Vectors that remember their routes and count their interrupts.
#[derive(Debug)]
pub struct TestVectors {
    /// Per vector: its route, and how often it was raised while it had one.
    pub vectors: Mutex<Vec<(Option<MsiMessage>, u64)>>,
    events: Vec<EventFd>,
}

impl TestVectors {
    /// `count` vectors without a route.
    ///
    /// # Errors
    /// No descriptors could be had.
    pub fn new(count: u16) -> io::Result<Self> {
        let events = (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        Ok(Self { vectors: Mutex::new(vec![(None, 0); usize::from(count)]), events })
    }

    /// How often vector `index` was raised while it had a route.
    pub fn raised(&self, index: u16) -> u64 {
        let vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        vectors.get(usize::from(index)).map_or(0, |v| v.1)
    }
}

fn no_vector(index: u16) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("no vector {index}"))
}

impl MsiVectors for TestVectors {
    fn count(&self) -> u16 {
        u16::try_from(self.events.len()).unwrap_or(u16::MAX)
    }

    fn set_routes(&self, routes: &[(u16, Option<MsiMessage>)]) -> io::Result<()> {
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        // All or nothing, as the trait promises.
        let mut changed = vectors.clone();
        for (index, route) in routes {
            changed.get_mut(usize::from(*index)).ok_or_else(|| no_vector(*index))?.0 = *route;
        }
        *vectors = changed;
        Ok(())
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        let vector = vectors.get_mut(usize::from(index)).ok_or_else(|| no_vector(index))?;
        if vector.0.is_some() {
            vector.1 += 1;
        }
        Ok(())
    }

    fn event(&self, index: u16) -> io::Result<EventFd> {
        self.events.get(usize::from(index)).ok_or_else(|| no_vector(index))?.try_clone()
    }
}

/// Gives [`TestVectors`] out and keeps them for inspection.
#[derive(Debug, Default)]
pub struct TestMsi {
    /// All blocks given out so far.
    pub blocks: Mutex<Vec<Arc<TestVectors>>>,
}

impl MsiSource for TestMsi {
    fn allocate(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>> {
        let block = Arc::new(TestVectors::new(count)?);
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&block));
        Ok(block)
    }
}

/// Doorbells that only remember where they are.
#[derive(Debug, Default)]
pub struct TestDoorbells {
    /// Addresses with a doorbell and a clone of its eventfd.
    pub attached: Mutex<Vec<(DoorbellAddress, EventFd)>>,
}

impl Doorbells for TestDoorbells {
    fn attach(&self, address: DoorbellAddress, event: &EventFd) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if attached.iter().any(|(a, _)| *a == address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        attached.push((address, event.try_clone()?));
        Ok(())
    }

    fn detach(&self, address: DoorbellAddress, _: &EventFd) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let at = attached.iter().position(|(a, _)| *a == address).ok_or(io::ErrorKind::NotFound)?;
        attached.remove(at);
        Ok(())
    }
}

/// Counts its requests.
#[derive(Debug, Default)]
pub struct TestAttention(Mutex<u64>);

impl TestAttention {
    /// Requests since the last call.
    pub fn take(&self) -> u64 {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Attention for TestAttention {
    fn request(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }
}

/// Resources without a VM.
#[derive(Debug)]
pub struct TestResources {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Lines given out, by GSI.
    pub lines: Vec<(u32, Arc<TestLine>)>,
    /// MSI vectors given out.
    pub msi: Arc<TestMsi>,
    /// Guest memory.
    pub memory: DmaMemory,
    /// The device's calls for the control thread.
    pub attention: Arc<TestAttention>,
    /// What the device's threads go through.
    pub threads: Arc<dyn ThreadHook>,
}

impl TestResources {
    /// With `size` bytes of guest memory at address 0.
    ///
    /// # Errors
    /// The memory could not be mapped.
    pub fn new(size: usize) -> io::Result<Self> {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), size)]).map_err(io::Error::other)?;
        Ok(Self {
            pio: Arc::default(),
            mmio: Arc::default(),
            lines: Vec::new(),
            msi: Arc::default(),
            memory: DmaMemory::new(memory),
            attention: Arc::default(),
            threads: Arc::new(Unconfined),
        })
    }
}

impl Resources for TestResources {
    fn map_pio(
        &mut self,
        base: u16,
        len: u16,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError> {
        let mapping = Mapping { base: base.into(), len: len.into(), target, region };
        Ok(self.pio.update(|map| map.insert(mapping))?)
    }

    fn map_mmio(
        &mut self,
        base: u64,
        len: u64,
        target: Arc<dyn BusTarget>,
        region: u16,
    ) -> Result<(), BuildError> {
        Ok(self.mmio.update(|map| map.insert(Mapping { base, len, target, region }))?)
    }

    fn interrupt_line(&mut self, gsi: u32) -> Result<Arc<dyn InterruptLine>, BuildError> {
        let line = Arc::new(TestLine::default());
        self.lines.push((gsi, Arc::clone(&line)));
        Ok(line)
    }

    fn msi_vectors(&mut self, count: u16) -> Result<Arc<dyn MsiVectors>, BuildError> {
        self.msi.allocate(count).map_err(|source| BuildError::Io { what: "allocate MSI vectors", source })
    }

    fn dma(&self) -> DmaMemory {
        self.memory.clone()
    }

    fn attention(&self) -> Arc<dyn Attention> {
        Arc::clone(&self.attention) as _
    }

    fn threads(&self) -> Arc<dyn ThreadHook> {
        Arc::clone(&self.threads)
    }
}

/// Quiesces and saves `device`, resets it, restores what was saved, saves again; the two records must be
/// equal. Leaves the device running. The error says what differs.
///
/// # Errors
/// A step failed, or the second record differs from the first.
pub fn save_reset_restore(device: &mut dyn VmDevice) -> Result<Record, String> {
    let step = |what: &str, e: &dyn std::error::Error| format!("{what}: {e}");
    device.quiesce_begin();
    device.quiesce_finish(Instant::now() + Duration::from_secs(10)).map_err(|e| step("quiesce", &e))?;
    let first = device.save_record();
    device.reset().map_err(|e| step("reset", &e))?;
    device.restore_record(&first).map_err(|e| step("restore", &e))?;
    let second = device.save_record();
    if first != second {
        return Err(format!("state changed by reset and restore: {first:?} became {second:?}"));
    }
    device.resume().map_err(|e| step("resume", &e))?;
    Ok(first)
}

/// Reads and writes `target`'s region of `len` bytes at every offset and width with `rounds` rounds of
/// seeded pseudo-random data: what a guest can do to it. The test is that it returns.
pub fn fuzz_registers(target: &dyn BusTarget, region: u16, len: u64, rounds: u32, seed: u64) {
    let mut random = Xorshift::new(seed);
    for round in 0..rounds {
        for offset in 0..len {
            for width in [1_usize, 2, 3, 4, 5, 8, 16] {
                if offset + width as u64 > len {
                    continue;
                }
                let mut data = random.next().to_le_bytes().repeat(2);
                data.truncate(width);
                // The first round reads only: power-on values must be readable, too.
                if round > 0 && random.next().is_multiple_of(3) {
                    target.write(region, offset, &data);
                } else {
                    target.read(region, offset, &mut data);
                }
            }
        }
    }
}

/// A small seeded generator (Marsaglia's xorshift64), equal on every machine.
#[derive(Debug, Clone)]
pub struct Xorshift(u64);

impl Xorshift {
    /// From a seed; 0 is replaced, for it would stay 0.
    pub fn new(seed: u64) -> Self {
        Self(if seed == 0 { 0x9e37_79b9_7f4a_7c15 } else { seed })
    }

    /// The next 64 bits.
    #[expect(clippy::should_implement_trait, reason = "an endless generator is no useful iterator here")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
