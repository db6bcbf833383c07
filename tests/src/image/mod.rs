//! Images that guests boot from: initramfs archives and root file systems.

pub mod cpio;
pub mod initramfs;
pub mod rootfs;
