//! The contract's routes that this build answers with 501 `not_built`. The only list of them.

use crate::command::Method;
use Method::{Get, Put};

/// A route of the contract that is not built yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaterRoute {
    /// The route below `/api/v1/`.
    pub name: &'static str,
    /// Its method.
    pub method: Method,
}

const fn later(method: Method, name: &'static str) -> LaterRoute {
    LaterRoute { name, method }
}

/// Every one of them.
pub const LATER: [LaterRoute; 21] = [
    later(Get, "vm.counters"),
    later(Put, "vm.power-button"),
    later(Put, "vm.resize"),
    later(Put, "vm.resize-disk"),
    later(Put, "vm.resize-zone"),
    later(Put, "vm.add-device"),
    later(Put, "vm.remove-device"),
    later(Put, "vm.add-disk"),
    later(Put, "vm.add-fs"),
    later(Put, "vm.add-generic-vhost-user"),
    later(Put, "vm.add-pmem"),
    later(Put, "vm.add-net"),
    later(Put, "vm.add-vsock"),
    later(Put, "vm.add-vdpa"),
    later(Put, "vm.add-user-device"),
    later(Put, "vm.snapshot"),
    later(Put, "vm.coredump"),
    later(Put, "vm.nmi"),
    later(Put, "vm.restore"),
    later(Put, "vm.receive-migration"),
    later(Put, "vm.send-migration"),
];
