//! What the KVM of this machine can run.
//!
//! Some KVMs have no hardware virtualization below them and emulate guest kernel code, with gaps: tiny guests of plain integer
//! instructions run there, an unmodified kernel does not. A guest of one telling instruction, `lock cmpxchg16b` in 64-bit mode,
//! shows which kind this is.
#![expect(unsafe_code, reason = "maps guest memory and hands it to KVM")]

use std::io;
use std::ptr::{self, NonNull};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// What guests run here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmAbility {
    /// None, for this reason.
    None(String),
    /// Tiny guests of plain integer instructions only, for this reason.
    TinyGuestsOnly(String),
    /// Unmodified kernels.
    Full,
}

impl KvmAbility {
    /// Runs the probe guests and tells.
    #[must_use]
    pub fn probe() -> Self {
        match run_guest(PLAIN) {
            Err(error) => return Self::None(format!("/dev/kvm cannot run a guest: {error}")),
            Ok(Some(exit)) => return Self::None(format!("the simplest guest ended with {exit}")),
            Ok(None) => {}
        }
        match run_guest(TELLING) {
            Ok(None) => Self::Full,
            Ok(Some(exit)) => Self::TinyGuestsOnly(format!(
                "this KVM emulates guest kernel code and lacks instructions (lock cmpxchg16b ended with {exit})"
            )),
            Err(error) => Self::TinyGuestsOnly(format!("the 64-bit probe guest failed: {error}")),
        }
    }

    /// Whether unmodified kernels run.
    #[must_use]
    pub fn is_full(&self) -> bool {
        *self == Self::Full
    }
}

/// `hlt`
const PLAIN: &[u8] = &[0xf4];
/// `lock cmpxchg16b [rdi]; hlt`
const TELLING: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xf4];

const MEMORY: usize = 64 * 1024;
const PML4: u64 = 0x1000;
const DIRECTORY_POINTERS: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// Runs `code` in 64-bit mode on one vCPU; `None` when it came to its `hlt`, else what happened instead.
fn run_guest(code: &[u8]) -> io::Result<Option<String>> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let mut memory = Memory::new()?;
    memory.write(PML4, &(DIRECTORY_POINTERS | 3).to_le_bytes())?;
    memory.write(DIRECTORY_POINTERS, &(DIRECTORY | 3).to_le_bytes())?;
    // One 2 MiB page: present, writable, large.
    memory.write(DIRECTORY, &0x83_u64.to_le_bytes())?;
    memory.write(CODE, code)?;
    memory.give_to(&vm)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    set_registers(&vcpu)?;
    loop {
        return match vcpu.run() {
            Ok(VcpuExit::Hlt) => Ok(None),
            Ok(exit) => Ok(Some(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => Err(error.into()),
        };
    }
}

fn set_registers(vcpu: &VcpuFd) -> io::Result<()> {
    let mut system = vcpu.get_sregs()?;
    enter_long_mode(&mut system);
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE;
    registers.rdi = DATA;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    Ok(())
}

/// 64-bit mode with flat segments and the page tables above (AMD64 manual, volume 2, section 14).
fn enter_long_mode(system: &mut kvm_sregs) {
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    system.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.cr3 = PML4;
    // PAE; LME and LMA; PE, ET, NE and PG.
    system.cr4 = 1 << 5;
    system.efer = 1 << 8 | 1 << 10;
    system.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 31;
}

/// Guest memory: one anonymous mapping.
struct Memory {
    start: NonNull<u8>,
}

impl Memory {
    fn new() -> io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast())
            .map(|start| Self { start })
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(address).unwrap_or(usize::MAX);
        if offset.checked_add(bytes.len()).is_none_or(|end| end > MEMORY) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the offset lies in the mapping.
        let target = unsafe { self.start.add(offset) };
        // SAFETY: the range was checked to lie in the mapping, which no guest uses yet; `bytes` is another object.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Makes it the memory of `vm` from address 0. The caller keeps it for as long as the VM runs.
    fn give_to(&self, vm: &VmFd) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: self.start.as_ptr() as u64,
        };
        // SAFETY: the region is the whole mapping; no other slot overlaps it.
        unsafe { vm.set_user_memory_region(region) }.map_err(Into::into)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length. No guest runs on it any more: its only vCPU belongs to
        // `run_guest`, which has returned from the last run when it drops this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), MEMORY) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_stay_in_memory() {
        let mut memory = Memory::new().unwrap();
        assert!(memory.write(MEMORY as u64 - 1, &[1]).is_ok());
        assert!(memory.write(MEMORY as u64 - 1, &[1, 2]).is_err());
        assert!(memory.write(u64::MAX, &[1]).is_err());
    }

    #[test]
    fn the_probe_tells_something_with_a_reason() {
        match KvmAbility::probe() {
            KvmAbility::Full => {}
            KvmAbility::None(reason) | KvmAbility::TinyGuestsOnly(reason) => {
                assert!(reason.len() > 20, "{reason}");
            }
        }
    }
}
