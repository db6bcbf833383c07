//! Commands about the VM.

use super::command;
use crate::command::{Decode, Encode, Incoming, JSON, encode_json};
use crate::config::{
    FaultKind, ReceiveMigrationData, RestoreConfig, SendMigrationData, VmConfig, VmCoredumpData, VmResize,
    VmResizeDisk, VmResizeZone, VmSnapshotConfig,
};
use crate::error::{ApiError, Code, FaultReport};
use crate::info::{CountersReply, JsonText, ValidateReply, VmInfo};
use crate::progress::MigrationProgressReply;
use crate::spec::{Checked, MachineSpec, parse_and_check};
use std::os::fd::OwnedFd;

command! {
    /// Stores the configuration of a VM. It is not booted.
    Create(CreateRequest) -> (), Put "vm.create", Create
}

command! {
    /// Boots the VM; a paused one is resumed.
    Boot(()) -> (), Put "vm.boot", Boot, BootFailed, Cancelled
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
    Reboot(()) -> (), Put "vm.reboot", Reboot, BootFailed, Cancelled
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

command! {
    /// Checks a configuration against this build and this host, and changes nothing.
    Validate(ValidateRequest) -> ValidateReply, Put "vm.validate", Validate
}

command! {
    /// Gives what the devices have counted since the machine was built.
    Counters(()) -> CountersReply, Get "vm.counters", Counters
}

command! {
    /// Gives the stages of the last boot in the Trace Event Format.
    BootTrace(()) -> JsonText, Get "vm.boot-trace", BootTrace
}

command! {
    /// Presses the guest's power button.
    PowerButton(()) -> (), Put "vm.power-button", PowerButton
}

command! {
    /// Raises a non-maskable interrupt on every vCPU.
    Nmi(()) -> (), Put "vm.nmi", Nmi
}

command! {
    /// Changes the number of vCPUs, the memory, the balloon.
    Resize(VmResize) -> (), Put "vm.resize", Resize
}

command! {
    /// Changes the size of a disk.
    ResizeDisk(VmResizeDisk) -> (), Put "vm.resize-disk", ResizeDisk
}

command! {
    /// Changes the size of a memory zone.
    ResizeZone(VmResizeZone) -> (), Put "vm.resize-zone", ResizeZone
}

command! {
    /// Writes a snapshot of the paused VM, or a live one of a VM that runs.
    Snapshot(VmSnapshotConfig) -> (), Put "vm.snapshot", Snapshot, InvalidConfig, SnapshotFailed, Cancelled
}

command! {
    /// Cancels the boot, restore, snapshot or migration under way. The VM is as it was.
    Cancel(()) -> (), Put "vm.cancel", Cancel
}

command! {
    /// Writes the guest's memory and registers as a core file.
    Coredump(VmCoredumpData) -> (), Put "vm.coredump", Coredump
}

command! {
    /// Makes a VM of a snapshot.
    Restore(RestoreConfig) -> (), Put "vm.restore", Restore, InvalidConfig, NotBuilt, NoSnapshot, RestoreFailed, Cancelled
}

command! {
    /// Waits for a VM from another VMM, and answers when it is here.
    ReceiveMigration(ReceiveMigrationData) -> (), Put "vm.receive-migration", ReceiveMigration, InvalidConfig, NotBuilt, MigrationFailed, Cancelled
}

command! {
    /// Gives the VM to another VMM, and ends when it is there.
    SendMigration(SendMigrationData) -> (), Put "vm.send-migration", SendMigration, InvalidConfig, NotBuilt, MigrationFailed, Cancelled
}

command! {
    /// Tells how far the migration under way is, or how the last one ended.
    MigrationProgress(()) -> MigrationProgressReply, Get "vm.migration-progress", MigrationProgress
}

command! {
    /// In doubt where the VM is: takes it that it is here, and lets it go on. If it runs at the destination too, both write to its disks.
    MigrationKeep(()) -> (), Put "vm.migration-keep", MigrationKeep, WrongPhase, MigrationFailed
}

command! {
    /// In doubt where the VM is: takes it that it is at the destination, and gives it up here. If it is not there, it is lost.
    MigrationYield(()) -> (), Put "vm.migration-yield", MigrationYield, WrongPhase, MigrationFailed
}

/// The request of `vm.validate`: the document, read.
#[derive(Debug)]
pub struct ValidateRequest {
    /// The checked configuration, or all that is wrong with it.
    pub checked: Result<Box<Checked>, Vec<FaultReport>>,
}

impl Decode for ValidateRequest {
    /// Only what is no document at all is refused; other faults are the answer.
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        let checked = match parse_and_check(&incoming.body, incoming.unknown_fields) {
            Ok(checked) => Ok(Box::new(checked)),
            Err(faults) if faults.iter().any(|fault| fault.kind == FaultKind::Syntax) => {
                return Err(faults.into());
            }
            Err(faults) => Err(faults.into_iter().map(FaultReport::from).collect()),
        };
        Ok(Self { checked })
    }
}

/// For clients: only a configuration that passed the checks of this build has a form to send.
impl Encode for ValidateRequest {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        match &self.checked {
            Ok(checked) => encode_json(&checked.config),
            Err(faults) => Err(ApiError::new(Code::InvalidConfig, "the configuration is refused")
                .with_faults(faults.clone())),
        }
    }
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
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(&self.config)
    }
}
