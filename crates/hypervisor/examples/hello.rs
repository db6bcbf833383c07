//! Runs a guest of eight instructions that prints through port 0xe9: on KVM where it can be used, else on the
//! scripted fake, which plays the same exits.
#![expect(unsafe_code, reason = "a page of guest memory")]

use std::error::Error;

use vmm_hypervisor::fake::{Exit, Fake};
use vmm_hypervisor::kvm::Kvm;
use vmm_hypervisor::{Hypervisor, MemorySlot, Vcpu, VcpuExit, Vm, VmOptions};

const DEBUG_PORT: u16 = 0xe9;
const CODE_ADDRESS: u64 = 0x1000;
/// In 16-bit real mode: sends the bytes of the text behind it to port 0xe9 up to a 0, then jumps in place.
const CODE: &[u8] =
    b"\xbe\x10\x10\xfc\x2e\xac\x84\xc0\x74\x04\xe6\xe9\xeb\xf6\xeb\xfehello from the guest\n\0";

const TEXT_OFFSET: usize = 16;

#[repr(align(4096))]
struct Page([u8; 4096]);

fn main() -> Result<(), Box<dyn Error>> {
    let hypervisor: Box<dyn Hypervisor> = match Kvm::open() {
        Ok(kvm) => Box::new(kvm),
        Err(error) => {
            println!("{error}; the scripted fake plays the guest");
            Box::new(scripted())
        }
    };
    let vm = hypervisor.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0xfffb_d000 })?;
    give_code(&*vm)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&hypervisor.supported_cpuid()?)?;
    enter_real_mode(&mut *vcpu)?;
    let mut printed = Vec::new();
    while printed.last() != Some(&b'\n') {
        match vcpu.run()? {
            VcpuExit::PioWrite { port: DEBUG_PORT, data, .. } => printed.extend_from_slice(data),
            other => return Err(format!("unexpected exit {other:?}").into()),
        }
    }
    print!("{}: {}", hypervisor.name(), String::from_utf8_lossy(&printed));
    Ok(())
}

/// The exits that the guest's code has.
fn scripted() -> Fake {
    let fake = Fake::new();
    let text = CODE.iter().skip(TEXT_OFFSET).take_while(|byte| **byte != 0);
    fake.script(0, text.map(|byte| Exit::PioWrite { port: DEBUG_PORT, data: vec![*byte] }));
    fake
}

fn give_code(vm: &dyn Vm) -> vmm_hypervisor::Result<()> {
    let mut page = Box::new(Page([0; 4096]));
    page.0.iter_mut().zip(CODE).for_each(|(to, from)| *to = *from);
    let slot = MemorySlot {
        slot: 0,
        guest_address: CODE_ADDRESS,
        size: 4096,
        // Leaked: the guest may use it as long as the process lives.
        host_address: Box::into_raw(page) as u64,
        read_only: false,
        log_dirty: false,
    };
    // SAFETY: the page is never freed, and nobody here touches it from now on.
    unsafe { vm.set_memory_slot(&slot) }
}

fn enter_real_mode(vcpu: &mut dyn Vcpu) -> vmm_hypervisor::Result<()> {
    let mut sregs = vcpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.regs()?;
    (regs.rip, regs.rflags) = (CODE_ADDRESS, 2);
    vcpu.set_regs(&regs)
}
