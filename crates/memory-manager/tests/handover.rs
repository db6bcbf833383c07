//! Memory that another owner takes over by its descriptors.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use common::{MIB, content, create, vm, write, zone};
use rustix::fs::{MemfdFlags, SealFlags};
use vmm_hypervisor::fake::Fake;
use vmm_memory_manager::handover::{HandoverError, SharedMemory, SharedPiece};
use vmm_memory_manager::map::HostMemory;
use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};

fn shared(id: &str, size: u64) -> ZoneConfig {
    ZoneConfig { id: id.to_owned(), shared: true, ..zone(size) }
}

fn files(shared: &SharedMemory) -> Vec<OwnedFd> {
    shared.files.iter().map(|file| file.as_fd().try_clone_to_owned().unwrap()).collect()
}

fn adopt(zones: &[ZoneConfig], shared: &SharedMemory) -> Result<HostMemory, HandoverError> {
    HostMemory::adopt(zones, 40, files(shared), &shared.pieces)
}

#[test]
fn what_one_wrote_the_other_has_without_a_copy_and_can_hand_on() {
    let folder = tempfile::tempdir().unwrap();
    let named = folder.path().join("zone");
    File::create(&named).unwrap();
    let zones = [
        shared("a", 2 * MIB),
        ZoneConfig { file: Some(named), ..shared("b", MIB) },
        ZoneConfig { file: Some(folder.path().to_owned()), ..shared("c", MIB) },
        ZoneConfig { options: ZoneOptions { prefault: true, ..ZoneOptions::default() }, ..shared("d", MIB) },
    ];
    let first = create(&zones);
    let marks: Vec<u64> = (0..5).map(|number| number * MIB + 0x5000).collect();
    marks.iter().for_each(|gpa| write(&first, *gpa, b"kept"));
    let second = adopt(&zones, &first.share().unwrap()).unwrap().give_to(vm(&Fake::new())).unwrap();
    assert_eq!(second.save(), first.save());
    assert_eq!(content(&second), content(&first));
    write(&second, 0x9000, b"new");
    assert_eq!(content(&first)[0x9000..0x9003], *b"new", "one memory");
    drop(first);
    let third = adopt(&zones, &second.share().unwrap()).unwrap().give_to(vm(&Fake::new())).unwrap();
    drop(second);
    let content = content(&third);
    assert!(marks.iter().all(|gpa| content[usize::try_from(*gpa).unwrap()..].starts_with(b"kept")));
}

/// RAM around the hole is one zone in two pieces.
#[test]
fn a_zone_of_two_pieces_is_one_file() {
    let zones = [shared("a", (3 << 30) + MIB)];
    let first = create(&zones);
    write(&first, 4 << 30, b"high");
    let handed = first.share().unwrap();
    assert_eq!(handed.files.len(), 1);
    let piece = |gpa, size, offset| SharedPiece { gpa, size, file: 0, offset };
    assert_eq!(handed.pieces, [piece(0, 3 << 30, 0), piece(4 << 30, MIB, 3 << 30)]);
    let second = adopt(&zones, &handed).unwrap().give_to(vm(&Fake::new())).unwrap();
    let mut found = [0; 4];
    vm_memory::Bytes::read_slice(&**second.memory(), &mut found, vm_memory::GuestAddress(4 << 30)).unwrap();
    assert_eq!(&found, b"high");
}

#[test]
fn private_zones_are_refused_by_name_at_both_ends() {
    let zones = [zone(MIB), shared("b", MIB), ZoneConfig { id: "c".to_owned(), ..zone(MIB) }];
    let error = create(&zones).share().unwrap_err();
    assert!(matches!(&error, HandoverError::Private { zones } if *zones == ["mem0", "c"]), "{error}");
    let handed = create(&[shared("mem0", MIB)]).share().unwrap();
    let error = adopt(&[zone(MIB)], &handed).unwrap_err();
    assert!(matches!(error, HandoverError::Private { .. }), "{error}");
}

