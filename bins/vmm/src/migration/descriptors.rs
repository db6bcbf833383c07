//! Descriptors of guest memory beside the bytes of a UNIX socket (SCM_RIGHTS of unix(7)).

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vmm_memory_manager::handover::{MAX_FILES, SharedPiece};
use vmm_migration_protocol::{DescriptorRange, MemoryError, MemoryRange};

/// Room for [`MAX_FILES`] descriptors.
const ROOM: usize = rustix::cmsg_space!(ScmRights(MAX_FILES));

/// Writes as much of `bytes` as goes, with `files` at its first byte.
pub(super) fn send(stream: &UnixStream, bytes: &[u8], files: &[File]) -> io::Result<usize> {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Reads what there is into `bytes`, and the descriptors beside it into `files`, which never holds more than [`MAX_FILES`].
///
/// Too many, or such as this process could not take, are `InvalidData`.
pub(super) fn receive(stream: &UnixStream, bytes: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let told = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(new) = message {
            files.extend(new);
        }
    }
    if files.len() > MAX_FILES || told.flags.contains(ReturnFlags::CTRUNC) {
        files.clear();
        return Err(io::Error::new(ErrorKind::InvalidData, "more descriptors than can be taken"));
    }
    Ok(told.bytes)
}

/// The pieces of memory in the files, as the wire says it.
pub(crate) fn ranges(pieces: &[SharedPiece]) -> Result<Vec<DescriptorRange>, MemoryError> {
    let range = |piece: &SharedPiece| {
        Ok(DescriptorRange {
            range: MemoryRange::new(piece.gpa, piece.size)?,
            offset: piece.offset,
            descriptor: u32::try_from(piece.file).unwrap_or(u32::MAX),
        })
    };
    pieces.iter().map(range).collect()
}

/// The same, as it was said.
pub(super) fn pieces(ranges: &[DescriptorRange]) -> Vec<SharedPiece> {
    let piece = |of: &DescriptorRange| SharedPiece {
        gpa: of.range.gpa(),
        size: of.range.length(),
        file: usize::try_from(of.descriptor).unwrap_or(usize::MAX),
        offset: of.offset,
    };
    ranges.iter().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn inode(file: impl Into<OwnedFd>) -> u64 {
        File::from(file.into()).metadata().unwrap().ino()
    }

    #[test]
    fn descriptors_come_with_the_bytes_they_were_sent_with_and_in_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        let inodes: Vec<_> = files.iter().map(|file| file.metadata().unwrap().ino()).collect();
        assert_eq!(send(&ours, b"with", &files).unwrap(), 4);
        let (mut bytes, mut got) = ([0; 8], Vec::new());
        assert_eq!(receive(&theirs, &mut bytes[..1], &mut got).unwrap(), 1);
        assert_eq!(got.drain(..).map(inode).collect::<Vec<_>>(), inodes);
        assert_eq!(receive(&theirs, &mut bytes, &mut got).unwrap(), 3);
        assert!(got.is_empty());
        drop(ours);
        assert_eq!(receive(&theirs, &mut bytes, &mut got).unwrap(), 0);
    }

    #[test]
    fn more_descriptors_than_there_may_be_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let all: Vec<_> = (0..MAX_FILES).map(|_| file.try_clone().unwrap()).collect();
        let mut got = Vec::new();
        send(&ours, b"x", &all).unwrap();
        assert_eq!(receive(&theirs, &mut [0; 8], &mut got).unwrap(), 1);
        assert_eq!(got.len(), MAX_FILES);
        send(&ours, b"x", &all[..1]).unwrap();
        assert_eq!(receive(&theirs, &mut [0; 8], &mut got).unwrap_err().kind(), ErrorKind::InvalidData);
        assert!(got.is_empty());
    }
}
