//! What happens, as events.

use std::time::{Duration, Instant};

use vmm_api::error::Code;
use vmm_api::events::{CrashReason, Event, ExitCause, ExitVia, JobOutcome, Text};
use vmm_api::progress::MigrationStatus;
use vmm_cpu_manager::set::{VcpuEvent, VcpuEventKind};
use vmm_device_model::device::DeviceChange;
use vmm_platform_devices::events::{Cause, SystemEvent};
use vmm_state::GuestEvent;

use super::VmmError;
use crate::events::Events;
use crate::machine::stages::{Span, Stages};
use crate::machine::{Machine, MachineEvent};

/// Stages of the boot of the machine of this number, which are told as they end.
pub(super) fn stages(events: &Events, machine: u64) -> Stages {
    let events = events.clone();
    Stages::watched(move |span: &Span| {
        let duration_us = micros(span.duration);
        events.tell(machine, &Event::BootStage { stage: span.stage.name().into(), duration_us });
    })
}

/// The end of a boot.
pub(super) fn boot_end(stages: &Stages, error: Option<&VmmError>) -> Event {
    let Some(error) = error else {
        let start = stages.spans().first().map(|span| span.start);
        return Event::Booted { duration_us: start.map_or(0, |start| micros(start.elapsed())) };
    };
    let (stage, reason) = failure(stages, error);
    Event::BootFailed { stage, reason }
}

/// The end of a restore that began at `start`.
pub(super) fn restore_end(stages: &Stages, start: Instant, error: Option<&VmmError>) -> Event {
    let Some(error) = error else { return Event::Restored { duration_us: micros(start.elapsed()) } };
    let (stage, reason) = failure(stages, error);
    Event::RestoreFailed { stage, reason }
}

/// The stage that failed, and what; the causes of these errors may hold paths, which are not for events.
fn failure(stages: &Stages, error: &VmmError) -> (Option<Text>, Text) {
    let reason = match error {
        VmmError::Machine(error) => error.to_string(),
        other => other.to_string(),
    };
    let stage = stages.spans().last().map(|span| span.stage.name().into());
    (stage, reason.as_str().into())
}

/// The end of a migration that did not come off.
pub(super) fn job_end(job: u64, cancelled: bool) -> Event {
    let outcome = if cancelled { JobOutcome::Cancelled } else { JobOutcome::Failed };
    Event::JobFinished { job, outcome }
}

/// What the client is told of it.
pub(super) const fn code(cancelled: bool) -> Code {
    if cancelled { Code::Cancelled } else { Code::MigrationFailed }
}

/// What is told of it later.
pub(super) const fn status(cancelled: bool) -> MigrationStatus {
    if cancelled { MigrationStatus::Cancelled } else { MigrationStatus::Failed }
}

pub(super) fn micros(time: Duration) -> u64 {
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
pub(super) fn exit(event: &MachineEvent) -> Option<(GuestEvent, Event)> {
    Some(match event {
        MachineEvent::Vcpu(event) => vcpu_exit(event),
        MachineEvent::System(SystemEvent::Reset(by)) => (GuestEvent::Reset, asked(ExitCause::Reset, *by)),
        MachineEvent::System(SystemEvent::Shutdown(by)) => {
            (GuestEvent::Shutdown, asked(ExitCause::Shutdown, *by))
        }
        _ => return None,
    })
}

/// The end of a guest that said it had panicked, by the operator's choice.
pub(super) fn ended_by_panic() -> Event {
    let via = Some(ExitVia::Pvpanic);
    Event::GuestExit { cause: ExitCause::Panic, via, vcpu: None, reason: None, code: None }
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

fn vcpu_exit(event: &VcpuEvent) -> (GuestEvent, Event) {
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
    let (what, cause) = match reason {
        None => (GuestEvent::TripleFault, ExitCause::TripleFault),
        Some(_) => (GuestEvent::Crash, ExitCause::Crash),
    };
    (what, Event::GuestExit { cause, via: None, vcpu: Some(event.vcpu.into()), reason, code })
}
