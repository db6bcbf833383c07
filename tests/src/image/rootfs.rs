//! A Debian 13 with systemd on an ext4 file system in a raw image, for a virtio disk.
//!
//! It boots fast (nothing waits for a network, no first-boot work), logs root in on the serial port and on the virtio console, and runs
//! `vmm-test.sh` when it is up. A kernel whose disk driver is a module needs the [initramfs](super::initramfs), which goes on with
//! `root=/dev/vda`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{self, Mirror, Suite};
use crate::base64;
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::image::initramfs::REPORT;
use crate::progress::Step;
use crate::run::run;
use crate::toolbox::Toolbox;

const PACKAGES: &str = "dbus,fio,iproute2,iputils-ping,kmod,pciutils,procps,stress-ng,systemd-sysv,udev";
/// Size of the file system; the file is sparse.
const SIZE: &str = "2G";
const SCRIPT: &str = include_str!("vmm-test.sh");

/// Files put over the packages' own: path, content.
const FILES: &[(&str, &str)] = &[
    ("etc/hostname", "guest\n"),
    ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 guest\n"),
    ("etc/fstab", ""),
    // A fixed one: without, systemd takes each boot of a fresh copy for the first and sets everything up.
    ("etc/machine-id", "76d6d5f0c0de4a11a5e0f2d3c4b5a697\n"),
    ("etc/systemd/journald.conf.d/volatile.conf", "[Journal]\nStorage=volatile\n"),
    ("etc/systemd/system.conf.d/fast.conf", "[Manager]\nDefaultTimeoutStopSec=10s\n"),
    (
        "etc/systemd/system/serial-getty@.service.d/autologin.conf",
        // Where a script or an action was asked for, the console is the script's.
        "[Unit]\nConditionKernelCommandLine=!vmm.run\nConditionKernelCommandLine=!vmm.action\n\n\
         [Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,9600 - $TERM\n",
    ),
    (
        "etc/systemd/system/vmm-test.service",
        "[Unit]\nDescription=Report and script of a test\nAfter=multi-user.target\n\n\
         [Service]\nType=exec\nExecStart=/bin/sh /usr/local/lib/vmm-test.sh\n",
    ),
    ("usr/local/lib/vmm-report.sh", REPORT),
    ("usr/local/lib/vmm-test.sh", SCRIPT),
];

/// Symbolic links: path, target. Units that only cost time here are masked; Debian's default target is graphical.target.
const LINKS: &[(&str, &str)] = &[
    ("etc/systemd/system/graphical.target.wants/vmm-test.service", "/etc/systemd/system/vmm-test.service"),
    ("etc/systemd/system/apt-daily.timer", "/dev/null"),
    ("etc/systemd/system/apt-daily-upgrade.timer", "/dev/null"),
    ("etc/systemd/system/dpkg-db-backup.timer", "/dev/null"),
    ("etc/systemd/system/e2scrub_all.timer", "/dev/null"),
    ("etc/systemd/system/e2scrub_reap.service", "/dev/null"),
    ("etc/systemd/system/fstrim.timer", "/dev/null"),
    ("etc/systemd/system/getty-static.service", "/dev/null"),
    ("etc/systemd/system/getty@tty1.service", "/dev/null"),
    ("etc/systemd/system/proc-sys-fs-binfmt_misc.automount", "/dev/null"),
    ("etc/systemd/system/sys-kernel-debug.mount", "/dev/null"),
    ("etc/systemd/system/sys-kernel-tracing.mount", "/dev/null"),
];

/// The image, built unless it is in the cache (about a minute). It is not to be written: [`copy`] it.
///
/// # Errors
/// When packages cannot be fetched or the image not be made.
pub fn image(cache: &Cache, tools: &Toolbox) -> Result<PathBuf> {
    let recipe = format!("1 {PACKAGES} {SIZE} {FILES:?} {LINKS:?}");
    let folder = cache.entry("rootfs-debian13", &recipe, |folder| {
        let _step = Step::begin("building a Debian 13 root file system");
        let archive = folder.join("root.tar");
        let overlay = folder.join("overlay");
        write_overlay(&overlay)?;
        bootstrap(cache, tools, &overlay, &archive)?;
        let image = folder.join("root.ext4");
        run(tools
            .command("mke2fs")?
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "vmm-root", "-d"])
            .args([&archive, &image])
            .arg(SIZE))?;
        fs::remove_file(&archive).map_err(Error::io("remove", &archive))?;
        fs::remove_dir_all(&overlay).map_err(Error::io("remove", &overlay))
    })?;
    Ok(folder.join("root.ext4"))
}

