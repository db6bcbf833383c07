//! The manifest: what a snapshot is, and the hashes of all that belongs to it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{Hash, PAGE, Place, ReadError};

/// Format of snapshots whose memory files are sparse: offsets in them are those in the region.
pub const SPARSE: u32 = 1;
/// Format of snapshots whose memory files are packed: what is held lies in them without gaps.
pub const PACKED: u32 = 2;
/// Oldest format that this build reads.
pub const OLDEST: u32 = SPARSE;
/// Newest format that this build reads.
pub const NEWEST: u32 = PACKED;
/// Most bytes of a manifest.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Most bytes of a state file.
pub const MAX_STATE: u64 = 256 << 20;
/// Most bytes of a chunk table: enough for 50 TiB of memory.
pub const MAX_TABLE: u64 = 1 << 30;
/// Most regions of a snapshot.
pub const MAX_REGIONS: usize = 256;

/// Guest physical addresses have at most 52 bits (Intel SDM volume 3, section 4.1.4).
const MAX_ADDRESS: u64 = 1 << 52;
/// How every version of the manifest begins; the number follows.
const BEGIN: &[u8] = b"{\"format\":";
/// What stands before the id, with which every version of the manifest ends.
const BEFORE_ID: &[u8] = b",\"id\":\"";
const AFTER_ID: &[u8] = b"\"}\n";

pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const STATE: &str = "state.cbor";
pub(super) const TABLE: &str = "chunks.bin";
/// Ends the name of a file that is not finished.
pub(super) const PARTIAL: &str = ".partial";

pub(super) fn memory_name(index: usize) -> String {
    format!("memory-{index}.bin")
}

/// A contiguous part of a memory zone in guest physical memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// The zone's name in the configuration. A zone may have several regions.
    pub zone: String,
    /// Guest physical address of the first byte; a whole page.
    pub gpa: u64,
    /// Bytes; whole pages.
    pub size: u64,
    /// Name of its memory file.
    pub file: String,
}

impl Region {
    /// It, without its file.
    #[must_use]
    pub fn place(&self) -> Place {
        Place { zone: self.zone.clone(), gpa: self.gpa, size: self.size }
    }
}

/// A file of the snapshot with what it must contain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Name in the directory.
    pub file: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the content.
    pub sha256: Hash,
}

/// The snapshot that an incremental one builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// The parent's id.
    pub id: Hash,
    /// Where its directory is: absolute, or relative to the directory of this snapshot.
    pub location: String,
}

/// The content of `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// Version of the VMM that wrote it; for people.
    pub vmm: String,
    /// Architecture of the guest, as in a target triple.
    pub architecture: String,
    /// When it was written: milliseconds since 1970-01-01T00:00:00Z.
    pub created_ms: u64,
    /// The VM's configuration; this crate does not look into it.
    pub config: Box<RawValue>,
    /// The parent of an incremental snapshot.
    pub parent: Option<Parent>,
    /// Encoded [`Record`](crate::Record) of the VM's [`RecordSet`](crate::RecordSet).
    pub state: DataFile,
    /// The chunk table. Its hash is the root of the hashes of memory.
    pub chunks: DataFile,
    /// Memory, ascending by address.
    pub memory: Vec<Region>,
    /// SHA-256 of all bytes of the manifest before `,"id":`.
    pub id: Hash,
}

/// [`Manifest`] as it is before its id is known.
#[derive(Debug, Serialize)]
pub(super) struct Unsigned<'a> {
    pub(super) format: u32,
    pub(super) vmm: &'a str,
    pub(super) architecture: &'a str,
    pub(super) created_ms: u64,
    pub(super) config: &'a RawValue,
    pub(super) parent: Option<&'a Parent>,
    pub(super) state: &'a DataFile,
    pub(super) chunks: &'a DataFile,
    pub(super) memory: &'a [Region],
}

impl Unsigned<'_> {
    /// The bytes of the manifest and its id.
    pub(super) fn encode(&self) -> Result<(Vec<u8>, Hash), serde_json::Error> {
        let mut bytes = serde_json::to_vec(self)?;
        // The closing brace comes after the id.
        bytes.pop();
        let id = Hash::of(&bytes);
        bytes.extend_from_slice(BEFORE_ID);
        bytes.extend_from_slice(id.to_string().as_bytes());
        bytes.extend_from_slice(AFTER_ID);
        Ok((bytes, id))
    }
}

