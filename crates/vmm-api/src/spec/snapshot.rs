//! What is asked of a snapshot and of a restore, in checked form.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Checked, MachineSpec, fill_ids, parse_and_check};
use crate::config::wire::Walk;
use crate::config::{
    ConsoleMode, Fault, FaultKind, GuestClock, MemoryRestoreMode, RestoreConfig, RestoredConsoleConfig,
    RestoredDiskConfig, UnknownFields, VmConfig, VmSnapshotConfig,
};

/// The only scheme of snapshots' URLs.
const SCHEME: &str = "file://";

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotSpec {
    /// The folder to write.
    pub folder: PathBuf,
    /// The guest runs on while its memory is written.
    pub live: bool,
    /// Only what changed since the snapshot that is kept track of.
    pub incremental: bool,
    /// Changes are kept track of from now on.
    pub track: bool,
}

impl SnapshotSpec {
    /// Checks a request.
    ///
    /// # Errors
    /// All faults, with their JSON paths.
    pub fn check(config: &VmSnapshotConfig) -> Result<Self, Vec<Fault>> {
        let folder = folder("destination_url", &config.destination_url).map_err(|fault| vec![fault])?;
        let VmSnapshotConfig { live, incremental, track, .. } = *config;
        Ok(Self { folder, live, incremental, track: track || incremental })
    }
}

/// A VM to be made of a snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct RestoreSpec {
    /// The snapshot's folder.
    pub folder: PathBuf,
    /// All memory is read and verified before the guest runs.
    pub eager: bool,
    /// The guest runs at once.
    pub resume: bool,
    /// Changes are kept track of from the start.
    pub track: bool,
    /// What the guest's clocks show.
    pub clock: GuestClock,
    overrides: Overrides,
}

/// What replaces parts of a configuration that comes with a VM.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Overrides {
    pub(super) disks: Vec<RestoredDiskConfig>,
    pub(super) serial: Option<RestoredConsoleConfig>,
    pub(super) console: Option<RestoredConsoleConfig>,
    pub(super) debug_console: Option<RestoredConsoleConfig>,
}

impl RestoreSpec {
    /// Checks a request, as far as that is possible without the snapshot.
    ///
    /// # Errors
    /// All faults, with their JSON paths.
    pub fn check(config: &RestoreConfig) -> Result<Self, Vec<Fault>> {
        let mut faults = Walk::faults_of(config);
        let folder = folder("source_url", &config.source_url).map_err(|fault| faults.push(fault));
        let lazy = config.memory_restore_mode == Some(MemoryRestoreMode::OnDemand);
        if config.prefault && lazy {
            let message = "contradicts memory_restore_mode OnDemand";
            faults.push(Fault::new("prefault", FaultKind::Invalid, message));
        }
        let overrides = Overrides {
            disks: config.disks.clone().unwrap_or_default(),
            serial: config.serial.clone(),
            console: config.console.clone(),
            debug_console: config.debug_console.clone(),
        };
        let eager = config.prefault || config.memory_restore_mode == Some(MemoryRestoreMode::Copy);
        let (resume, track, clock) = (config.resume, config.track, config.clock);
        match folder {
            Ok(folder) if faults.is_empty() => Ok(Self { folder, eager, resume, track, clock, overrides }),
            _ => Err(faults),
        }
    }

    /// Where the snapshot is, as a request says it.
    #[must_use]
    pub fn source_url(&self) -> String {
        format!("{SCHEME}{}", self.folder.display())
    }

    /// The configuration of the restored VM: `saved` is the document in the snapshot.
    ///
    /// # Errors
    /// What is wrong with the document, or with what is to replace parts of it.
    pub fn configure(&self, saved: &[u8]) -> Result<Checked, Vec<Fault>> {
        self.overrides.configure(saved)
    }
}

impl Overrides {
    /// The configuration of the VM here: `document` came with it.
    pub(super) fn configure(&self, document: &[u8]) -> Result<Checked, Vec<Fault>> {
        let checked = parse_and_check(document, UnknownFields::Refuse)?;
        let (mut config, mut faults) = (checked.config, Vec::new());
        self.apply(&mut config, &mut faults);
        if !faults.is_empty() {
            return Err(faults);
        }
        let spec = MachineSpec::check(&config)?;
        fill_ids(&mut config);
        Ok(Checked { config, spec })
    }

