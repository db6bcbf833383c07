//! vCPUs of a VM: what CPUID tells them, the threads that run them, their saved state.
//!
//! - [`affinity`]: where the host runs vCPU threads;
//! - [`compat`]: whether a host can give a guest what it was given elsewhere;
//! - [`topology`]: threads, cores, dies, packages and the APIC IDs that follow from them;
//! - [`cpuid`]: each vCPU's CPUID leaves, from what the hypervisor supports;
//! - [`entry`]: the registers a vCPU starts with;
//! - [`set`]: the threads. Each owns its vCPU; the owner of the VM talks to them by messages and never
//!   holds a lock while it waits for one;
//! - [`state`]: capture and restore, as typed versioned records.
//!
//! Generic over [`vmm_hypervisor`]'s traits, so all of it runs on the scripted fake as well.

pub mod affinity;
mod birth;
pub mod compat;
pub mod cpuid;
pub mod entry;
mod exits;
mod run;
pub mod set;
pub mod state;
pub mod topology;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
