//! Steps of a destination that may take long: files are looked at, memory is had and filled. They have a thread of their own, so
//! that the driver hears and sends keepalives meanwhile, and the link is not taken for lost.

use vmm_api::spec::{Checked, MachineSpec};
use vmm_memory_manager::map::HostMemory;
use vmm_migration_protocol::{Fault, Hello, Missing, MissingKind, Reason};

use crate::exit::chain;
use crate::machine;

/// What such a step gave.
#[derive(Debug)]
pub(crate) enum Made {
    /// The configuration, as it is here.
    Checked(Result<Box<Checked>, Fault>),
    /// The guest's memory; `None` where it is there already, and will be handed over.
    Memory(Result<Option<HostMemory>, Fault>),
}

/// Gets the memory of a machine of `spec`, which is where the source says that it is, or not at all.
///
/// # Errors
/// It would be elsewhere, or cannot be had.
pub(super) fn memory(
    spec: &MachineSpec,
    hello: &Hello,
    handed_over: bool,
) -> Result<Option<HostMemory>, Fault> {
    let failed = |error: &dyn std::error::Error| Fault::new(Reason::Failed, &chain(error));
    let zones = machine::zones(spec).map_err(|error| failed(&error))?;
    let places = HostMemory::places(&zones, hello.cpu.phys_bits).map_err(|error| failed(&error))?;
    let there = hello.memory.regions().iter().map(|region| (region.zone.clone(), region.gpa, region.length));
    if !places.into_iter().eq(there) {
        let missing = Missing::new(MissingKind::Memory, "memory where the guest has it");
        return Err(Fault::incompatible(vec![missing]));
    }
    if handed_over {
        return Ok(None);
    }
    HostMemory::create(&zones, hello.cpu.phys_bits).map(Some).map_err(|error| failed(&error))
}