/// A writable copy of `image` at `target`, sharing its blocks where the file system can, sparse anyhow.
///
/// # Errors
/// When it cannot be written.
pub fn copy(image: &Path, target: &Path) -> Result<()> {
    run(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).args([image, target])).map(|_| ())
}

/// Content of a small disk that makes a guest run `script`, a POSIX shell script.
#[must_use]
pub fn script_disk(script: &str) -> Vec<u8> {
    let mut bytes = format!("#!VMMRUN\n{script}\n").into_bytes();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes
}

/// The word of a kernel command line that makes a guest run `script`, a POSIX shell script; for short ones, as a command line has 2047 bytes.
#[must_use]
pub fn script_word(script: &str) -> String {
    format!("vmm.run={}", base64::encode(script.as_bytes()))
}

/// Installs the packages and our files into the archive `target`.
fn bootstrap(cache: &Cache, tools: &Toolbox, overlay: &Path, target: &Path) -> Result<()> {
    // mmdebstrap is a Perl program; without root it needs newuidmap's rights, which no file in a cache can have.
    apt::ensure_installed(&[("perl", "perl")])?;
    if !apt::is_root()? {
        apt::ensure_installed(&[("newuidmap", "uidmap")])?;
    }
    let mirror = Mirror::of_this_machine(cache)?;
    let overlay = overlay.display().to_string();
    let install_files =
        format!("cp -r --no-preserve=ownership {}/. \"$1\"", crate::run::shell_quote(&overlay));
    let no_documents = "rm -rf \"$1/usr/share/doc\" \"$1/usr/share/man\" \"$1/usr/share/locale\"";
    // Newer than /usr, so that no service thinks the system was updated.
    let stamp = "touch \"$1/etc/.updated\" \"$1/var/.updated\"";
    run(Command::new("perl")
        .arg(tools.path("mmdebstrap")?)
        .args(["--variant=minbase", "--format=tar", &format!("--include={PACKAGES}")])
        .args(["--customize-hook=chroot \"$1\" passwd -d root", &format!("--customize-hook={install_files}")])
        .args([format!("--customize-hook={no_documents}"), format!("--customize-hook={stamp}")])
        .arg(Suite::Trixie.name())
        .arg(target)
        .arg(mirror.source_line(Suite::Trixie)))
    .map(|_| ())
}

fn write_overlay(folder: &Path) -> Result<()> {
    let prepare = |name: &str| {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        Ok(path)
    };
    for (name, content) in FILES {
        let path = prepare(name)?;
        fs::write(&path, content).map_err(Error::io("write", &path))?;
    }
    for (name, target) in LINKS {
        let path = prepare(name)?;
        std::os::unix::fs::symlink(target, &path).map_err(Error::io("link", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_disk_is_whole_sectors() {
        let disk = script_disk("echo hello");
        assert_eq!(disk.len(), 4096);
        assert!(disk.starts_with(b"#!VMMRUN\necho hello\n\0"));
        assert_eq!(script_disk(&"x".repeat(5000)).len(), 8192);
        assert_eq!(script_word("foo"), "vmm.run=Zm9v");
    }

    #[test]
    fn the_overlay_has_files_and_links() {
        let folder = tempfile::tempdir().unwrap();
        write_overlay(folder.path()).unwrap();
        assert!(folder.path().join("usr/local/lib/vmm-test.sh").is_file());
        let link = fs::read_link(folder.path().join("etc/systemd/system/fstrim.timer")).unwrap();
        assert_eq!(link, Path::new("/dev/null"));
    }

    #[test]
    fn a_copy_is_sparse_and_equal() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a");
        fs::write(&source, [vec![1; 4096], vec![0; 1 << 20], vec![2; 10]].concat()).unwrap();
        let target = folder.path().join("b");
        copy(&source, &target).unwrap();
        assert_eq!(fs::read(&source).unwrap(), fs::read(&target).unwrap());
    }
}
