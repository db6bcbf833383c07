use std::cell::RefCell;
use std::io::Write;
use std::os::unix::net::UnixStream;

use vmm_migration_protocol::{MemoryLayout, Packer, Region};

use super::*;

/// What a connection says that sends these frames, its end, and the guest's first page then.
fn said(bytes: &[u8], packed: bool) -> (Vec<Said>, String, Vec<u8>) {
    let length = 4 * PAGE;
    let memory =
        Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), usize::try_from(length).unwrap())]).unwrap());
    let layout = MemoryLayout::new(vec![Region { gpa: 0, length, zone: "mem0".into() }]).unwrap();
    let ground = Ground::default();
    let features = if packed { Features::LZ4 } else { Features::NONE };
    ground.open(Arc::clone(&memory), layout, (1, 1), features, None);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(bytes).unwrap();
    drop(ours);
    let mut frames = Frames::of(&Arc::new(Socket::Unix(theirs)));
    let said = RefCell::new(Vec::new());
    let tell = |what: Said| {
        said.borrow_mut().push(what);
        true
    };
    let (first, target) = (frames.next().unwrap(), ground.target(1).unwrap().0);
    let end = land(&mut frames, first, (&ground, 1, target), &tell).unwrap_err();
    let mut page = vec![0; usize::try_from(PAGE).unwrap()];
    memory.read_slice(&mut page, GuestAddress(0)).unwrap();
    (said.into_inner(), format!("{end:?}"), page)
}

fn frame(contents: &[u8], checksum: u32, length: u64) -> Vec<u8> {
    let range = MemoryRange::new(0, length).unwrap();
    let bulk = Bulk::packed(range, 0, checksum, contents.len()).unwrap();
    [&bulk.header()[..], contents].concat()
}

#[test]
fn compressed_memory_lands_where_that_was_agreed_on_and_as_much_as_was_announced() {
    let page = vec![7; usize::try_from(PAGE).unwrap()];
    let packed = Packer::new().pack(&page).unwrap().to_vec();
    let checksum = contents_checksum([&packed[..]]);
    let whole = frame(&packed, checksum, PAGE);
    let nothing = vec![0; page.len()];

    let (told, end, landed) = said(&whole, true);
    assert!(told.is_empty() && end.contains("closed the connection"), "{told:?} {end}");
    assert!(landed == page);

    let (told, end, landed) = said(&whole, false);
    assert!(told.is_empty() && end.contains("not agreed on"), "{told:?} {end}");
    assert!(landed == nothing);

    let (_, end, landed) = said(&frame(&packed, checksum, 2 * PAGE), true);
    assert!(end.contains("become 4096 bytes, the range has 8192"), "{end}");
    assert!(landed == nothing);

    let garbage = vec![0xff; 99];
    let (_, end, landed) = said(&frame(&garbage, contents_checksum([&garbage[..]]), PAGE), true);
    assert!(end.starts_with("Garbage"), "{end}");
    assert!(landed == nothing);

    // Damaged on the way: it is asked for again.
    let (told, _, landed) = said(&frame(&packed, checksum ^ 1, PAGE), true);
    assert!(matches!(told[..], [Said::Damaged(range)] if range.length() == PAGE), "{told:?}");
    assert!(landed == nothing);
}
