//! The thread of one vCPU.
//!
//! ```text
//!            Run                      exit that ends the guest
//! parked ------------> running ------------------------------+
//!   ^                    |  Park, or any order after a kick  |
//!   +--------------------+<----------------------------------+
//! ```
//! Orders come by a channel, each followed by a kick. A kick is never lost, so the thread looks at the
//! channel only when the vCPU was interrupted: the road of an exit has no check on it. Kicks that come
//! close together are one interruption, so the thread then obeys every order that has come.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vmm_hypervisor::state::CpuidEntry;
use vmm_hypervisor::{HypervisorError, Vcpu, VcpuExit};

use crate::exits::ExitCounter;
use crate::set::{ExitTargets, VcpuEvent, VcpuEventKind};
use crate::state::{self, MsrV1, StateError, Tsc, VcpuV1};

/// What the owner of the VM asks a vCPU's thread.
#[derive(Debug)]
pub(crate) enum Order {
    /// Run the guest.
    Run,
    /// Stop running it and tell.
    Park(Sender<u32>),
    /// Give the state. Parked.
    Save(Sender<(u32, Result<VcpuV1, StateError>)>),
    /// Take the state over, and tell the TSC's offset. Parked.
    Restore(Box<VcpuV1>, Tsc, Sender<(u32, Result<Option<u64>, StateError>)>),
    /// Raise a non-maskable interrupt and tell.
    Nmi(Sender<(u32, Result<(), HypervisorError>)>),
    /// Keep out of the guest for so long, if it runs, or until Run.
    Rest(Duration),
    /// End.
    Stop,
}

pub(crate) struct Runner {
    pub(crate) index: u32,
    pub(crate) vcpu: Box<dyn Vcpu>,
    /// What CPUID was set to.
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) targets: ExitTargets,
    pub(crate) orders: Receiver<Order>,
    pub(crate) msrs: Arc<[u32]>,
    pub(crate) exits: Arc<ExitCounter>,
    /// MSRs of a restored state that wait until it runs.
    pub(crate) owed: Vec<MsrV1>,
}

enum Next {
    Park,
    Run,
    Stop,
}

impl Runner {
    /// Lives until told to stop, or until nobody is left who could tell.
    pub(crate) fn main(mut self) {
        let mut next = Next::Park;
        loop {
            next = match next {
                Next::Park => match self.orders.recv() {
                    Ok(order) => self.obey(order, Next::Park),
                    Err(_) => Next::Stop,
                },
                Next::Run => self.run(),
                Next::Stop => return,
            }
        }
    }

    fn obey(&mut self, order: Order, current: Next) -> Next {
        match order {
            Order::Run => Next::Run,
            Order::Park(parked) => {
                if matches!(current, Next::Run) {
                    // EINVAL: the guest has no such clock, or has not set it up yet.
                    let _ = self.vcpu.notify_paused();
                }
                let _ = parked.send(self.index);
                Next::Park
            }
            Order::Save(reply) => {
                let _ = reply.send((self.index, self.capture()));
                current
            }
            Order::Restore(mut state, tsc, reply) => {
                self.owed = state.take_owed();
                let _ = reply.send((self.index, self.restore(&state, tsc)));
                current
            }
            Order::Nmi(reply) => {
                let _ = reply.send((self.index, self.vcpu.nmi()));
                current
            }
            Order::Rest(time) => match current {
                Next::Run => self.rest(time),
                other => other,
            },
            Order::Stop => Next::Stop,
        }
    }

    /// Stays out of the guest; other orders are obeyed meanwhile, and may end it.
    fn rest(&mut self, time: Duration) -> Next {
        let until = Instant::now() + time;
        loop {
            let next = match self.orders.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Order::Run) => return Next::Run,
                // One that comes before the last is over adds nothing.
                Ok(Order::Rest(_)) => Next::Run,
                Ok(order) => self.obey(order, Next::Run),
                Err(RecvTimeoutError::Timeout) => return Next::Run,
                Err(RecvTimeoutError::Disconnected) => return Next::Stop,
            };
            if !matches!(next, Next::Run) {
                return next;
            }
        }
    }

    fn capture(&self) -> Result<VcpuV1, StateError> {
        let mut state = VcpuV1::capture(&*self.vcpu, &self.cpuid, &self.msrs)?;
        state.put_owed(&self.owed);
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuV1, tsc: Tsc) -> Result<Option<u64>, StateError> {
        let cpuid = state.given_cpuid();
        // Some hosts take it only once.
        if cpuid != self.cpuid {
            self.vcpu.set_cpuid(&cpuid)?;
            self.cpuid = cpuid;
        }
        state.apply(&mut *self.vcpu, tsc)
    }

    /// Obeys the orders that have come to a running vCPU, up to one that ends the run; what comes after
    /// that is read where the next state reads.
    fn obey_all(&mut self) -> Next {
        loop {
            let next = match self.orders.try_recv() {
                Ok(order) => self.obey(order, Next::Run),
                Err(TryRecvError::Empty) => return Next::Run,
                Err(TryRecvError::Disconnected) => return Next::Stop,
            };
            if !matches!(next, Next::Run) {
                return next;
            }
        }
    }

    fn run(&mut self) -> Next {
        if let Err(error) = state::settle(&mut *self.vcpu, &std::mem::take(&mut self.owed)) {
            // The guest's wall clock stays as it was, which is what it would be but for a clock that was set since.
            log::error!("vCPU {}: {error}", self.index);
        }
        loop {
            let exit = self.vcpu.run();
            self.exits.count(&exit);
            let ending = match exit {
                Ok(VcpuExit::Interrupted) => match self.obey_all() {
                    Next::Run => continue,
                    other => return other,
                },
                Ok(exit) => match handle(exit, &self.targets) {
                    None => continue,
                    Some(ending) => ending,
                },
                Err(error) => VcpuEventKind::Failed(error),
            };
            (self.targets.events)(VcpuEvent { vcpu: self.index, kind: ending });
            return Next::Park;
        }
    }
}

/// Does what an exit asks for; what it returns ends the guest.
fn handle(exit: VcpuExit<'_>, targets: &ExitTargets) -> Option<VcpuEventKind> {
    match exit {
        VcpuExit::PioWrite { port, size, data } => {
            for access in data.chunks(usize::from(size).max(1)) {
                targets.pio.write(port.into(), access);
            }
        }
        VcpuExit::PioRead { port, size, data } => {
            for access in data.chunks_mut(usize::from(size).max(1)) {
                targets.pio.read(port.into(), access);
            }
        }
        VcpuExit::MmioWrite { address, data } => {
            targets.mmio.write(address, data);
        }
        VcpuExit::MmioRead { address, data } => {
            targets.mmio.read(address, data);
        }
        VcpuExit::IoapicEoi(vector) => (targets.end_of_interrupt)(vector),
        // With local APICs in the hypervisor HLT does not exit; going on is what the guest expects.
        VcpuExit::Halt | VcpuExit::Interrupted => {}
        VcpuExit::Shutdown => return Some(VcpuEventKind::TripleFault),
        VcpuExit::SystemEvent(kind) => return Some(VcpuEventKind::SystemEvent(kind)),
        VcpuExit::InternalError { suberror } => return Some(VcpuEventKind::InternalError { suberror }),
        VcpuExit::FailedEntry { reason } => return Some(VcpuEventKind::FailedEntry { reason }),
        other => return Some(VcpuEventKind::UnexpectedExit(format!("{other:?}"))),
    }
    None
}
