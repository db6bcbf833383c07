//! What a driver asks of a disk (virtio 1.3, section 5.2.6).

use vmm_device_model::dma::GuestRam;

use super::config::{F_DISCARD, F_WRITE_ZEROES, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS, SECTOR};
use crate::chain::{self, Chain};

/// Bytes of a serial number.
pub(super) const ID_LEN: usize = 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Bit of a range's flags; the others are reserved.
const UNMAP: u32 = 1;

/// The byte that answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request whose form is right; its numbers are still the driver's. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, may_unmap: bool },
}

/// Parses a request whose status byte was taken away already. What is left in the chain is the data of a
/// read or write. Requests of a feature that is not among `features` are unknown.
pub(super) fn parse(chain: &mut Chain, memory: &GuestRam, features: u64) -> Result<Command, Status> {
    let header = chain.take_front::<16>(memory).ok().flatten().ok_or(Status::IoError)?;
    let kind = le32(&header, 0);
    let offset = le64(&header, 8).checked_mul(SECTOR);
    match kind {
        IN | OUT => {
            let (data, other) = match kind {
                IN => (&chain.writable, &chain.readable),
                _ => (&chain.readable, &chain.writable),
            };
            let whole = chain::len(data).is_multiple_of(SECTOR);
            let offset = offset.filter(|_| whole && other.is_empty()).ok_or(Status::IoError)?;
            Ok(if kind == IN { Command::Read { offset } } else { Command::Write { offset } })
        }
        FLUSH => Ok(Command::Flush),
        GET_ID if chain::len(&chain.writable) >= ID_LEN as u64 => Ok(Command::GetId),
        GET_ID => Err(Status::IoError),
        DISCARD if features & F_DISCARD != 0 => parse_range(kind, chain, memory),
        WRITE_ZEROES if features & F_WRITE_ZEROES != 0 => parse_range(kind, chain, memory),
        _ => Err(Status::Unsupported),
    }
}

/// A discard or write-zeroes of the one range that the configuration space allows.
fn parse_range(kind: u32, chain: &mut Chain, memory: &GuestRam) -> Result<Command, Status> {
    let range = chain.take_front::<16>(memory).ok().flatten().ok_or(Status::IoError)?;
    let (sectors, flags) = (le32(&range, 8), le32(&range, 12));
    let known = if kind == DISCARD { 0 } else { UNMAP };
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    let most = if kind == DISCARD { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
    if !chain.readable.is_empty() || sectors > most {
        return Err(Status::IoError);
    }
    let offset = le64(&range, 0).checked_mul(SECTOR).ok_or(Status::IoError)?;
    let len = u64::from(sectors) * SECTOR;
    Ok(match kind {
        DISCARD => Command::Discard { offset, len },
        _ => Command::WriteZeroes { offset, len, may_unmap: flags & UNMAP != 0 },
    })
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
