//! A VMM that is run by a user other than the superuser, whoever runs the tests, and one on a host that finds names in another way.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;
use std::process::Command;

use super::{Scratch, Vmm, binary};

/// No user's on any system that matters (65534 owns what has no owner here).
const UID: u32 = 54_321;

/// In a mount namespace of its own, where `/dev/kvm` is everybody's and `/dev/userfaultfd`, if there is one, has mode `$2`;
/// then the program `$3` with its arguments as user `$1`. It is mounted where that user can get at it.
const SCRIPT: &str = r#"
set -e
uid=$1 mode=$2 program=$3 folder=$4
shift 4
mount -t tmpfs -o mode=755 tmpfs "$folder"
device() {
    mknod -m "$2" "$folder/$1" $(stat -c 'c 0x%t 0x%T' "/dev/$1")
    mount --bind "$folder/$1" "/dev/$1"
}
device kvm 666
test ! -e /dev/userfaultfd || device userfaultfd "$mode"
touch "$folder/vmm"
mount --bind "$program" "$folder/vmm"
exec setpriv --reuid="$uid" --regid="$uid" --clear-groups --inh-caps=-all -- "$folder/vmm" "$@"
"#;

/// In a mount namespace of its own, where `$1` is nsswitch.conf(5): the program that follows.
const OTHER_NAMES: &str = r#"set -e; mount --bind "$1" /etc/nsswitch.conf; shift; exec "$@""#;

impl Vmm {
    /// Starts it on a host whose first service for hosts' names is a module, which no thread may load under its filter; `None` if only
    /// root could do that.
    ///
    /// # Panics
    /// When it cannot be started so.
    #[must_use]
    pub fn among_name_services(scratch: &Scratch) -> Option<Self> {
        if fs::metadata("/proc/self").expect("a /proc").uid() != 0 {
            return None;
        }
        let (modules, services) = (scratch.path("modules"), scratch.path("nsswitch.conf"));
        fs::create_dir_all(&modules).expect("a folder");
        // Whatever library: it does not come to be asked.
        let maps = fs::read_to_string("/proc/self/maps").expect("its mappings");
        let library =
            maps.lines().find_map(|line| line.split_whitespace().nth(5).filter(|path| path.contains(".so")));
        fs::copy(library.expect("a library"), modules.join("libnss_strange.so.2")).expect("a copy");
        fs::write(&services, "hosts: strange files dns\n").expect("a file");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", OTHER_NAMES, "sh"]).arg(services).arg(binary());
        command.env("LD_LIBRARY_PATH", modules);
        Some(Self::serving(scratch, command))
    }

    /// Starts it with an API socket in `scratch` as a user who is not root, in no group of note, and without capabilities; returns
    /// when the API answers. If `given`, that user may use `/dev/userfaultfd`. `scratch` is that user's from then on.
    ///
    /// A test that is not run by root starts it as its own user, who gets what the host gives.
    ///
    /// # Panics
    /// When it cannot be started so, or ends before it answers.
    #[must_use]
    pub fn as_user(scratch: &Scratch, arguments: &[&str], given: bool) -> Self {
        let root = fs::metadata("/proc/self").expect("a /proc").uid() == 0;
        let mut command = Command::new(if root { "unshare".into() } else { binary() });
        if root {
            let place = scratch.path("devices");
            fs::create_dir_all(&place).expect("a folder");
            give(scratch.folder()).expect("a folder that changes hands");
            let (uid, mode) = (UID.to_string(), if given { "666" } else { "600" });
            command.args(["--mount", "sh", "-c", SCRIPT, "sh", &uid, mode]).arg(binary()).arg(place);
        }
        command.args(arguments);
        let vmm = Self::serving(scratch, command);
        vmm.expect_user(root.then_some(UID));
        vmm
    }

    /// Its user is not root, but `uid` if there is one; it has no capabilities.
    fn expect_user(&self, uid: Option<u32>) {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the process is there");
        let values = |name: &str| -> Vec<&str> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect("its line").split_whitespace().collect()
        };
        // proc_pid_status(5): real, effective, saved, of the file system.
        let of_user = values("Uid:");
        assert_eq!(of_user.len(), 4, "{status}");
        let is_user = |found: &&str| uid.map_or(*found != "0", |uid| *found == uid.to_string());
        assert!(of_user.iter().all(is_user), "{status}");
        assert_eq!(values("CapEff:"), ["0000000000000000"], "{status}");
        if uid.is_some() {
            assert!(values("Groups:").is_empty(), "{status}");
        }
    }
}

/// The folder, and all that is in it, becomes the user's.
fn give(folder: &Path) -> std::io::Result<()> {
    lchown(folder, Some(UID), Some(UID))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => give(&entry.path())?,
            false => lchown(entry.path(), Some(UID), Some(UID))?,
        }
    }
    Ok(())
}

/// Whether the user of [`Vmm::as_user`] gets a userfaultfd for faults of guests.
///
/// # Panics
/// Without a `/proc`.
#[must_use]
pub fn gets_userfaultfd(given: bool) -> bool {
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let device = fs::metadata("/dev/userfaultfd");
    let root = fs::metadata("/proc/self").expect("a /proc").uid() == 0;
    let by_device = match root {
        true => given && device.is_ok(),
        false => device.is_ok_and(|found| found.permissions().mode() & 0o006 == 0o006),
    };
    by_device || sysctl.is_ok_and(|text| text.trim() == "1")
}
