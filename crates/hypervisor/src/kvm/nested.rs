//! What a vCPU has of guests of its own (KVM_GET_NESTED_STATE), as bytes.
#![expect(unsafe_code, reason = "unions of the kernel's structs")]

use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET,
    KVM_STATE_NESTED_GUEST_MODE, kvm_nested_state,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};

use super::failed;
use crate::{HypervisorError, Result};

/// VMX is off, or no VMCS is there (KVM's all-ones address).
const NO_ADDRESS: u64 = u64::MAX;

pub(super) fn get(fd: &VcpuFd) -> Result<Option<Vec<u8>>> {
    let mut buffer = KvmNestedStateBuffer::empty();
    fd.nested_state(&mut buffer).map_err(failed("KVM_GET_NESTED_STATE"))?;
    if is_power_on(&buffer) {
        return Ok(None);
    }
    let size = usize::try_from(buffer.size).unwrap_or(usize::MAX).min(size_of::<KvmNestedStateBuffer>());
    // SAFETY: the buffer is plain data without padding, all of it initialised, and at least `size` bytes long.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const buffer).cast::<u8>(), size) };
    Ok(Some(bytes.to_vec()))
}

pub(super) fn set(fd: &VcpuFd, state: &[u8]) -> Result<()> {
    let refused = || HypervisorError::from_errno("KVM_SET_NESTED_STATE", libc::EINVAL);
    let mut buffer = KvmNestedStateBuffer::empty();
    if !(size_of::<kvm_nested_state>()..=size_of::<KvmNestedStateBuffer>()).contains(&state.len()) {
        return Err(refused());
    }
    // SAFETY: any bytes are a value of the buffer, which is at least as long; the two do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(state.as_ptr(), (&raw mut buffer).cast::<u8>(), state.len()) };
    // KVM reads as many bytes as the header says.
    if usize::try_from(buffer.size).ok() != Some(state.len()) {
        return Err(refused());
    }
    fd.set_nested_state(&buffer).map_err(failed("KVM_SET_NESTED_STATE"))
}

/// Whether it is as after power-on: hosts that cannot nest can do that, too.
fn is_power_on(buffer: &KvmNestedStateBuffer) -> bool {
    match u32::from(buffer.format) {
        KVM_STATE_NESTED_FORMAT_VMX => {
            // SAFETY: the format says that this is the member that KVM filled in.
            let vmxon = unsafe { buffer.hdr.vmx.vmxon_pa };
            vmxon == NO_ADDRESS
        }
        KVM_STATE_NESTED_FORMAT_SVM => {
            let flags = u32::from(buffer.flags);
            flags & KVM_STATE_NESTED_GIF_SET != 0 && flags & KVM_STATE_NESTED_GUEST_MODE == 0
        }
        _ => false,
    }
}
