//! The hypervisor's side of the device world: what devices call, carried out by the hypervisor.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_cpu_manager::set::VcpuEvent;
use vmm_device_manager::machine::{Attentions, Lines};
use vmm_device_model::device::Attention;
use vmm_device_model::doorbell::{DoorbellAddress, Doorbells};
use vmm_device_model::interrupt::{InterruptLine, MsiMessage, MsiSource, MsiVectors};
use vmm_epoll::Mailbox;
use vmm_hypervisor::router::{InterruptRouter, MsiBlock};
use vmm_hypervisor::{HypervisorError, IoEventAddress, Msi, Vm};
use vmm_platform_devices::events::{SystemEvent, SystemEvents};
use vmm_platform_devices::ioapic::{IoApic, IoApicTarget};
use vmm_sys_util::eventfd::EventFd;

use crate::migration::{ReceiveStep, SendStep};
use crate::vmm::SaveStep;

/// What a machine's threads tell the control thread.
#[derive(Debug)]
pub enum MachineEvent {
    /// A vCPU cannot go on.
    Vcpu(VcpuEvent),
    /// The guest asked for a reset or power-off.
    System(SystemEvent),
    /// A device wants to be serviced.
    Attention {
        /// The device.
        device: String,
        /// Cleared before the device is serviced, so that later requests are not lost.
        pending: Arc<AtomicBool>,
    },
    /// A boot thread has done its work, and gives what it made to who takes it.
    Made,
    /// The thread that writes a snapshot tells something.
    Save(Box<SaveStep>),
    /// The thread that gives the VM away asks or tells something.
    Send(Box<SendStep>),
    /// The thread that gets a VM does.
    Receive(Box<ReceiveStep>),
}

/// A [`MachineEvent`] and which machine it is of: a late one of a machine that is gone is dropped.
#[derive(Debug)]
pub struct MachineMessage {
    /// Number of the machine.
    pub machine: u64,
    /// What happened.
    pub event: MachineEvent,
}

/// Posts the events of one machine.
#[derive(Debug, Clone)]
pub struct EventPost {
    /// Number of the machine.
    pub machine: u64,
    mailbox: Mailbox<MachineMessage>,
    asked: Arc<Asked>,
}

/// What the guest asked for already. The first reset or power-off ends its machine, so a second need not be told, and a
/// guest that asks in a loop does not fill the mailbox.
#[derive(Debug, Default)]
struct Asked {
    reset: AtomicBool,
    shutdown: AtomicBool,
}

impl EventPost {
    /// Posts the events of machine `machine` to `mailbox`, the control thread's.
    pub fn new(machine: u64, mailbox: Mailbox<MachineMessage>) -> Self {
        Self { machine, mailbox, asked: Arc::default() }
    }

    /// Posts `event`. When the control thread is gone, so is the machine.
    pub fn post(&self, event: MachineEvent) {
        let _ = self.mailbox.send(MachineMessage { machine: self.machine, event });
    }
}

impl SystemEvents for EventPost {
    fn request(&self, event: SystemEvent) {
        let again = match event {
            SystemEvent::Reset(_) => self.asked.reset.swap(true, Ordering::SeqCst),
            SystemEvent::Shutdown(_) => self.asked.shutdown.swap(true, Ordering::SeqCst),
            // The panic device bounds what it tells itself.
            _ => false,
        };
        if !again {
            self.post(MachineEvent::System(event));
        }
    }
}

impl Attentions for EventPost {
    fn of(&self, id: &str) -> Arc<dyn Attention> {
        Arc::new(AttentionPost { post: self.clone(), device: id.to_owned(), pending: Arc::default() })
    }
}

#[derive(Debug)]
struct AttentionPost {
    post: EventPost,
    device: String,
    pending: Arc<AtomicBool>,
}

impl Attention for AttentionPost {
    fn request(&self) {
        if !self.pending.swap(true, Ordering::SeqCst) {
            let pending = Arc::clone(&self.pending);
            self.post.post(MachineEvent::Attention { device: self.device.clone(), pending });
        }
    }
}

fn msi(message: MsiMessage) -> Msi {
    Msi { address: message.address, data: message.data }
}

/// The routes and messages of the IOAPIC's pins.
#[derive(Debug)]
pub(super) struct PinRoutes(pub Arc<InterruptRouter>);

impl IoApicTarget for PinRoutes {
    fn set_routes(&self, routes: &[(u8, Option<MsiMessage>)]) -> io::Result<()> {
        let routes: Vec<_> = routes.iter().map(|(pin, m)| (u32::from(*pin), m.map(msi))).collect();
        self.0.set_pins(&routes)
    }

    fn deliver(&self, message: MsiMessage) -> io::Result<()> {
        self.0.signal(msi(message))
    }
}

/// The IOAPIC's pins.
#[derive(Debug)]
pub(super) struct IoApicLines(pub Arc<IoApic>);

impl Lines for IoApicLines {
    fn line(&self, gsi: u32) -> Option<Arc<dyn InterruptLine>> {
        self.0.line(u8::try_from(gsi).ok()?)
    }
}

/// Blocks of MSI vectors.
#[derive(Debug)]
pub(super) struct MsiBlocks(pub Arc<InterruptRouter>);

impl MsiSource for MsiBlocks {
    fn allocate(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>> {
        Ok(Arc::new(Vectors(self.0.allocate(count)?)))
    }
}

#[derive(Debug)]
struct Vectors(MsiBlock);

impl MsiVectors for Vectors {
    fn count(&self) -> u16 {
        self.0.count()
    }

    fn set_routes(&self, routes: &[(u16, Option<MsiMessage>)]) -> io::Result<()> {
        let routes: Vec<_> = routes.iter().map(|(index, m)| (*index, m.map(msi))).collect();
        self.0.set_routes(&routes)
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        self.0.trigger(index)
    }

    fn event(&self, index: u16) -> io::Result<EventFd> {
        self.0.event(index)
    }
}

/// Doorbells by ioeventfd.
#[derive(Debug)]
pub(super) struct IoEvents(pub Arc<dyn Vm>);

fn io_event(address: DoorbellAddress) -> IoEventAddress {
    match address {
        DoorbellAddress::Pio(port) => IoEventAddress::Pio(port),
        DoorbellAddress::Mmio(gpa) => IoEventAddress::Mmio(gpa),
    }
}

fn io_error(error: HypervisorError) -> io::Error {
    io::Error::other(error)
}

impl Doorbells for IoEvents {
    fn attach(&self, address: DoorbellAddress, event: &EventFd) -> io::Result<()> {
        self.0.attach_ioeventfd(io_event(address), event).map_err(io_error)
    }

    fn detach(&self, address: DoorbellAddress, event: &EventFd) -> io::Result<()> {
        self.0.detach_ioeventfd(io_event(address), event).map_err(io_error)
    }
}

#[cfg(test)]
mod tests {
    use vmm_epoll::mailbox;
    use vmm_platform_devices::events::Cause;

    use super::*;

    #[test]
    fn a_guest_that_asks_in_a_loop_is_heard_once() {
        let (mailbox, mut inbox) = mailbox().unwrap();
        let post = EventPost::new(1, mailbox);
        for _ in 0..1000 {
            post.request(SystemEvent::Reset(Cause::I8042));
            post.clone().request(SystemEvent::Shutdown(Cause::AcpiSleep));
        }
        assert_eq!(inbox.take_all().len(), 2);
    }
}
