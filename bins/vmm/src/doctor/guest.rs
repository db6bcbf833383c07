//! Probe guests: whether KVM runs any guest, and whether it runs an unmodified kernel.
//!
//! A KVM without hardware virtualization below it emulates guest kernel code, with gaps. `lock cmpxchg16b` in 64-bit
//! mode, which Linux executes early and every processor of the last fifteen years has, is one of them: it tells
//! which kind of KVM this is.
#![expect(unsafe_code, reason = "hands memory to the hypervisor")]

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vmm_hypervisor::state::{Regs, Segment, Sregs};
use vmm_hypervisor::{Hypervisor, HypervisorError, MemorySlot, Vcpu, VcpuExit, VmOptions};
use vmm_memory_manager::layout::TSS_ADDRESS;

use super::facts::Guests;

/// The port by which a guest says that it came through.
const PORT: u16 = 0x80;
/// `out 0x80, al`
const PLAIN: &[u8] = &[0xe6, 0x80];
/// `lock cmpxchg16b [rdi]; out 0x80, al`
const TELLING: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xe6, 0x80];

const MEMORY: usize = 64 * 1024;
const PML4: usize = 0x1000;
const DIRECTORY_POINTERS: usize = 0x2000;
const DIRECTORY: usize = 0x3000;
const CODE: usize = 0x4000;
const DATA: u64 = 0x5000;

/// Both guests together need milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Returns for no reason before a guest is given up.
const INTERRUPTIONS: usize = 1000;

/// Runs the probe guests, on a thread of their own: one that hangs is left behind.
pub(super) fn probe(hypervisor: impl Hypervisor + 'static) -> Guests {
    let (result, answer) = mpsc::sync_channel(1);
    let guests = thread::Builder::new().name("probe".into()).spawn(move || {
        // Nobody listens any more when it took too long.
        let _ = result.send(guests(&hypervisor));
    });
    match guests {
        Ok(_) => answer
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| Guests::None(format!("no answer in {} s", PATIENCE.as_secs()))),
        Err(error) => Guests::None(format!("no thread for it: {error}")),
    }
}

fn guests(hypervisor: &dyn Hypervisor) -> Guests {
    match run_guest(hypervisor, PLAIN) {
        Ok(None) => {}
        Ok(Some(end)) => return Guests::None(format!("it ended with {end}")),
        Err(error) => return Guests::None(crate::exit::chain(&error)),
    }
    match run_guest(hypervisor, TELLING) {
        Ok(None) => Guests::Kernels,
        Ok(Some(end)) => Guests::TinyOnly(format!("lock cmpxchg16b ended with {end}")),
        Err(error) => Guests::TinyOnly(format!("lock cmpxchg16b: {}", crate::exit::chain(&error))),
    }
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("no memory for the guest")]
    Memory(#[source] io::Error),
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
}

/// Runs `code` in 64-bit mode; `None` if it came through, else what happened instead.
fn run_guest(hypervisor: &dyn Hypervisor, code: &[u8]) -> Result<Option<String>, ProbeError> {
    // Declared before the VM and its vCPU, and so dropped after them.
    let memory = memory(code).map_err(ProbeError::Memory)?;
    let vm = hypervisor.create_vm(&VmOptions { ioapic_pins: 24, tss_address: TSS_ADDRESS })?;
    let slot = MemorySlot {
        slot: 0,
        guest_address: 0,
        size: MEMORY as u64,
        host_address: memory.as_ptr() as u64,
        read_only: false,
        log_dirty: false,
    };
    // SAFETY: the mapping outlives the VM, and there are no references to its bytes.
    unsafe { vm.set_memory_slot(&slot) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&hypervisor.supported_cpuid()?)?;
    let mut system = vcpu.sregs()?;
    enter_long_mode(&mut system);
    vcpu.set_sregs(&system)?;
    vcpu.set_regs(&Regs { rip: CODE as u64, rdi: DATA, rflags: 2, ..Regs::default() })?;
    Ok(run(vcpu.as_mut())?)
}