    fn apply(&self, config: &mut VmConfig, faults: &mut Vec<Fault>) {
        self.disks(config, faults);
        if let Some(to) = present("serial", self.serial.as_ref(), config.serial.mode, faults) {
            (config.serial.mode, config.serial.file, config.serial.socket) = to;
        }
        if let Some(to) = present("console", self.console.as_ref(), config.console.mode, faults) {
            (config.console.mode, config.console.file, config.console.socket) = to;
        }
        let debug = &mut config.debug_console;
        if let Some((mode, file, socket)) =
            present("debug_console", self.debug_console.as_ref(), debug.mode, faults)
        {
            if socket.is_some() {
                let message = "the debug console cannot be a socket";
                faults.push(Fault::new("debug_console.socket", FaultKind::Invalid, message));
            }
            (debug.mode, debug.file) = (mode, file);
        }
    }

    fn disks(&self, config: &mut VmConfig, faults: &mut Vec<Fault>) {
        let mut seen = BTreeSet::new();
        let disks = config.disks.get_or_insert_default();
        for (index, RestoredDiskConfig { id, path }) in self.disks.iter().enumerate() {
            let mut refuse = |message: String| {
                faults.push(Fault::new(format!("disks[{index}].id"), FaultKind::Invalid, message));
            };
            if !seen.insert(id) {
                refuse(format!("disk {id:?} is given twice"));
            }
            match disks.iter_mut().find(|disk| disk.id.as_ref() == Some(id)) {
                Some(disk) => disk.path = Some(path.clone()),
                None => refuse(format!("the snapshot has no disk {id:?}")),
            }
        }
        if disks.is_empty() {
            config.disks = None;
        }
    }
}

/// Mode, file and socket of a console that is there before and after.
fn present(
    place: &str,
    to: Option<&RestoredConsoleConfig>,
    saved: ConsoleMode,
    faults: &mut Vec<Fault>,
) -> Option<(ConsoleMode, Option<PathBuf>, Option<PathBuf>)> {
    let to = to?;
    let message = match (saved, to.mode) {
        (ConsoleMode::Off, _) => "the snapshot has no such device",
        (_, ConsoleMode::Off) => "the device is part of the snapshot: it may be Null, but not Off",
        _ => return Some((to.mode, to.file.clone(), to.socket.clone())),
    };
    faults.push(Fault::new(format!("{place}.mode"), FaultKind::Invalid, message));
    None
}

