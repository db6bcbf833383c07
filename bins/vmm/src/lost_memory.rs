//! Guest memory that is gone: it is a private mapping of a snapshot's file, and the file has shrunk or cannot be read. A vCPU that
//! touches it stops; any other thread gets SIGBUS. Or it is filled from the snapshot while the guest runs, and what is in there is
//! not what it was.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use vmm_memory_manager::fill::FillError;
use vmm_memory_manager::map::MappedFile;

use crate::exit::{ExitCode, chain};
use crate::sandbox::last_words;
use crate::signals;

/// What guest memory is a mapping of.
static FILES: Mutex<Vec<MappedFile>> = Mutex::new(Vec::new());

/// From now on guest memory is a mapping of these files.
pub(crate) fn watch(files: Vec<MappedFile>) {
    *FILES.lock().unwrap_or_else(PoisonError::into_inner) = files;
}

/// A file that is shorter than what is mapped of it.
pub(crate) fn shrunk() -> Option<PathBuf> {
    let files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let short = |file: &&MappedFile| {
        let size = file.path.metadata().map(|metadata| metadata.len());
        size.is_ok_and(|size| size < file.addresses.len() as u64)
    };
    files.iter().find(short).map(|file| file.path.clone())
}

/// For the handler of SIGBUS: if `address` is guest memory that a file holds, says which file, and with what status the process
/// is to end. Only what is async-signal-safe is done (signal-safety(7)).
pub(crate) fn in_handler(address: usize) -> Option<ExitCode> {
    // Who is changing the list is not waited for: it may be the thread that the signal came to.
    let files = FILES.try_lock().ok()?;
    let file = files.iter().find(|file| file.addresses.contains(&address))?;
    let path = file.path.as_os_str().as_encoded_bytes();
    last_words(
        module_path!(),
        format_args!(
            "guest memory is lost: the snapshot's file {} has shrunk or cannot be read (see docs/snapshot.md)",
            Bytes(path)
        ),
    );
    Some(ExitCode::LostMemory)
}

/// Guest memory that threads fill from a snapshot cannot be read. vCPUs and devices may wait for it, so that nothing can be
/// taken apart.
pub(crate) fn not_filled(error: &FillError) {
    log::error!("guest memory is lost: {} (see docs/snapshot.md)", chain(error));
    signals::end_at_once(ExitCode::LostMemory);
}

/// A device of a guest that is over waits for such memory, and the snapshot's file does not answer. Only the end of the process
/// lets go of it without writing what the guest never wrote to a disk.
pub(crate) fn withheld(error: &dyn std::error::Error) {
    let error = chain(error);
    log::error!("guest memory is lost: the snapshot is not read to its end: {error} (see docs/snapshot.md)");
    signals::end_at_once(ExitCode::LostMemory);
}

/// Text that needs no heap; what is not ASCII is a question mark.
struct Bytes<'a>(&'a [u8]);

impl std::fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use std::fmt::Write as _;
        let visible = |byte: u8| if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' };
        self.0.iter().try_for_each(|byte| f.write_char(visible(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shrank_is_found_by_its_size_and_by_address() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        std::fs::write(&path, [0; 8192]).unwrap();
        watch(vec![MappedFile { path: path.clone(), addresses: 0x1000..0x3000 }]);
        assert_eq!(shrunk(), None);
        assert!(in_handler(0xfff).is_none() && in_handler(0x3000).is_none());
        assert_eq!(in_handler(0x2fff), Some(ExitCode::LostMemory));
        std::fs::write(&path, [0; 4096]).unwrap();
        assert_eq!(shrunk(), Some(path));
        watch(Vec::new());
        assert_eq!((shrunk(), in_handler(0x2000)), (None, None));
    }

    #[test]
    fn memory_that_cannot_be_filled_ends_the_process() {
        const CHILD: &str = "VMM_TEST_LOSES_MEMORY";
        let me = "lost_memory::tests::memory_that_cannot_be_filled_ends_the_process";
        if std::env::var_os(CHILD).is_some() {
            not_filled(&FillError::Faults(std::io::ErrorKind::NotFound.into()));
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let status = child.args(["--exact", me]).env(CHILD, "1").status().unwrap();
        assert_eq!(status.code(), Some(ExitCode::LostMemory as i32));
    }

    #[test]
    fn a_path_needs_no_heap_and_no_trust() {
        assert_eq!(Bytes(b"/a b\x1b\xff").to_string(), "/a b??");
    }
}