impl Manifest {
    /// Reads a manifest that may come from anywhere; `path` is its place, for errors.
    ///
    /// # Errors
    /// [`ReadError::NotASnapshot`], [`Newer`](ReadError::Newer), [`Older`](ReadError::Older),
    /// [`Hash`](ReadError::Hash), [`Manifest`](ReadError::Manifest), [`Leaves`](ReadError::Leaves) or
    /// [`Absurd`](ReadError::Absurd).
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self, ReadError> {
        let format = format_of(bytes).ok_or_else(|| ReadError::NotASnapshot { path: path.to_owned() })?;
        if format > NEWEST {
            return Err(ReadError::Newer { path: path.to_owned(), found: format, known: NEWEST });
        }
        if format < OLDEST {
            return Err(ReadError::Older { path: path.to_owned(), found: format, oldest: OLDEST });
        }
        let signed = bytes.len().checked_sub(BEFORE_ID.len() + 64 + AFTER_ID.len());
        let (body, trailer) = signed.and_then(|at| bytes.split_at_checked(at)).unwrap_or((bytes, &[]));
        let id = trailer.strip_prefix(BEFORE_ID).and_then(|rest| rest.strip_suffix(AFTER_ID));
        let id = id.and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<Hash>().ok());
        if id != Some(Hash::of(body)) {
            return Err(ReadError::Hash { path: path.to_owned() });
        }
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|source| ReadError::Manifest { path: path.to_owned(), source })?;
        manifest.check(path)?;
        Ok(manifest)
    }

    fn check(&self, path: &Path) -> Result<(), ReadError> {
        let files = [&self.state.file, &self.chunks.file];
        let mut names: Vec<&String> =
            files.into_iter().chain(self.memory.iter().map(|region| &region.file)).collect();
        if let Some(name) = names.iter().find(|name| !is_plain(name)) {
            return Err(ReadError::Leaves { path: path.to_owned(), name: (*name).clone() });
        }
        let absurd = |what: String| Err(ReadError::Absurd { path: path.to_owned(), what });
        names.sort_unstable();
        if let Some([twice, _]) = names.array_windows().find(|[a, b]| a == b) {
            return absurd(format!("file {twice:?} has two purposes"));
        }
        for (DataFile { file, size, .. }, most) in [(&self.state, MAX_STATE), (&self.chunks, MAX_TABLE)] {
            if *size > most {
                return absurd(format!("{size} bytes in {file}, at most {most} are possible"));
            }
        }
        check_regions(&self.memory).or_else(absurd)
    }

    /// Refuses a snapshot of another architecture than `architecture`. Offline tools need not ask.
    ///
    /// # Errors
    /// It is of another one.
    pub fn check_architecture(&self, architecture: &'static str) -> Result<(), ReadError> {
        if self.architecture == architecture {
            return Ok(());
        }
        Err(ReadError::Architecture { found: self.architecture.clone(), expected: architecture })
    }
}

/// The version that a manifest says to have; `None` for what is no manifest.
fn format_of(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.strip_prefix(BEGIN)?.split(|byte| *byte == b',').next()?;
    if digits.is_empty() || digits.len() > 9 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// A single name, not hidden, none of the names that mean something else.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let reserved = name == MANIFEST || name.ends_with(PARTIAL);
    (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain) && !reserved
}

/// Says what is wrong with a list of regions.
pub(super) fn check_regions(regions: &[Region]) -> Result<(), String> {
    if regions.len() > MAX_REGIONS {
        return Err(format!("{} memory regions, at most {MAX_REGIONS} are possible", regions.len()));
    }
    let mut free = 0;
    for Region { zone, gpa, size, .. } in regions {
        let end = gpa.checked_add(*size).filter(|end| *end <= MAX_ADDRESS);
        let Some(end) = end.filter(|_| *size > 0 && gpa.is_multiple_of(PAGE) && size.is_multiple_of(PAGE))
        else {
            return Err(format!("region of zone {zone:?} at {gpa:#x} cannot have {size:#x} bytes"));
        };
        if *gpa < free {
            return Err(format!("region of zone {zone:?} at {gpa:#x} is not behind the one before it"));
        }
        free = end;
    }
    Ok(())
}