/// The folder that a URL means: `file://` and an absolute path, byte for byte.
fn folder(field: &str, url: &str) -> Result<PathBuf, Fault> {
    let path = url.strip_prefix(SCHEME).filter(|path| !path.contains('\0')).map(Path::new);
    path.filter(|path| path.is_absolute()).map(Path::to_owned).ok_or_else(|| {
        let message =
            format!("expected {SCHEME} and an absolute path, such as file:///srv/snapshot, found {url:?}");
        Fault::new(field, FaultKind::Invalid, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restore(json: &str) -> Result<RestoreSpec, Vec<Fault>> {
        let config: RestoreConfig = serde_json::from_str(json).unwrap();
        RestoreSpec::check(&config)
    }

    fn faults(result: Result<impl std::fmt::Debug, Vec<Fault>>) -> Vec<String> {
        result.unwrap_err().into_iter().map(|fault| format!("{}: {}", fault.path, fault.message)).collect()
    }

    const SAVED: &[u8] = br#"{
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/a", "image_type": "Raw", "id": "_disk0"}],
        "serial": {"mode": "File", "file": "/log"}, "console": {"mode": "Off"}
    }"#;

    #[test]
    fn urls_are_files_with_absolute_paths_and_nothing_else() {
        let of = |url: &str| {
            SnapshotSpec::check(&VmSnapshotConfig {
                destination_url: url.to_owned(),
                ..VmSnapshotConfig::default()
            })
        };
        assert_eq!(of("file:///a/b c%20?d").unwrap().folder, Path::new("/a/b c%20?d"));
        for bad in [
            "",
            "/a",
            "file:/a",
            "file://",
            "file://a",
            "FILE:///a",
            "http:///a",
            "tcp:a:1",
            " file:///a",
            "file:///a\0",
        ] {
            let [fault] = &of(bad).unwrap_err()[..] else { panic!("{bad:?}") };
            assert_eq!((fault.path.as_str(), fault.kind), ("destination_url", FaultKind::Invalid), "{bad:?}");
            assert!(fault.message.ends_with(&format!("found {bad:?}")), "{fault:?}");
        }
    }

    #[test]
    fn an_incremental_snapshot_keeps_track() {
        let config = VmSnapshotConfig {
            destination_url: "file:///a".into(),
            incremental: true,
            ..VmSnapshotConfig::default()
        };
        assert!(SnapshotSpec::check(&config).unwrap().track);
    }

    #[test]
    fn memory_comes_lazily_unless_asked_otherwise() {
        let eager =
            |more: &str| restore(&format!(r#"{{"source_url": "file:///a"{more}}}"#)).map(|spec| spec.eager);
        assert!(!eager("").unwrap() && !eager(r#", "memory_restore_mode": "OnDemand""#).unwrap());
        assert!(
            eager(r#", "prefault": true"#).unwrap() && eager(r#", "memory_restore_mode": "Copy""#).unwrap()
        );
        let both = faults(eager(r#", "prefault": true, "memory_restore_mode": "OnDemand""#));
        assert_eq!(both, ["prefault: contradicts memory_restore_mode OnDemand"]);
    }

    #[test]
    fn what_cannot_boot_cannot_be_replaced_and_is_named() {
        let found = faults(restore(
            r#"{"source_url": "x", "net": [{"id": "n"}], "vsock": {"cid": 3}, "net_fds": [{"id": "n"}],
                "zone_updates": [{"id": "z", "host_numa_node": 0}]}"#,
        ));
        let paths: Vec<_> = found.iter().filter_map(|fault| fault.split(": ").next()).collect();
        assert_eq!(paths, ["net_fds[0]", "zone_updates[0]", "net[0]", "vsock", "source_url"]);
    }

    #[test]
    fn a_clone_has_its_own_disk_and_console_and_the_rest_of_the_original() {
        let spec = restore(
            r#"{"source_url": "file:///a", "disks": [{"id": "_disk0", "path": "/b"}],
                "serial": {"mode": "Socket", "socket": "/s"}}"#,
        );
        let spec = spec.unwrap();
        assert_eq!(spec.source_url(), "file:///a");
        let Checked { config, spec } = spec.configure(SAVED).unwrap();
        assert_eq!(spec.disks[0].image.path, Path::new("/b"));
        assert_eq!(spec.serial, Some(super::super::Sink::Socket("/s".into())));
        assert_eq!((config.serial.file, config.disks.unwrap()[0].path.clone()), (None, Some("/b".into())));
        let same = restore(r#"{"source_url": "file:///a"}"#).unwrap().configure(SAVED).unwrap();
        assert_eq!(same, parse_and_check(SAVED, UnknownFields::Refuse).unwrap());
    }

    #[test]
    fn what_the_snapshot_does_not_have_is_refused() {
        let found = faults(
            restore(
                r#"{"source_url": "file:///a", "disks": [{"id": "x", "path": "/b"}, {"id": "_disk0", "path": "/b"},
                    {"id": "_disk0", "path": "/c"}], "serial": {"mode": "Off"}, "console": {"mode": "Null"}}"#,
            )
            .unwrap()
            .configure(SAVED),
        );
        assert_eq!(
            found,
            [
                "disks[0].id: the snapshot has no disk \"x\"",
                "disks[2].id: disk \"_disk0\" is given twice",
                "serial.mode: the device is part of the snapshot: it may be Null, but not Off",
                "console.mode: the snapshot has no such device",
            ]
        );
        let socket = restore(r#"{"source_url": "file:///a", "serial": {"mode": "Socket"}}"#).unwrap();
        assert_eq!(faults(socket.configure(SAVED)), ["serial.socket: is required by mode Socket"]);
    }

    #[test]
    fn a_saved_document_that_is_none_is_refused() {
        let spec = restore(r#"{"source_url": "file:///a"}"#).unwrap();
        for document in [&b"{"[..], b"[]", br#"{"payload": {"kernel": "/k"}, "novelty": 1}"#] {
            assert!(spec.configure(document).is_err());
        }
    }
}
