//! The eventfd behind `completion_fd`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use crate::sys;

/// Readable from `set` to `clear`.
#[derive(Debug)]
pub(crate) struct Notifier(File);

impl Notifier {
    pub(crate) fn new() -> io::Result<Self> {
        sys::eventfd().map(Self)
    }

    pub(crate) fn set(&self) {
        // It can only fail when the counter is full, and then it is readable as it should be.
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        // It fails when it was not set, which is what is wanted.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