fn memfd(flags: MemfdFlags, size: u64, seals: SealFlags) -> File {
    let file = File::from(rustix::fs::memfd_create("t", flags | MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    if !seals.is_empty() {
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    }
    file
}

#[test]
fn what_is_no_memory_for_the_zone_is_refused() {
    let zones = [shared("a", MIB)];
    let allow = MemfdFlags::ALLOW_SEALING;
    let good = || memfd(allow, MIB, SealFlags::SHRINK);
    let pieces = create(&zones).share().unwrap().pieces;
    let take = |files: Vec<File>| {
        let files = files.into_iter().map(OwnedFd::from).collect();
        HostMemory::adopt(&zones, 40, files, &pieces).map(drop).map_err(|error| error.to_string())
    };
    take(vec![good()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let plain = File::create_new(folder.path().join("plain")).unwrap();
    plain.set_len(MIB).unwrap();
    let tty = File::open("/dev/null").unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    for (files, words) in [
        (vec![], "0 files"),
        (vec![good(), good()], "2 files"),
        (vec![memfd(allow, MIB - 1, SealFlags::SHRINK)], "too small"),
        (vec![memfd(allow, MIB, SealFlags::GROW)], "no such memory file"),
        (vec![memfd(MemfdFlags::empty(), MIB, SealFlags::empty())], "no such memory file"),
        (vec![memfd(allow, MIB, SealFlags::SHRINK | SealFlags::WRITE)], "map"),
        (vec![plain], "no such memory file"),
        (vec![tty], "not a file"),
        (vec![File::from(OwnedFd::from(pipe))], "not a file"),
        (vec![File::open("/").unwrap()], "not a file"),
    ] {
        let error = take(files).unwrap_err();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    }
}

#[test]
fn a_named_file_is_the_takers_own_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let own = ZoneConfig { file: Some(folder.path().join("own")), ..shared("a", MIB) };
    let other = ZoneConfig { file: Some(folder.path().join("other")), ..shared("a", MIB) };
    let below = ZoneConfig { file: Some(folder.path().to_owned()), ..shared("a", MIB) };
    let here = |zone: &ZoneConfig| File::create_new(zone.file.as_ref().unwrap()).unwrap();
    let _files = (here(&own), here(&other));
    let handed = create(std::slice::from_ref(&own)).share().unwrap();
    adopt(&[own], &handed).unwrap();
    for (zone, words) in [(other, "is not the zone's"), (below, "nameless")] {
        let error = adopt(&[zone], &handed).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let error = adopt(&[shared("a", MIB)], &handed).unwrap_err().to_string();
    assert!(error.contains("no such memory file"), "{error}");
}

#[test]
fn pieces_that_lie_elsewhere_and_one_file_for_two_zones_are_refused() {
    let zones = [shared("a", MIB), shared("b", MIB)];
    let handed = create(&zones).share().unwrap();
    for wrong in [
        vec![],
        vec![handed.pieces[0]],
        vec![handed.pieces[1], handed.pieces[0]],
        vec![handed.pieces[0], SharedPiece { offset: 4096, ..handed.pieces[1] }],
        vec![handed.pieces[0], SharedPiece { file: 0, ..handed.pieces[1] }],
        vec![handed.pieces[0], SharedPiece { file: 9, ..handed.pieces[1] }],
        vec![handed.pieces[0], SharedPiece { size: u64::MAX, ..handed.pieces[1] }],
    ] {
        let error = HostMemory::adopt(&zones, 40, files(&handed), &wrong).unwrap_err();
        assert!(matches!(error, HandoverError::Pieces), "{wrong:?}: {error}");
    }
    let twice =
        vec![handed.files[0].try_clone().unwrap().into(), handed.files[0].try_clone().unwrap().into()];
    let error = HostMemory::adopt(&zones, 40, twice, &handed.pieces).unwrap_err().to_string();
    assert!(error.contains("of another zone"), "{error}");
}

/// A peer that makes the file smaller would have the taker die of SIGBUS.
#[test]
fn memory_files_cannot_be_made_smaller() {
    let map = create(&[shared("a", MIB)]);
    let file = &map.share().unwrap().files[0];
    assert_eq!(file.set_len(0).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(rustix::fs::fcntl_add_seals(file, SealFlags::FUTURE_WRITE), Err(rustix::io::Errno::PERM));
}
