//! Debian's cloud kernels: the bzImage, the ELF `vmlinux` inside it, and the modules that guests need.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::{self, PrivateApt, Suite};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::kernel_image;
use crate::progress::Step;
use crate::run::run;
use crate::toolbox::Toolbox;

/// The package that depends on the newest kernel of a release.
const METAPACKAGE: &str = "linux-image-cloud-amd64";

/// Modules that a guest of ours may need; what a kernel has built in, or has not at all, is left out for it.
const GUEST_MODULES: &[&str] = &[
    "button",
    "evdev",
    "nd_pmem",
    "overlay",
    "pvpanic_pci",
    "vfat",
    "virtio_balloon",
    "virtio_blk",
    "virtio_console",
    "virtio_iommu",
    "virtio_mem",
    "virtio_net",
    "virtio_pci",
    "virtio_pmem",
    "virtio_rng",
    "virtiofs",
    "vmw_vsock_virtio_transport",
];

/// Modules that make a machine a host of virtual machines (L1).
const HOST_MODULES: &[&str] = &["kvm_amd", "loop", "tap", "tun", "veth", "vhost_net", "vhost_vsock"];

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelVersion {
    /// Linux 6.1, of Debian 12.
    Debian12,
    /// Linux 6.12, of Debian 13.
    Debian13,
}

impl KernelVersion {
    /// Every kernel that tests boot.
    pub const ALL: [Self; 2] = [Self::Debian12, Self::Debian13];

    /// A short name for files and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian12 => "debian12",
            Self::Debian13 => "debian13",
        }
    }

    fn suite(self) -> Suite {
        match self {
            Self::Debian12 => Suite::Bookworm,
            Self::Debian13 => Suite::Trixie,
        }
    }
}

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Which.
    pub version: KernelVersion,
    folder: PathBuf,
}

impl Kernel {
    /// Fetches and unpacks it unless that was done.
    ///
    /// # Errors
    /// When apt fails, or the package is not made as expected.
    pub fn get(cache: &Cache, tools: &Toolbox, version: KernelVersion) -> Result<Self> {
        let recipe = format!("1 {version:?} {GUEST_MODULES:?} {HOST_MODULES:?}");
        let name = format!("kernel-{}", version.name());
        let folder = cache.entry(&name, &recipe, |folder| {
            let _step = Step::begin(&format!("fetching the kernel of {}", version.name()));
            let unpacked = folder.join("package");
            fetch(cache, version, &unpacked)?;
            fill(tools, &unpacked, folder)?;
            fs::remove_dir_all(&unpacked).map_err(Error::io("remove", &unpacked))
        })?;
        Ok(Self { version, folder })
    }

    /// The kernel as distributions ship it.
    #[must_use]
    pub fn bzimage(&self) -> PathBuf {
        self.folder.join("bzImage")
    }

    /// The ELF file with a PVH entry point.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// Its release as `uname -r` tells it.
    ///
    /// # Errors
    /// When the cache's entry cannot be read.
    pub fn release(&self) -> Result<String> {
        let path = self.folder.join("release");
        fs::read_to_string(&path).map_err(Error::io("read", &path))
    }

    /// The guest's modules: for each, what to load in which order, itself last, and the files.
    ///
    /// # Errors
    /// When the cache's entry cannot be read.
    pub fn guest_modules(&self) -> Result<ModuleSet> {
        ModuleSet::load(&self.folder.join("modules"), GUEST_MODULES)
    }

    /// The same for a host of virtual machines.
    ///
    /// # Errors
    /// When the cache's entry cannot be read.
    pub fn host_modules(&self) -> Result<ModuleSet> {
        ModuleSet::load(&self.folder.join("modules"), HOST_MODULES)
    }
}

/// Some modules with all that they depend on.
#[derive(Debug, Clone, Default)]
pub struct ModuleSet {
    /// Content of each module, by name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// For each module that was asked for and exists: the names to load, in order, itself last.
    pub orders: BTreeMap<String, Vec<String>>,
}

impl ModuleSet {
    fn load(folder: &Path, wanted: &[&str]) -> Result<Self> {
        let mut set = Self::default();
        for name in wanted {
            let mut order = Vec::new();
            set.add(folder, name, &mut BTreeSet::new(), &mut order)?;
            if !order.is_empty() {
                set.orders.insert((*name).to_owned(), order);
            }
        }
        Ok(set)
    }

    fn add(
        &mut self,
        folder: &Path,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<String>,
    ) -> Result<()> {
        let path = folder.join(format!("{name}.ko"));
        if !seen.insert(name.to_owned()) || !path.exists() {
            return Ok(());
        }
        let content = fs::read(&path).map_err(Error::io("read", &path))?;
        for dependency in module_depends(&content) {
            self.add(folder, &dependency, seen, order)?;
        }
        order.push(name.to_owned());
        self.files.insert(name.to_owned(), content);
        Ok(())
    }
}

