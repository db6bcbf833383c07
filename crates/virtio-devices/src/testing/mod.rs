//! A driver in this process, for the tests and benchmarks of devices: it negotiates, sets queues up in guest
//! memory, submits chains, kicks, and reads used rings, all through the buses as a guest would.
//!
//! Part of the public interface, so that a device crate of another project can use it.

mod echo;
mod hostile;
mod ring;

use std::io;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::device::Lifecycle;
use vmm_device_model::dma::DmaMemory;
use vmm_pci::testing::TestPciResources;
use vmm_sys_util::eventfd::EventFd;

pub use echo::EchoDevice;
pub use hostile::hostile_chains;
use ring::Ring;
pub use ring::{Descriptor, INDIRECT, NEXT, Segment, WRITE};

use crate::device::VirtioDevice;
use crate::transport::layout::{BAR, COMMON, DEVICE, MSIX_TABLE, NOTIFY};
use crate::transport::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use crate::transport::{VIRTIO_F_EVENT_IDX, VirtioPci, VirtioPciRecipe};

/// Guest memory below this is left to the test.
const HEAP: u64 = 0x1_0000;
const COMMAND: u16 = 4;
/// An address at which there is no memory but a window of registers.
const TEST_MMIO: u64 = vmm_pci::testing::TEST_ECAM;
const MEMORY_AND_BUS_MASTER: u16 = 0b110;

/// A virtio-pci device on a bus of its own, and its driver.
#[derive(Debug)]
pub struct TestDriver {
    /// Buses, memory, vectors.
    pub resources: TestPciResources,
    /// The device as the thread that owns the VM sees it.
    pub device: VirtioPci,
    bar: u64,
    features: u64,
    rings: Vec<Ring>,
    next_free: u64,
}

impl TestDriver {
    /// Puts `device` on a bus, next to `memory` bytes of guest memory, with memory decoding and
    /// MSI-X on: vector 0 for the configuration, vector `i + 1` for queue `i`.
    ///
    /// # Errors
    /// The device could not be built, or does not look like a virtio-pci function.
    pub fn new(device: Box<dyn VirtioDevice>, memory: usize) -> io::Result<Self> {
        let mut resources = TestPciResources::new(memory)?;
        let recipe = VirtioPciRecipe { id: "test".to_owned(), device, slot: None };
        let device = recipe.build_pci(&mut resources).map_err(io::Error::other)?;
        let mut driver = Self { resources, device, bar: 0, features: 0, rings: Vec::new(), next_free: HEAP };
        driver.probe()?;
        Ok(driver)
    }

    /// Turns memory decoding and MSI-X on, and looks where the BAR is: after power-on, after a restore.
    ///
    /// # Errors
    /// The BAR is not mapped, or there is no MSI-X.
    pub fn probe(&mut self) -> io::Result<()> {
        let bdf = self.device.bdf();
        self.resources.config_write(bdf, COMMAND, &MEMORY_AND_BUS_MASTER.to_le_bytes());
        let mut bar = [0; 8];
        self.resources.config_read(bdf, 0x10, &mut bar);
        self.bar = u64::from_le_bytes(bar) & !0xf;
        let msix = self.capability(0x11).ok_or(io::ErrorKind::NotFound)?;
        let mut control = [0; 2];
        self.resources.config_read(bdf, msix + 2, &mut control);
        let count = u16::from_le_bytes(control) & 0x7ff;
        for vector in 0..=count {
            let entry = u64::from(MSIX_TABLE) + 16 * u64::from(vector);
            self.write(entry, &0xfee0_0000_u64.to_le_bytes());
            self.write(entry + 8, &(0x20 + u32::from(vector)).to_le_bytes());
            self.write(entry + 12, &0_u32.to_le_bytes());
        }
        self.resources.config_write(bdf, msix + 2, &0x8000_u16.to_le_bytes());
        Ok(())
    }

    /// Offset of the first capability with this ID.
    pub fn capability(&self, id: u8) -> Option<u16> {
        let bdf = self.device.bdf();
        let mut at = [0; 2];
        self.resources.config_read(bdf, 0x34, &mut at);
        let [mut next, _] = at;
        // A list cannot have more entries than fit.
        for _ in 0..48 {
            if next == 0 {
                return None;
            }
            self.resources.config_read(bdf, next.into(), &mut at);
            let [found, link] = at;
            if found == id {
                return Some(next.into());
            }
            next = link;
        }
        None
    }

    /// From nothing to a running device: reset, negotiate `wanted` as far as offered, set up and enable all
    /// queues at their largest size, DRIVER_OK. Returns the features agreed on.
    ///
    /// # Errors
    /// The device does not take the features, or does not start.
    pub fn start(&mut self, wanted: u64) -> io::Result<u64> {
        self.reset()?;
        let features = self.negotiate(wanted)?;
        for queue in 0..self.queue_count() {
            self.set_up_queue(queue, None)?;
        }
        self.driver_ok()?;
        Ok(features)
    }

