//! Paths that another VMM's configuration names.

use std::path::{Component, Path, PathBuf};

use super::{Backing, MachineSpec, PayloadSpec, Sink};

/// Randomness is no secret.
const HARMLESS: [&str; 2] = ["/dev/urandom", "/dev/random"];

/// Every path that a machine of `spec` opens, with its place in the document.
pub(super) fn paths(spec: &MachineSpec) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut add = |place: String, path: &Path| found.push((place, path.to_owned()));
    match &spec.payload {
        PayloadSpec::Kernel { kernel, initramfs, cmdline: _ } => {
            add("payload.kernel".to_owned(), kernel);
            initramfs.iter().for_each(|path| add("payload.initramfs".to_owned(), path));
        }
        PayloadSpec::Firmware(path) => add("payload.firmware".to_owned(), path),
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        add(format!("disks[{index}].path"), &disk.image.path);
    }
    if !HARMLESS.iter().any(|path| spec.rng.source == Path::new(path)) {
        add("rng.src".to_owned(), &spec.rng.source);
    }
    let sinks = [
        ("serial", spec.serial.as_ref()),
        ("console", spec.console.as_ref().map(|console| &console.sink)),
        ("debug_console", spec.debug_console.as_ref().map(|console| &console.sink)),
    ];
    for (name, sink) in sinks {
        match sink {
            Some(Sink::File(path)) => add(format!("{name}.file"), path),
            Some(Sink::Socket(path)) => add(format!("{name}.socket"), path),
            Some(Sink::Null | Sink::Tty | Sink::Pty) | None => {}
        }
    }
    for (index, zone) in spec.memory.zones.iter().enumerate() {
        if let Backing::File(path) = &zone.backing {
            add(format!("memory.zones[{index}].file"), path);
        }
    }
    for (index, rule) in spec.landlock.rules.iter().enumerate() {
        add(format!("landlock_rules[{index}].path"), &rule.path);
    }
    found
}

/// Whether `path` is one of `allowed`, or lies below one. A path that goes up leads who knows where; links in an allowed
/// folder are its owner's.
pub(super) fn is_allowed(path: &Path, allowed: &[PathBuf]) -> bool {
    let goes_up = path.components().any(|part| part == Component::ParentDir);
    !goes_up && allowed.iter().any(|allowed| path.starts_with(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UnknownFields;
    use crate::spec::parse_and_check;

    #[test]
    fn every_path_of_a_configuration_is_found() {
        let json = r#"{
            "payload": {"kernel": "/a", "initramfs": "/b"},
            "disks": [{"path": "/c", "image_type": "Raw"}],
            "rng": {"src": "/d"},
            "serial": {"mode": "Socket", "socket": "/e"}, "console": {"mode": "File", "file": "/f"},
            "debug_console": {"mode": "File", "file": "/g"},
            "memory": {"size": 0, "zones": [{"id": "z", "size": 2097152, "file": "/h"}]},
            "landlock_rules": [{"path": "/i", "access": "r"}]
        }"#;
        let spec = parse_and_check(json.as_bytes(), UnknownFields::Refuse).unwrap().spec;
        let found = paths(&spec);
        let (places, files): (Vec<_>, Vec<_>) =
            found.iter().map(|(place, path)| (place.as_str(), path.to_str().unwrap())).unzip();
        let expected = [
            "payload.kernel",
            "payload.initramfs",
            "disks[0].path",
            "rng.src",
            "serial.socket",
            "console.file",
            "debug_console.file",
            "memory.zones[0].file",
            "landlock_rules[0].path",
        ];
        assert_eq!(places, expected);
        assert_eq!(files, ["/a", "/b", "/c", "/d", "/e", "/f", "/g", "/h", "/i"]);
        let json = r#"{"payload": {"firmware": "/a"}}"#;
        let spec = parse_and_check(json.as_bytes(), UnknownFields::Refuse).unwrap().spec;
        assert_eq!(paths(&spec), [("payload.firmware".to_owned(), "/a".into())]);
    }

    #[test]
    fn a_folder_allows_what_lies_below_it_and_nothing_else() {
        let allowed = ["/srv/vm".into(), "/boot/vmlinux".into()];
        for (path, expected) in [
            ("/srv/vm/a.raw", true),
            ("/srv/vm", true),
            ("/boot/vmlinux", true),
            ("/srv/vmx", false),
            ("/srv/vm/../../etc/shadow", false),
            ("srv/vm/a.raw", false),
            ("/boot", false),
        ] {
            assert_eq!(is_allowed(Path::new(path), &allowed), expected, "{path}");
        }
        assert!(is_allowed(Path::new("/any"), &["/".into()]));
    }
}
