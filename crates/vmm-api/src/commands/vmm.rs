//! Commands about the VMM itself.

use super::command;
use crate::info::PingReply;

command! {
    /// Says that the VMM is there, and its version.
    Ping(()) -> PingReply, Get "vmm.ping", Ping
}

command! {
    /// Ends the VM and the VMM.
    Shutdown(()) -> (), Put "vmm.shutdown", VmmShutdown
}
