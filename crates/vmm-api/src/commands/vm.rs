//! Commands about the VM.

use super::command;
use crate::command::{Decode, Encode, Incoming, encode_json};
use crate::config::VmConfig;
use crate::error::ApiError;
use crate::info::VmInfo;
use crate::spec::{Checked, MachineSpec, parse_and_check};
use std::os::fd::OwnedFd;

command! {
    /// Stores the configuration of a VM. It is not booted.
    Create(CreateRequest) -> (), Put "vm.create", Create
}

command! {
    /// Boots the VM; a paused one is resumed.
    Boot(()) -> (), Put "vm.boot", Boot
}

command! {
    /// Gives the VM's configuration, state, memory and devices.
    Info(()) -> VmInfo, Get "vm.info", Info
}

command! {
    /// Switches the VM off. Its configuration stays.
    Shutdown(()) -> (), Put "vm.shutdown", Shutdown
}

command! {
    /// Switches the VM off and boots it again.
    Reboot(()) -> (), Put "vm.reboot", Reboot
}

command! {
    /// Removes the VM, switching it off first. Without a VM there is nothing to do.
    Delete(()) -> (), Put "vm.delete", Delete
}

command! {
    /// Pauses the running VM.
    Pause(()) -> (), Put "vm.pause", Pause
}

command! {
    /// Resumes the paused VM.
    Resume(()) -> (), Put "vm.resume", Resume
}

/// The request of `vm.create`.
#[derive(Debug)]
pub struct CreateRequest {
    /// The configuration, for `vm.info`: defaults and automatic ids are filled in.
    pub config: VmConfig,
    /// Its checked form, to build the machine from.
    pub spec: MachineSpec,
    /// Descriptors that came with the request.
    pub fds: Vec<OwnedFd>,
}

impl CreateRequest {
    /// A request for `config`, which is checked as the VMM checks it.
    ///
    /// # Errors
    /// All that is wrong with the configuration.
    pub fn new(config: VmConfig) -> Result<Self, ApiError> {
        let spec = MachineSpec::check(&config)?;
        Ok(Self { config, spec, fds: Vec::new() })
    }
}

impl Decode for CreateRequest {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        let Checked { config, spec } = parse_and_check(&incoming.body, incoming.unknown_fields)?;
        Ok(Self { config, spec, fds: incoming.fds })
    }
}

impl Encode for CreateRequest {
    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(&self.config)
    }
}