fn run(vcpu: &mut dyn Vcpu) -> Result<Option<String>, HypervisorError> {
    for _ in 0..INTERRUPTIONS {
        match vcpu.run()? {
            VcpuExit::PioWrite { port: PORT, .. } => return Ok(None),
            VcpuExit::Interrupted => {}
            VcpuExit::InternalError { suberror } => {
                return Ok(Some(format!("an internal error, suberror {suberror}")));
            }
            exit => return Ok(Some(format!("{exit:?}"))),
        }
    }
    Ok(Some("interruptions only".into()))
}

/// Page tables that map the first 2 MiB, and `code`.
fn memory(code: &[u8]) -> io::Result<MmapRegion> {
    let memory = MmapRegion::new(MEMORY).map_err(io::Error::other)?;
    let write = |offset: usize, bytes: &[u8]| {
        memory.as_volatile_slice().write_slice(bytes, offset).map_err(io::Error::other)
    };
    write(PML4, &(DIRECTORY_POINTERS as u64 | 3).to_le_bytes())?;
    write(DIRECTORY_POINTERS, &(DIRECTORY as u64 | 3).to_le_bytes())?;
    // One 2 MiB page: present, writable, large.
    write(DIRECTORY, &0x83_u64.to_le_bytes())?;
    write(CODE, code)?;
    Ok(memory)
}

/// 64-bit mode with flat segments and the page tables above (AMD64 manual, volume 2, section 14).
fn enter_long_mode(system: &mut Sregs) {
    let flat = Segment { limit: 0xffff_ffff, present: true, s: true, g: true, ..Segment::default() };
    system.cs = Segment { selector: 8, type_: 0xb, l: true, ..flat };
    let data = Segment { selector: 16, type_: 3, db: true, ..flat };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.cr3 = PML4 as u64;
    // PAE; LME and LMA; PE, ET, NE and PG.
    system.cr4 = 1 << 5;
    system.efer = 1 << 8 | 1 << 10;
    system.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
}

#[cfg(test)]
mod tests {
    use vmm_hypervisor::fake::{Exit, Fake, Live};

    use super::*;

    fn through() -> Exit {
        Exit::PioWrite { port: PORT, data: vec![0] }
    }

    fn probed(exits: impl IntoIterator<Item = Exit>) -> Guests {
        let fake = Fake::new();
        fake.script(0, exits);
        guests(&fake)
    }

    #[test]
    fn tells_what_runs() {
        assert_eq!(probed([through(), through()]), Guests::Kernels);
        let tiny = Guests::TinyOnly("lock cmpxchg16b ended with an internal error, suberror 1".into());
        assert_eq!(probed([through(), Exit::InternalError(1)]), tiny);
        assert_eq!(probed([Exit::Shutdown]), Guests::None("it ended with Shutdown".into()));
        let Guests::None(why) = probed([Exit::RunFails(libc::ENOEXEC)]) else {
            panic!("no guest ran");
        };
        assert!(why.starts_with("KVM_RUN failed: "), "{why}");
    }

    #[test]
    fn each_failing_call_is_told_and_leaves_nothing_behind() {
        let good = Fake::new();
        good.script(0, [through(), through()]);
        guests(&good);
        for nth in 1..=good.calls().len() {
            let fake = Fake::new();
            fake.script(0, [through(), through()]);
            fake.fail_nth(nth);
            assert_ne!(guests(&fake), Guests::Kernels, "call {nth}");
            assert_eq!(fake.live(), Live::default(), "call {nth}");
        }
    }

    #[test]
    fn the_answer_comes_from_another_thread() {
        let fake = Fake::new();
        fake.script(0, [through(), through()]);
        assert_eq!(probe(fake), Guests::Kernels);
    }
}