    /// Writes status 0 and lets the device do it.
    ///
    /// # Errors
    /// The status is not 0 afterwards.
    pub fn reset(&mut self) -> io::Result<()> {
        self.set_status(0);
        self.service()?;
        self.rings.clear();
        (self.next_free, self.features) = (HEAP, 0);
        if self.status() == 0 { Ok(()) } else { Err(io::Error::other("reset is not done")) }
    }

    /// Up to FEATURES_OK, with those of `wanted` that are offered. Returns them.
    ///
    /// # Errors
    /// The device refuses them.
    pub fn negotiate(&mut self, wanted: u64) -> io::Result<u64> {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let features = self.offered() & wanted;
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            return Err(io::Error::other(format!("features {features:#x} are refused")));
        }
        self.features = features;
        Ok(features)
    }

    /// Features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(COMMON, &select.to_le_bytes());
            u64::from(self.read_u32(COMMON + 4))
        };
        half(0) | half(1) << 32
    }

    /// Writes the driver's features.
    pub fn accept(&self, features: u64) {
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(COMMON + 8, &select.to_le_bytes());
            self.write(COMMON + 12, &half.to_le_bytes());
        }
    }

    /// How many queues the device has.
    pub fn queue_count(&self) -> u16 {
        self.read_u16(COMMON + 18)
    }

    /// Makes a queue of `size` descriptors, or as many as the device takes, and enables it. Queues are set
    /// up in order.
    ///
    /// # Errors
    /// Guest memory is full.
    pub fn set_up_queue(&mut self, queue: u16, size: Option<u16>) -> io::Result<()> {
        self.write(COMMON + 22, &queue.to_le_bytes());
        let size = size.unwrap_or_else(|| self.read_u16(COMMON + 24));
        let bytes = usize::from(size);
        let (descriptors, available) = (self.allocate(16 * bytes, 16)?, self.allocate(6 + 2 * bytes, 2)?);
        let used = self.allocate(6 + 8 * bytes, 4)?;
        self.write(COMMON + 24, &size.to_le_bytes());
        self.write(COMMON + 26, &(queue + 1).to_le_bytes());
        for (offset, address) in [(32, descriptors), (40, available), (48, used)] {
            self.write(COMMON + offset, &(address as u32).to_le_bytes());
            self.write(COMMON + offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(COMMON + 28, &1_u16.to_le_bytes());
        let event_index = self.features & VIRTIO_F_EVENT_IDX != 0;
        let kick = self.doorbell(queue)?;
        let ring = Ring::new(self.memory(), size, [descriptors, available, used], kick, event_index);
        self.rings.push(ring.map_err(io::Error::other)?);
        Ok(())
    }

    /// Sets DRIVER_OK, with the configuration's vector, and lets the device start.
    ///
    /// # Errors
    /// The device does not start.
    pub fn driver_ok(&mut self) -> io::Result<()> {
        self.write(COMMON + 16, &0_u16.to_le_bytes());
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.service()?;
        match self.status() {
            status if status & DRIVER_OK == 0 => Err(io::Error::other("DRIVER_OK is refused")),
            status if status & NEEDS_RESET != 0 => Err(io::Error::other("the device needs a reset")),
            _ => Ok(()),
        }
    }

    /// What the thread that owns the VM does when the device asked for it.
    ///
    /// # Errors
    /// As [`Lifecycle::service`].
    pub fn service(&mut self) -> io::Result<()> {
        while self.resources.base.attention.take() > 0 {
            self.device.service().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Device status register.
    pub fn status(&self) -> u8 {
        let mut data = [0];
        self.read(COMMON + 20, &mut data);
        let [status] = data;
        status
    }

    /// Writes the device status register.
    pub fn set_status(&self, status: u8) {
        self.write(COMMON + 20, &[status]);
    }

    /// Reads the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.resources.base.mmio.read(self.bar + offset, data);
    }

    /// Writes the BAR.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.resources.base.mmio.write(self.bar + offset, data);
    }

    /// Two bytes of the BAR.
    pub fn read_u16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes of the BAR.
    pub fn read_u32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Reads the device configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.read(DEVICE + offset, data);
    }

    /// Writes the device configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.write(DEVICE + offset, data);
    }

    /// Which BAR the registers are in, and its address.
    pub fn bar(&self) -> (u8, u64) {
        (BAR, self.bar)
    }

    /// Guest memory.
    pub fn memory(&self) -> DmaMemory {
        self.resources.base.memory.clone()
    }

    /// Guest memory for `len` bytes, never given back (but by [`reset`](Self::reset)).
    ///
    /// # Errors
    /// Guest memory is full.
    pub fn allocate(&mut self, len: usize, align: u64) -> io::Result<u64> {
        use vm_memory::{GuestMemory, Permissions};
        let address = self.next_free.next_multiple_of(align);
        if !self.memory().view().check_range(GuestAddress(address), len, Permissions::ReadWrite) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.next_free = address + len as u64;
        Ok(address)
    }

    /// Guest memory that holds `data`.
    ///
    /// # Errors
    /// Guest memory is full.
    pub fn place(&mut self, data: &[u8]) -> io::Result<u64> {
        let address = self.allocate(data.len(), 16)?;
        self.memory().view().write_slice(data, GuestAddress(address)).map_err(io::Error::other)?;
        Ok(address)
    }

    /// `len` bytes of guest memory.
    ///
    /// # Errors
    /// They are not guest memory.
    pub fn peek(&self, address: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.memory().view().read_slice(&mut data, GuestAddress(address)).map_err(io::Error::other)?;
        Ok(data)
    }

    /// Makes a descriptor chain available, without a kick. Returns its head.
    ///
    /// # Errors
    /// No such queue, an empty chain, or not enough free descriptors ([`io::ErrorKind::WouldBlock`]).
    pub fn submit(&mut self, queue: u16, chain: &[Segment]) -> io::Result<u16> {
        self.ring(queue)?.submit(chain)
    }

    /// Writes a descriptor as it is; what no driver would do.
    ///
    /// # Errors
    /// No such queue or descriptor.
    pub fn write_descriptor(&mut self, queue: u16, index: u16, descriptor: Descriptor) -> io::Result<()> {
        self.ring(queue)?.write(index, descriptor)
    }

    /// Makes `head` available, whatever it is.
    ///
    /// # Errors
    /// No such queue.
    pub fn publish(&mut self, queue: u16, head: u16) -> io::Result<()> {
        self.ring(queue)?.publish(head)
    }

    /// Moves a queue's available index on by `by` without writing entries.
    ///
    /// # Errors
    /// No such queue.
    pub fn advance(&mut self, queue: u16, by: u16) -> io::Result<()> {
        self.ring(queue)?.advance(by)
    }

    /// Kicks a queue through the bus, as where no doorbell is in the kernel.
    pub fn kick(&self, queue: u16) {
        self.write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes());
    }

    /// Kicks a queue if the device wants it, through its doorbell, as KVM does. Returns whether it did.
    ///
    /// # Errors
    /// No such queue.
    pub fn notify(&mut self, queue: u16) -> io::Result<bool> {
        self.ring(queue)?.notify()
    }

    /// The next used chain of a queue, if there is one: its head and how many bytes were written.
    ///
    /// # Errors
    /// No such queue, or the device used a chain that is not its own.
    pub fn used(&mut self, queue: u16) -> io::Result<Option<(u16, u32)>> {
        self.ring(queue)?.used()
    }

    /// As [`used`](Self::used), waiting.
    ///
    /// # Errors
    /// As [`used`](Self::used); nothing was used within `limit`.
    pub fn wait_used(&mut self, queue: u16, limit: Duration) -> io::Result<(u16, u32)> {
        let end = Instant::now() + limit;
        loop {
            if let Some(used) = self.used(queue)? {
                return Ok(used);
            }
            if Instant::now() > end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::yield_now();
        }
    }

    /// Submits, kicks and waits up to ten seconds: one whole request. Returns the bytes written.
    ///
    /// # Errors
    /// As [`submit`](Self::submit) and [`wait_used`](Self::wait_used).
    pub fn request(&mut self, queue: u16, chain: &[Segment]) -> io::Result<u32> {
        let head = self.submit(queue, chain)?;
        self.kick(queue);
        let (used, len) = self.wait_used(queue, Duration::from_secs(10))?;
        if used == head { Ok(len) } else { Err(io::Error::other(format!("{used} used, expected {head}"))) }
    }

    /// How often a vector was raised: 0 for the configuration, `i + 1` for queue `i`.
    pub fn interrupts(&self, vector: u16) -> u64 {
        let blocks = self.resources.base.msi.blocks.lock();
        let blocks = blocks.unwrap_or_else(std::sync::PoisonError::into_inner);
        blocks.last().map_or(0, |block| block.raised(vector))
    }

    /// The ring's addresses: descriptors, available, used; for tests that write to them directly.
    pub fn ring_addresses(&self, queue: u16) -> Option<[u64; 3]> {
        self.rings.get(usize::from(queue)).map(Ring::addresses)
    }

    fn ring(&mut self, queue: u16) -> io::Result<&mut Ring> {
        self.rings.get_mut(usize::from(queue)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The eventfd that KVM would signal.
    fn doorbell(&self, queue: u16) -> io::Result<EventFd> {
        use vmm_device_model::doorbell::DoorbellAddress::Mmio;
        let address = Mmio(self.bar + NOTIFY + 4 * u64::from(queue));
        let attached = self.resources.doorbells.attached.lock();
        let attached = attached.unwrap_or_else(std::sync::PoisonError::into_inner);
        let (_, event) = attached.iter().find(|(a, _)| *a == address).ok_or(io::ErrorKind::NotFound)?;
        event.try_clone()
    }
}