fn fetch(cache: &Cache, version: KernelVersion, unpacked: &Path) -> Result<()> {
    fs::create_dir_all(unpacked).map_err(Error::io("create", unpacked))?;
    let apt = PrivateApt::open(cache, version.suite())?;
    let package = apt
        .depends(METAPACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::not_found("a kernel package", METAPACKAGE))?;
    for deb in apt.download(&[&package], unpacked)? {
        apt::extract(&deb, unpacked)?;
    }
    Ok(())
}

/// Fills the cache's entry from the unpacked package.
fn fill(tools: &Toolbox, package: &Path, folder: &Path) -> Result<()> {
    let boot = package.join("boot");
    let image = find_file(&boot, "vmlinuz-")?;
    let release =
        image.file_name().and_then(|name| name.to_str()).unwrap_or_default().replace("vmlinuz-", "");
    fs::write(folder.join("release"), &release).map_err(Error::io("write", folder))?;
    fs::copy(&image, folder.join("bzImage")).map_err(Error::io("copy", &image))?;
    extract_vmlinux(tools, &image, &folder.join("vmlinux"))?;

    // Since Debian 13 packages spell out the /usr merge.
    let tree = ["usr/lib/modules", "lib/modules"]
        .iter()
        .map(|path| package.join(path).join(&release))
        .find(|path| path.is_dir())
        .ok_or_else(|| Error::not_found("modules", release))?;
    let mut index = BTreeMap::new();
    index_modules(&tree, &mut index)?;
    let modules = folder.join("modules");
    fs::create_dir_all(&modules).map_err(Error::io("create", &modules))?;
    for name in GUEST_MODULES.iter().chain(HOST_MODULES) {
        unpack_module(tools, &index, name, &modules)?;
    }
    Ok(())
}

fn extract_vmlinux(tools: &Toolbox, image: &Path, target: &Path) -> Result<()> {
    let content = fs::read(image).map_err(Error::io("read", image))?;
    let payload =
        kernel_image::payload(&content).map_err(|source| Error::Kernel { path: image.to_owned(), source })?;
    let packed = target.with_extension("packed");
    fs::write(&packed, payload.data).map_err(Error::io("write", &packed))?;
    let output = run(tools.command(payload.compression.program())?.arg("-dc").arg(&packed))?;
    let elf = output.stdout;
    if elf.len() != payload.size as usize || !elf.starts_with(b"\x7fELF") {
        return Err(Error::not_found("an ELF file of the recorded size", image.display().to_string()));
    }
    fs::write(target, elf).map_err(Error::io("write", target))?;
    fs::remove_file(&packed).map_err(Error::io("remove", &packed))
}

/// Copies a module and all that it depends on, decompressed. A name that is not there is built in, or unknown to this kernel.
fn unpack_module(
    tools: &Toolbox,
    index: &BTreeMap<String, PathBuf>,
    name: &str,
    folder: &Path,
) -> Result<()> {
    let target = folder.join(format!("{name}.ko"));
    let Some(source) = index.get(name) else { return Ok(()) };
    if target.exists() {
        return Ok(());
    }
    let content = if source.extension().is_some_and(|extension| extension == "xz") {
        run(tools.command("xz")?.arg("-dc").arg(source))?.stdout
    } else {
        fs::read(source).map_err(Error::io("read", source))?
    };
    fs::write(&target, &content).map_err(Error::io("write", &target))?;
    module_depends(&content).iter().try_for_each(|dependency| unpack_module(tools, index, dependency, folder))
}

/// Every module file below `folder`, by the module's name (dashes in file names are underscores in names).
fn index_modules(folder: &Path, index: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            index_modules(&path, index)?;
        } else if let Some(name) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_suffix(".ko.xz").or_else(|| name.strip_suffix(".ko")))
        {
            index.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Names after `depends=` in a module's `.modinfo` section, a list of strings that end with a zero byte.
fn module_depends(content: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = content.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = content.get(start + KEY.len()..).unwrap_or_default();
    let value = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

fn find_file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .ok_or_else(|| Error::not_found(prefix, folder.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"\x7fELF....\0license=GPL\0depends=vhost,tap-x,\0name=vhost_net\0";
        assert_eq!(module_depends(module), ["vhost", "tap_x"]);
        assert!(module_depends(b"\0depends=\0").is_empty());
        assert!(module_depends(b"\0depends=").is_empty());
        assert!(module_depends(b"").is_empty());
    }

    #[test]
    fn modules_are_ordered_by_dependency() {
        let folder = tempfile::tempdir().unwrap();
        for (name, depends) in
            [("top", "left,right"), ("left", "base"), ("right", "base,builtin"), ("base", "")]
        {
            let content = format!("\0depends={depends}\0");
            fs::write(folder.path().join(format!("{name}.ko")), content).unwrap();
        }
        let set = ModuleSet::load(folder.path(), &["top", "unknown"]).unwrap();
        assert_eq!(set.orders["top"], ["base", "left", "right", "top"]);
        assert!(!set.orders.contains_key("unknown"));
        assert_eq!(set.files.len(), 4);
    }

    #[test]
    fn a_circle_of_modules_ends() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.ko"), "\0depends=b\0").unwrap();
        fs::write(folder.path().join("b.ko"), "\0depends=a\0").unwrap();
        assert!(ModuleSet::load(folder.path(), &["a"]).is_ok());
    }
}
