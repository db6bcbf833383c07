//! Wire types of a VM's configuration: the contract's objects with its names and defaults.
//!
//! Each object is declared once, together with its table (name, older names, key in option strings, default, status):
//! the same table reads JSON and option strings, writes JSON, and says what is nearest to an unknown name.
//! All faults of a document are found in one pass, each with its path. What a value means is not decided here but in
//! [`crate::spec`].

mod console;
mod devices;
mod fault;
pub(crate) mod json;
mod machine;
pub(crate) mod nearest;
pub(crate) mod path;
pub(crate) mod reader;
mod requests;
pub mod table;
mod vm;
pub(crate) mod wire;

pub use console::{ConsoleConfig, ConsoleMode, DebugConsoleConfig, SerialConfig};
pub use devices::{
    BalloonConfig, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, ImageType, IvshmemConfig,
    LockGranularity, NetConfig, PmemConfig, PvmemcontrolConfig, RateLimitGroupConfig, RateLimiterConfig,
    RngConfig, RtcConfig, TokenBucket, UserDeviceConfig, VdpaConfig, VhostMode, VirtQueueAffinity,
    VsockConfig,
};
pub(crate) use fault::record;
pub use fault::{Fault, FaultKind, UnknownFields, Warning};
pub use json::{MAX_DEPTH, MAX_DOCUMENT};
pub use machine::{
    CoreScheduling, CpuAffinity, CpuFeatures, CpuTopology, CpusConfig, FwCfgConfig, FwCfgItem, HotplugMethod,
    LandlockConfig, MemoryConfig, MemoryZoneConfig, NumaConfig, NumaDistance, PayloadConfig,
    PciSegmentConfig, PlatformConfig, TpmConfig,
};
pub use requests::{
    Compression, GuestClock, LogLevel, LogLevelConfig, MemoryRestoreMode, MigrationMode,
    ReceiveMigrationData, RestoreConfig, RestoredConsoleConfig, RestoredDiskConfig, RestoredNetConfig,
    RestoredNicConfig, RestoredVsockConfig, SendMigrationData, TimeoutStrategy, VmCoredumpData,
    VmMemoryZoneUpdateData, VmRemoveDevice, VmResize, VmResizeDisk, VmResizeZone, VmSnapshotConfig,
};
pub use vm::VmConfig;
pub(crate) use vm::older_fields;
pub use wire::Bytes;

use json::Node;
use reader::Reader;
use wire::{Walk, Wire};

/// A document that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed<T = VmConfig> {
    /// The configuration, defaults filled in.
    pub config: T,
    /// What its author should know.
    pub warnings: Vec<Warning>,
}

/// Reads the configuration of a VM, the body of `vm.create`.
///
/// # Errors
///
/// All faults of the document, in its order: broken JSON (alone), wrong types, unknown and retired fields, and fields
/// that this build does not support away from their default.
pub fn parse_vm_config(json: &[u8], unknown: UnknownFields) -> Result<Parsed, Vec<Fault>> {
    let draft = read_vm_config(json, unknown)?;
    let mut faults = draft.faults;
    faults.extend(Walk::faults_of(&draft.config));
    if faults.is_empty() {
        Ok(Parsed { config: draft.config, warnings: draft.warnings })
    } else {
        Err(faults)
    }
}

/// Reads one object of the contract, the body of a request.
pub(crate) fn read_object<T: Wire>(json: &[u8], unknown: UnknownFields) -> Result<T, Vec<Fault>> {
    let node = Node::parse(json).map_err(|fault| vec![fault])?;
    let mut reader = Reader::new(unknown);
    let object = T::read(&node, &mut reader);
    match (object, reader.finish()) {
        (Some(object), (faults, _)) if faults.is_empty() => Ok(object),
        (_, (faults, _)) => Err(faults),
    }
}

/// A configuration with whatever is wrong with it; where a value is wrong it holds the default.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) config: VmConfig,
    pub(crate) faults: Vec<Fault>,
    pub(crate) warnings: Vec<Warning>,
}

/// Reads types and names, and goes on at a fault.
pub(crate) fn read_vm_config(json: &[u8], unknown: UnknownFields) -> Result<Draft, Vec<Fault>> {
    let mut node = Node::parse(json).map_err(|fault| vec![fault])?;
    let mut reader = Reader::new(unknown);
    vm::fold_old_payload(&mut node, &mut reader);
    let config = VmConfig::read(&node, &mut reader);
    let (faults, warnings) = reader.finish();
    match config {
        Some(config) => Ok(Draft { config, faults, warnings }),
        None => Err(faults),
    }
}

impl VmConfig {
    /// What this build does not support of this configuration.
    #[must_use]
    pub fn not_built(&self) -> Vec<Fault> {
        Walk::faults_of(self)
    }
}
