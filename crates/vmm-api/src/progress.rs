//! How far a migration is, as clients are told.

use serde::{Deserialize, Serialize};

use crate::command::{Decode, Encode, Incoming, JSON, decode_json, encode_json};
use crate::error::ApiError;

/// What became of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationStatus {
    /// There was none yet.
    #[default]
    None,
    /// It is under way.
    Active,
    /// Nobody knows where the VM is; it stays paused here.
    InDoubt,
    /// The guest is at the destination, without all of its memory, and the link is lost: it stands still.
    Severed,
    /// It is done.
    Completed,
    /// It failed; the VM is where it was.
    Failed,
    /// It was cancelled; the VM is where it was.
    Cancelled,
}

impl MigrationStatus {
    /// Every word.
    pub const ALL: [Self; 7] = [
        Self::None,
        Self::Active,
        Self::InDoubt,
        Self::Severed,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
    ];
}

/// Which end of a migration this VMM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationRole {
    /// It gives the VM away.
    Source,
    /// It gets the VM.
    Destination,
}

impl MigrationRole {
    /// Every word.
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];
}

/// The reply of `vm.migration-progress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationProgressReply {
    /// What became of it.
    pub status: MigrationStatus,
    /// Which end this is; absent where there was no migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<MigrationRole>,
    /// Its number, as in events.
    pub job: u64,
    /// It only asks whether the destination would take the VM.
    pub check: bool,
    /// What this end does: a state of the protocol, such as `Copying`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Time since it began, or that it took.
    pub elapsed_us: u64,
    /// Bytes of guest memory there are.
    pub memory_bytes: u64,
    /// Bytes on the link so far, those sent again included.
    pub sent_bytes: u64,
    /// Passes over memory, the one under way included.
    pub passes: u32,
    /// Bytes per second on the link of late; absent while it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Bytes per second that the guest writes to; absent while it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<u64>,
    /// By how much vCPUs are slowed down, in percent of their time.
    pub throttle: u8,
    /// How long the guest would stand still if the last pass began now; absent while it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_blackout_ms: Option<u64>,
    /// Bytes of guest memory that the destination does not have yet, while its guest runs; absent before and after that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owed_bytes: Option<u64>,
    /// How long the guest stood still, as the source saw it; absent before the end, and for one that was paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_us: Option<u64>,
    /// Why it failed, or stands still, outermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
}

impl Encode for MigrationProgressReply {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        encode_json(self)
    }
}

impl Decode for MigrationProgressReply {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        decode_json(&incoming.body)
    }
}
