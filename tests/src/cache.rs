//! The cache outside the source tree: everything that is fetched or built for tests, made once.
//!
//! An entry is a folder named by the thing and a hash of its recipe, so that a changed recipe makes a new one. It is filled
//! under a temporary name and renamed, so an entry that exists is complete; a file lock keeps two processes from
//! making the same one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};

/// An entry of an older recipe is removed when it is older than this: until then another checkout may use it.
const OLD: Duration = Duration::from_secs(7 * 24 * 3600);

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$VMM_CACHE`, else `$XDG_CACHE_HOME/vmm`, else `~/.cache/vmm`; made if it is not there.
    ///
    /// # Errors
    /// When no such variable is set or the folder cannot be made.
    pub fn open() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = variable("VMM_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|path| path.join("vmm")))
            .or_else(|| variable("HOME").map(|path| path.join(".cache/vmm")))
            .ok_or(Error::NoCacheFolder)?;
        Self::at(&root)
    }

    /// A cache in the folder `root`, made if it is not there.
    ///
    /// # Errors
    /// When the folder cannot be made or its path resolved.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).map_err(Error::io("create", root))?;
        // Absolute: nested machines and chroots use the path from elsewhere.
        let root = root.canonicalize().map_err(Error::io("resolve", root))?;
        Ok(Self { root })
    }

    /// The folder of the cache.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry `name` made by the recipe `recipe` (any text that changes when the result would): the folder, complete.
    /// `fill` makes its content in the folder it is given, if it is not there yet; another process that wants the same
    /// waits meanwhile.
    ///
    /// # Errors
    /// Those of `fill`, and I/O errors. Nothing is left behind then but a temporary folder that the next try removes.
    pub fn entry(&self, name: &str, recipe: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.root.join(entry_name(name, recipe));
        if path.is_dir() {
            return Ok(path);
        }
        let _lock = self.lock(name)?;
        if path.is_dir() {
            return Ok(path);
        }
        let temporary = self.root.join(format!("{name}.partial"));
        remove_all(&temporary)?;
        fs::create_dir_all(&temporary).map_err(Error::io("create", &temporary))?;
        fill(&temporary)?;
        // Unpacking a package gives the folder the package's time.
        let folder = File::open(&temporary).map_err(Error::io("open", &temporary))?;
        folder.set_modified(SystemTime::now()).map_err(Error::io("date", &temporary))?;
        fs::rename(&temporary, &path).map_err(Error::io("rename", &temporary))?;
        self.remove_older(name, OLD)?;
        Ok(path)
    }

    /// Removes entries `name` that were made longer than `age` ago.
    fn remove_older(&self, name: &str, age: Duration) -> Result<()> {
        let entries = fs::read_dir(&self.root).map_err(Error::io("read", &self.root))?;
        for entry in entries.flatten() {
            let file_name = entry.file_name();
            let hash = file_name.to_str().and_then(|text| text.strip_prefix(name)?.strip_prefix('-'));
            let is_entry =
                hash.is_some_and(|hash| hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()));
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            if is_entry && modified.is_ok_and(|time| time.elapsed().is_ok_and(|elapsed| elapsed > age)) {
                remove_all(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Whether the entry is there already.
    #[must_use]
    pub fn has(&self, name: &str, recipe: &str) -> bool {
        self.root.join(entry_name(name, recipe)).is_dir()
    }

    /// Takes the lock `name` of this cache, waiting for another process that holds it; dropped with the file.
    ///
    /// # Errors
    /// When the lock file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<File> {
        let folder = self.folder("locks")?;
        let path = folder.join(name);
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(file)
    }

    /// A folder `name` inside the cache that is no entry (state, locks, work), made if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        Ok(path)
    }

    /// Removes every entry and temporary folder, so that all is fetched and built anew.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn clear(&self) -> Result<()> {
        let entries = fs::read_dir(&self.root).map_err(Error::io("read", &self.root))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name != "locks" && name != "work" {
                remove_all(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Removes a file or folder with all in it, if it is there.
pub(crate) fn remove_all(path: &Path) -> Result<()> {
    let result =
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::io("remove", path)),
    }
}

fn entry_name(name: &str, recipe: &str) -> String {
    format!("{name}-{:016x}", fnv1a(recipe.as_bytes()))
}

/// FNV-1a, 64 bits: stable across builds, which the standard library's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn an_entry_is_made_once_per_recipe() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let made = AtomicU32::new(0);
        let make = |recipe: &str| {
            cache
                .entry("thing", recipe, |path| {
                    made.fetch_add(1, Ordering::Relaxed);
                    fs::write(path.join("content"), recipe).map_err(Error::io("write", path))
                })
                .unwrap()
        };
        let first = make("one");
        assert_eq!(first, make("one"));
        let second = make("two");
        assert_ne!(first, second);
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert_eq!(fs::read_to_string(second.join("content")).unwrap(), "two");
        assert!(cache.has("thing", "one") && !cache.has("thing", "three"));
        cache.clear().unwrap();
        assert!(!cache.has("thing", "one"));
    }

    #[test]
    fn old_entries_of_the_same_name_go() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        for (name, recipe) in [("thing", "one"), ("thing", "two"), ("thing-else", "one")] {
            cache.entry(name, recipe, |_| Ok(())).unwrap();
        }
        cache.remove_older("thing", OLD).unwrap();
        assert!(cache.has("thing", "one") && cache.has("thing", "two"));
        std::thread::sleep(Duration::from_millis(20));
        cache.remove_older("thing", Duration::from_millis(1)).unwrap();
        assert!(!cache.has("thing", "one") && !cache.has("thing", "two") && cache.has("thing-else", "one"));
    }

    #[test]
    fn an_entry_with_old_content_is_new() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let path = cache.entry("thing", "r", |path| {
            File::open(path).unwrap().set_modified(SystemTime::UNIX_EPOCH).map_err(Error::io("date", path))
        });
        assert!(path.unwrap().is_dir());
    }

    #[test]
    fn a_failed_fill_leaves_no_entry() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let result = cache.entry("thing", "r", |path| {
            fs::write(path.join("half"), "x").map_err(Error::io("write", path))?;
            Err(Error::NoCacheFolder)
        });
        assert!(result.is_err() && !cache.has("thing", "r"));
        let path = cache.entry("thing", "r", |_| Ok(())).unwrap();
        assert!(!path.join("half").exists(), "the leftovers of the failed try are gone");
    }

    #[test]
    fn two_at_once_make_one() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let made = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    cache
                        .entry("thing", "r", |_| {
                            made.fetch_add(1, Ordering::Relaxed);
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_hash_is_fnv1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
