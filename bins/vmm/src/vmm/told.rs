//! What happens, as events.

use std::time::{Duration, Instant};

use vmm_api::events::{CrashReason, Event, ExitCause, ExitVia};
use vmm_cpu_manager::set::{VcpuEvent, VcpuEventKind};
use vmm_device_model::device::DeviceChange;
use vmm_platform_devices::events::{Cause, SystemEvent};

use super::VmmError;
use crate::events::Events;
use crate::machine::stages::{Span, Stages};
use crate::machine::{Machine, MachineEvent};

/// A boot that is going on.
pub(super) struct Boot {
    events: Events,
    machine: u64,
    start: Instant,
}

impl Boot {
    /// A boot of the machine of this number begins.
    pub(super) fn begin(events: &Events, machine: u64) -> Self {
        events.tell(machine, &Event::Booting);
        Self { events: events.clone(), machine, start: Instant::now() }
    }

    /// Stages that are told as they end.
    pub(super) fn stages(&self) -> Stages {
        let (events, machine) = (self.events.clone(), self.machine);
        Stages::watched(move |span: &Span| {
            let duration_us = micros(span.duration);
            events.tell(machine, &Event::BootStage { stage: span.stage.name().into(), duration_us });
        })
    }

    /// What became of it.
    pub(super) fn end(self, stages: &Stages, result: Result<&(), &VmmError>) {
        let event = match result {
            Ok(()) => Event::Booted { duration_us: micros(self.start.elapsed()) },
            Err(error) => {
                // The causes of these errors may hold paths, which are not for events.
                let reason = match error {
                    VmmError::Machine(error) => error.to_string(),
                    other => other.to_string(),
                };
                let stage = stages.spans().last().map_or("", |span| span.stage.name());
                Event::BootFailed { stage: stage.into(), reason: reason.as_str().into() }
            }
        };
        self.events.tell(self.machine, &event);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Tells what the guest made of the machine's devices since the last time.
pub(super) fn changes(events: &Events, machine: &mut Machine) {
    for (id, change) in machine.take_changes() {
        let id = id.as_str().into();
        let event = match change {
            DeviceChange::Activated => Event::DeviceActivated { id },
            DeviceChange::Reset => Event::DeviceReset { id },
            DeviceChange::NeedsReset => Event::DeviceNeedsReset { id },
            _ => continue,
        };
        events.tell(machine.number(), &event);
    }
}

/// The end of a guest, if that is what a machine's thread tells.
pub(super) fn exit(event: &MachineEvent) -> Option<Event> {
    match event {
        MachineEvent::Vcpu(event) => Some(vcpu_exit(event)),
        MachineEvent::System(SystemEvent::Reset(cause)) => Some(asked(ExitCause::Reset, *cause)),
        MachineEvent::System(SystemEvent::Shutdown(cause)) => Some(asked(ExitCause::Shutdown, *cause)),
        _ => None,
    }
}

fn asked(cause: ExitCause, by: Cause) -> Event {
    let via = match by {
        Cause::I8042 => Some(ExitVia::I8042),
        Cause::AcpiReset => Some(ExitVia::AcpiReset),
        Cause::AcpiSleep => Some(ExitVia::AcpiSleep),
        _ => None,
    };
    Event::GuestExit { cause, via, vcpu: None, reason: None, code: None }
}

fn vcpu_exit(event: &VcpuEvent) -> Event {
    let (reason, code) = match &event.kind {
        VcpuEventKind::TripleFault => (None, None),
        VcpuEventKind::SystemEvent(number) => (Some(CrashReason::SystemEvent), Some(u64::from(*number))),
        VcpuEventKind::InternalError { suberror } => {
            (Some(CrashReason::InternalError), Some(u64::from(*suberror)))
        }
        VcpuEventKind::FailedEntry { reason } => (Some(CrashReason::FailedEntry), Some(*reason)),
        VcpuEventKind::Failed(_) => (Some(CrashReason::HypervisorFailed), None),
        // Its text may hold what the guest wrote.
        _ => (Some(CrashReason::UnexpectedExit), None),
    };
    let cause = if reason.is_none() { ExitCause::TripleFault } else { ExitCause::Crash };
    Event::GuestExit { cause, via: None, vcpu: Some(event.vcpu.into()), reason, code }
}
