//! Guest memory.
//!
//! - [`layout`]: where RAM and the windows for devices lie in the guest's address space;
//! - [`zone`]: RAM as the host backs it: memfd, file, huge pages, anonymous memory;
//! - [`map`]: the RAM of one VM, its slots in the hypervisor, and the handle that devices get;
//! - [`source`]: RAM as a snapshot's writer reads it, without touching what was never written;
//! - [`absent`]: RAM that arrives from elsewhere while its guest runs;
//! - [`pages`]: sets of pages of it;
//! - [`straight`]: RAM that goes to and from sockets without a copy;
//! - [`fill`]: RAM that is filled from a snapshot while its guest runs;
//! - [`freeze`]: RAM as it is at one moment, for such a writer while the guest runs on;
//! - [`restore`]: RAM from a snapshot, mapped or copied;
//! - [`handover`]: RAM that another process takes over by its descriptors;
//! - [`userfault`]: page faults of guest memory, handled here;
//! - [`dirty`]: one collector of dirty pages for any number of named trackers.

pub mod absent;
pub mod dirty;
pub mod fill;
pub mod freeze;
pub mod handover;
pub mod layout;
pub mod map;
mod pagemap;
pub mod pages;
pub mod restore;
pub mod source;
pub mod straight;
mod sys;
pub mod userfault;
pub mod zone;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
