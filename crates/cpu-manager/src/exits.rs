//! How often a vCPU left the guest, by reason.

use vmm_device_model::metrics::{Counter, Family, Kind, Padded, Sample, Value};
use vmm_hypervisor::{Result, VcpuExit};

static EXITS: Family = Family {
    name: "vmm_vcpu_exits",
    help: "Exits of a vCPU from the guest to the VMM, by reason.",
    unit: "",
    kind: Kind::Counter,
};

/// Counted by the vCPU's thread alone.
#[derive(Debug, Default)]
pub(crate) struct ExitCounter(Padded<[Counter; Reason::ALL.len()]>);

/// Why a vCPU left the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    PioRead,
    PioWrite,
    MmioRead,
    MmioWrite,
    IoapicEoi,
    Halt,
    Interrupted,
    Shutdown,
    SystemEvent,
    /// KVM cannot go on: internal error, failed entry, failed call.
    Failure,
    Other,
}

impl Reason {
    const ALL: [(Self, &'static str); 11] = [
        (Self::PioRead, "pio_read"),
        (Self::PioWrite, "pio_write"),
        (Self::MmioRead, "mmio_read"),
        (Self::MmioWrite, "mmio_write"),
        (Self::IoapicEoi, "ioapic_eoi"),
        (Self::Halt, "halt"),
        (Self::Interrupted, "interrupted"),
        (Self::Shutdown, "shutdown"),
        (Self::SystemEvent, "system_event"),
        (Self::Failure, "failure"),
        (Self::Other, "other"),
    ];

    fn of(exit: &Result<VcpuExit<'_>>) -> Self {
        match exit {
            Ok(VcpuExit::PioRead { .. }) => Self::PioRead,
            Ok(VcpuExit::PioWrite { .. }) => Self::PioWrite,
            Ok(VcpuExit::MmioRead { .. }) => Self::MmioRead,
            Ok(VcpuExit::MmioWrite { .. }) => Self::MmioWrite,
            Ok(VcpuExit::IoapicEoi(_)) => Self::IoapicEoi,
            Ok(VcpuExit::Halt) => Self::Halt,
            Ok(VcpuExit::Interrupted) => Self::Interrupted,
            Ok(VcpuExit::Shutdown) => Self::Shutdown,
            Ok(VcpuExit::SystemEvent(_)) => Self::SystemEvent,
            Ok(VcpuExit::InternalError { .. } | VcpuExit::FailedEntry { .. }) | Err(_) => Self::Failure,
            Ok(_) => Self::Other,
        }
    }
}

impl ExitCounter {
    pub(crate) fn count(&self, exit: &Result<VcpuExit<'_>>) {
        if let Some(counter) = self.0.get(Reason::of(exit) as usize) {
            counter.add(1);
        }
    }

    /// One for each reason, those that did not occur among them.
    pub(crate) fn samples(&self, vcpu: u32) -> impl Iterator<Item = Sample> + '_ {
        let sample = move |(counter, (_, reason)): (&Counter, (_, &str))| Sample {
            family: &EXITS,
            labels: vec![("vcpu", vcpu.to_string()), ("reason", reason.to_owned())],
            value: Value::Counter(counter.get()),
        };
        self.0.iter().zip(Reason::ALL).map(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_place() {
        for (at, (reason, _)) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at, "{reason:?}");
        }
    }
}
