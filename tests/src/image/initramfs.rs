//! Initramfs archives: busybox, a kernel's modules, and an init script.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::image::cpio::{Cpio, TooLarge};
use crate::kernels::{Kernel, ModuleSet};
use crate::run::run;
use crate::toolbox::Toolbox;

const GUEST_INIT: &str = include_str!("guest-init.sh");
/// Prints what a guest sees; the root file system's service uses it, too.
pub(crate) const REPORT: &str = include_str!("report.sh");

/// The initramfs for test guests with `kernel`: see `guest-init.sh` for the words that it takes from the kernel command line.
///
/// # Errors
/// When the toolbox lacks busybox or the cache cannot be written.
pub fn guest(cache: &Cache, tools: &Toolbox, kernel: &Kernel) -> Result<PathBuf> {
    let modules = kernel.guest_modules()?;
    build(
        cache,
        tools,
        &Recipe {
            name: &format!("initramfs-{}", kernel.version.name()),
            release: &kernel.release()?,
            modules: &modules,
            init: GUEST_INIT,
            extra: &[("report.sh", REPORT)],
        },
    )
}

/// What goes into an initramfs.
pub(crate) struct Recipe<'a> {
    /// Name of the cache's entry.
    pub(crate) name: &'a str,
    /// The kernel's release; with the scripts it decides whether there is a need to build.
    pub(crate) release: &'a str,
    /// Modules, put into `/modules` with a `.order` file for each that was asked for.
    pub(crate) modules: &'a ModuleSet,
    /// The script `/init`.
    pub(crate) init: &'a str,
    /// More files, by name.
    pub(crate) extra: &'a [(&'a str, &'a str)],
}

/// Builds an initramfs unless it is there.
pub(crate) fn build(cache: &Cache, tools: &Toolbox, recipe: &Recipe<'_>) -> Result<PathBuf> {
    let names: Vec<_> = recipe.modules.orders.iter().collect();
    let text = format!("1 {} {names:?} {} {:?}", recipe.release, recipe.init, recipe.extra);
    let folder = cache.entry(recipe.name, &text, |folder| {
        let path = folder.join("initramfs");
        let busybox_path = tools.path("busybox")?;
        let busybox = fs::read(&busybox_path).map_err(Error::io("read", &busybox_path))?;
        let applets = run(Command::new(&busybox_path).arg("--list"))?;
        let archive = pack(recipe, &busybox, &String::from_utf8_lossy(&applets.stdout));
        let archive = archive.map_err(|error| Error::io("pack", &path)(std::io::Error::other(error)))?;
        fs::write(&path, archive).map_err(Error::io("write", &path))
    })?;
    Ok(folder.join("initramfs"))
}

fn pack(recipe: &Recipe<'_>, busybox: &[u8], applets: &str) -> std::result::Result<Vec<u8>, TooLarge> {
    let mut cpio = Cpio::new();
    for folder in ["bin", "dev", "host", "modules", "proc", "run", "sys", "tmp"] {
        cpio.directory(folder, 0o755);
    }
    // The kernel opens these before init can mount anything on /dev.
    cpio.character_device("dev/console", 0o600, 5, 1);
    cpio.character_device("dev/null", 0o666, 1, 3);
    cpio.file("bin/busybox", 0o755, busybox)?;
    for applet in applets.lines().filter(|name| *name != "busybox") {
        cpio.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    for (name, content) in &recipe.modules.files {
        cpio.file(&format!("modules/{name}.ko"), 0o644, content)?;
    }
    for (name, order) in &recipe.modules.orders {
        cpio.file(&format!("modules/{name}.order"), 0o644, order.join("\n").as_bytes())?;
    }
    for (name, content) in recipe.extra {
        cpio.file(name, 0o644, content.as_bytes())?;
    }
    cpio.file("init", 0o755, recipe.init.as_bytes())?;
    Ok(cpio.finish())
}
