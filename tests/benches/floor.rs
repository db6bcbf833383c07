//! What the VMM is measured beside: the least that a program can do for the same effect.
//!
//! - `bench-floor boot KERNEL MIB`: the KVM calls that no VMM can do without, until the guest's first byte on the serial port.
//! - `bench-floor listen SOCKET`: a UNIX socket that answers one request.
//! - `bench-floor echo SOCKET`: answers with the request, which passes from a thread of the socket to one of control and back.
#![expect(unsafe_code, reason = "maps guest memory and hands it to KVM")]

use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::ptr;
use std::sync::mpsc::{Receiver, Sender, channel};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "usage: bench-floor boot KERNEL MIB | listen SOCKET | echo SOCKET";
const SERIAL: u16 = 0x3f8;
const IOAPIC_PINS: u64 = 24;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["boot", kernel, mib] => boot(kernel, mib.parse::<usize>()? << 20),
        ["listen", socket] => listen(socket),
        ["echo", socket] => echo(socket),
        _ => Err(USAGE.into()),
    }
}

fn boot(kernel: &str, size: usize) -> Result<()> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let mut irqchip = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    irqchip.args[0] = IOAPIC_PINS;
    vm.enable_cap(&irqchip)?;
    let memory = map(size)?;
    let entry = load(kernel, memory, size)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: size as u64,
        userspace_addr: memory.addr() as u64,
    };
    // SAFETY: the region is the whole mapping, which stays until the process ends.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_protected_mode(&vcpu, entry)?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(SERIAL, bytes)) => io::stdout().write_all(bytes)?,
            Ok(VcpuExit::IoOut(..)) => {}
            Ok(exit) => return Err(format!("{exit:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
        io::stdout().flush()?;
    }
}

fn map(size: usize) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no memory of ours.
    let start =
        unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start.cast()) }
}

/// Copies the first segment of an ELF-64 file whose program headers follow its header; returns the entry point.
fn load(kernel: &str, memory: *mut u8, size: usize) -> Result<u64> {
    let file = std::fs::read(kernel)?;
    let word = |offset: usize| -> Result<usize> {
        let bytes = file.get(offset..offset + 8).ok_or("a short kernel")?;
        Ok(usize::from_le_bytes(bytes.try_into()?))
    };
    let (entry, offset, address, length) = (word(24)?, word(64 + 8)?, word(64 + 24)?, word(64 + 32)?);
    let code = offset.checked_add(length).and_then(|end| file.get(offset..end)).ok_or("a short kernel")?;
    if address.checked_add(length).is_none_or(|end| end > size) {
        return Err("a kernel outside memory".into());
    }
    // SAFETY: the range was checked to lie in the mapping of `size` bytes; no guest uses it yet; the file is another object.
    unsafe { ptr::copy_nonoverlapping(code.as_ptr(), memory.wrapping_add(address), length) };
    Ok(entry as u64)
}

/// As PVH says: 32-bit protected mode, flat segments, no paging.
fn enter_protected_mode(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut system = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, db: 1, ..Default::default() };
    system.cs = kvm_segment { selector: 8, type_: 0xb, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, ..flat };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.cr0 = 1;
    vcpu.set_sregs(&system)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rflags: 2, ..Default::default() })?;
    Ok(())
}

fn listen(socket: &str) -> Result<()> {
    let (mut client, _) = UnixListener::bind(socket)?.accept()?;
    if client.read(&mut [0; 4096])? > 0 {
        client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")?;
    }
    Ok(())
}

/// One direction between two threads: a queue, and an eventfd that wakes the reader.
struct Post {
    queue: Sender<Vec<u8>>,
    wake: EventFd,
}

struct Inbox {
    queue: Receiver<Vec<u8>>,
    wake: EventFd,
}

fn mailbox() -> io::Result<(Post, Inbox)> {
    let (sender, receiver) = channel();
    let wake = EventFd::new(EFD_CLOEXEC)?;
    Ok((Post { queue: sender, wake: wake.try_clone()? }, Inbox { queue: receiver, wake }))
}

impl Post {
    fn send(&self, message: Vec<u8>) -> Result<()> {
        self.queue.send(message)?;
        Ok(self.wake.write(1)?)
    }
}

impl Inbox {
    fn receive(&self) -> Result<Vec<u8>> {
        self.wake.read()?;
        Ok(self.queue.recv()?)
    }
}

fn echo(socket: &str) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    let (requests, inbox) = mailbox()?;
    let (replies, outbox) = mailbox()?;
    let control = std::thread::spawn(move || {
        while let Ok(message) = inbox.receive() {
            if replies.send(message).is_err() {
                return;
            }
        }
    });
    let (client, _) = listener.accept()?;
    serve(client, &requests, &outbox)?;
    drop(requests.queue);
    requests.wake.write(1)?;
    control.join().map_err(|_| "the control thread panicked".into())
}

fn serve(mut client: UnixStream, requests: &Post, outbox: &Inbox) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let length = client.read(&mut buffer)?;
        let request = buffer.get(..length).unwrap_or_default();
        if request.is_empty() {
            return Ok(());
        }
        requests.send(request.to_vec())?;
        client.write_all(&outbox.receive()?)?;
    }
}
