//! A program that can do no harm: it writes in one folder only, whatever it is told, and has no rights to gain.
//!
//! By Landlock (landlock(7)), which holds for a superuser's process, too. What lets a fuzzer make up the paths of files
//! that a VMM would create and truncate.
#![expect(
    unsafe_code,
    reason = "Landlock has no wrapper in the C library; the child restricts itself before it starts"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// The rights of the first version of Landlock that bear on reading and running.
const READ: u64 = EXECUTE | READ_FILE | READ_DIR;
const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
/// Every right of the third version: to make, remove, link and truncate files of any kind, too.
const ALL: u64 = (1 << 15) - 1;
/// The version that controls truncation.
const WANTED_VERSION: libc::c_long = 3;
/// Rights that a file can have; the others are for folders.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14;

/// `struct landlock_ruleset_attr`, as its first version had it.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: libc::c_int,
}

/// Memory that a confined program may map in bytes: made-up sizes take no more.
const MOST_MEMORY: u64 = 4 << 30;

/// Lets `command`, once it runs, write in `folder` and to KVM and the null device only, read the system and `program`,
/// map 4 GiB, and gain no rights.
///
/// # Errors
/// The kernel has no Landlock that controls truncation (Linux 6.2), or a path cannot be opened.
pub fn confine(command: &mut Command, program: &Path, folder: &Path) -> io::Result<()> {
    let ruleset = ruleset()?;
    for path in ["/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev/urandom", "/dev/zero"] {
        if Path::new(path).exists() {
            allow(&ruleset, Path::new(path), READ)?;
        }
    }
    allow(&ruleset, program, READ)?;
    allow(&ruleset, Path::new("/dev/null"), READ | WRITE_FILE)?;
    allow(&ruleset, Path::new("/dev/kvm"), READ | WRITE_FILE)?;
    allow(&ruleset, folder, ALL)?;
    let restrict = move || restrict(&ruleset);
    // SAFETY: between fork and exec the closure makes system calls only; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(restrict) };
    command.current_dir(folder);
    Ok(())
}

fn ruleset() -> io::Result<OwnedFd> {
    let (none, no_size, version_flag) = (std::ptr::null::<RulesetAttr>(), 0usize, 1u32);
    // SAFETY: with this flag the kernel only tells its version, and reads no memory.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, no_size, version_flag) };
    if version < WANTED_VERSION {
        return Err(io::Error::other(format!("the kernel has Landlock {version}, not {WANTED_VERSION}")));
    }
    let attr = RulesetAttr { handled_access_fs: ALL };
    // SAFETY: the attribute is read for as many bytes as are said.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0u32)
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn allow(ruleset: &OwnedFd, path: &Path, access: u64) -> io::Result<()> {
    let place = File::open(path)?;
    let allowed = if place.metadata()?.is_dir() { access } else { access & OF_FILES };
    let attr = PathBeneathAttr { allowed_access: allowed, parent_fd: place.as_raw_fd() };
    let (kind, flags) = (1u32, 0u32);
    // SAFETY: the kernel reads the attribute of this kind, whose descriptor is open.
    let result = unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), kind, &raw const attr, flags)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs in the child.
fn restrict(ruleset: &OwnedFd) -> io::Result<()> {
    let check = |result: libc::c_long| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) })?;
    let limit = libc::rlimit { rlim_cur: MOST_MEMORY, rlim_max: MOST_MEMORY };
    // SAFETY: the limit is read during the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_outside_of_the_folder() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let precious = outside.path().join("precious");
        std::fs::write(&precious, "p").unwrap();
        let shell = Path::new("/bin/sh").canonicalize().unwrap();
        let run = |line: &str| {
            let mut command = Command::new(&shell);
            command.args(["-c", line]).env("O", outside.path());
            confine(&mut command, &shell, inside.path()).unwrap();
            command.output().unwrap().status.success()
        };
        assert!(run("echo y > made; mkdir d; mv made d/; test \"$(cat d/made)\" = y; echo x > /dev/null"));
        for line in [
            "echo x > $O/made",
            "echo x >> $O/precious",
            ": > $O/precious",
            "rm $O/precious",
            "mv $O/precious .",
            "ln $O/precious here",
            "mkdir $O/folder",
            "cat $O/precious",
        ] {
            assert!(!run(line), "{line}");
        }
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "p");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
