//! With real faults, of this process and of the kernel on its behalf.

use std::io::{Seek, Write};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, ReadVolatile};

use super::*;
use crate::sys;

const PAGES: u64 = 16;

/// 16 pages of guest memory at 0: private, or shared as a memfd.
fn memory(shared: bool) -> Arc<GuestRam> {
    let size = usize::try_from(PAGES * PAGE_SIZE).unwrap();
    let bitmap = vm_memory::bitmap::AtomicBitmap::new(size, std::num::NonZeroUsize::MIN);
    let builder =
        MmapRegionBuilder::new_with_bitmap(size, bitmap).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = if shared {
        let file = sys::memfd("test", None).unwrap();
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(FileOffset::new(file, 0))
    } else {
        builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
    };
    let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
    Arc::new(GuestRam::from_regions(vec![region]).unwrap())
}

/// Waits for a fault; an end of time is a failure.
fn next(userfault: &Userfault) -> Fault {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(fault) = userfault.faults().unwrap().first() {
            return *fault;
        }
        assert!(Instant::now() < end, "no fault came");
        thread::sleep(Duration::from_millis(1));
    }
}

fn byte(memory: &GuestRam, page: u64) -> u8 {
    memory.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
}

const PAGE: [u8; 4096] = [7; 4096];

#[test]
fn missing_pages_are_copied_or_zeroed_and_those_that_are_there_stay() {
    for shared in [false, true] {
        let memory = memory(shared);
        memory.write_obj(1_u8, GuestAddress(2 * PAGE_SIZE)).unwrap();
        let userfault = Userfault::new(Arc::clone(&memory), Features::MISSING_SHARED).unwrap();
        userfault.register(0, Mode::Missing).unwrap();
        let reader = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || [1, 2, 3, 5].map(|page| byte(&memory, page)))
        };
        let expected = |offset| Fault { region: 0, offset, kind: FaultKind::Missing };
        assert_eq!(next(&userfault), expected(PAGE_SIZE), "shared: {shared}");
        // Over the page that is there.
        let bytes = [PAGE, PAGE, PAGE].concat();
        userfault.copy(0, PAGE_SIZE, &bytes).unwrap();
        assert_eq!(next(&userfault), expected(5 * PAGE_SIZE));
        userfault.zero(0, 2 * PAGE_SIZE..6 * PAGE_SIZE).unwrap();
        assert_eq!(reader.join().unwrap(), [7, 1, 7, 0]);
        assert_eq!(byte(&memory, 3), 7, "zeroes do not replace it");
        assert!(userfault.faults().unwrap().is_empty());
        userfault.copy(0, 9 * PAGE_SIZE, &[]).unwrap();
        userfault.copy(1, 0, &PAGE).unwrap_err();
    }
}

#[test]
fn writes_to_protected_pages_wait_and_reads_do_not() {
    for shared in [false, true] {
        let memory = memory(shared);
        let wanted = Features::WRITE_PROTECT | Features::WRITE_PROTECT_SHARED;
        (0..4).for_each(|page| memory.write_obj(page as u8, GuestAddress(page * PAGE_SIZE)).unwrap());
        let userfault = Userfault::new(Arc::clone(&memory), wanted).unwrap();
        userfault.register(0, Mode::WriteProtect).unwrap();
        userfault.protect(0, 0..PAGES * PAGE_SIZE).unwrap();
        let (zero, three) = (byte(&memory, 0), byte(&memory, 3));
        assert_eq!((zero, three), (0, 3), "reads go on");
        // By the kernel on behalf of this process, as devices' I/O is, and directly.
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; 4096]).unwrap();
        file.rewind().unwrap();
        let writer = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                let slice = memory.get_slice(GuestAddress(PAGE_SIZE), 4096).unwrap();
                file.read_exact_volatile(&mut slice.offset(0).unwrap()).unwrap();
                memory.write_obj(8_u8, GuestAddress(3 * PAGE_SIZE)).unwrap();
            })
        };
        for page in [1, 3] {
            let expected = Fault { region: 0, offset: page * PAGE_SIZE, kind: FaultKind::Protected };
            assert_eq!(next(&userfault), expected, "shared: {shared}");
            assert_eq!(u64::from(byte(&memory, page)), page, "it is not written yet");
            userfault.release(0, page * PAGE_SIZE..(page + 1) * PAGE_SIZE).unwrap();
        }
        writer.join().unwrap();
        assert_eq!((byte(&memory, 1), byte(&memory, 2), byte(&memory, 3)), (9, 2, 8));
    }
}

#[test]
fn who_waits_goes_on_when_nobody_handles_faults_any_more() {
    for unregister in [false, true] {
        let memory = memory(false);
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        let userfault = Userfault::new(Arc::clone(&memory), Features::WRITE_PROTECT).unwrap();
        userfault.register(0, Mode::WriteProtect).unwrap();
        userfault.protect(0, 0..PAGE_SIZE).unwrap();
        let writer = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || memory.write_obj(2_u8, GuestAddress(0)).unwrap())
        };
        next(&userfault);
        if unregister {
            userfault.unregister(0).unwrap();
        } else {
            drop(userfault);
        }
        writer.join().unwrap();
        assert_eq!(byte(&memory, 0), 2);
    }
}

#[test]
fn pages_of_a_file_that_are_not_mapped_are_mapped() {
    let memory = memory(true);
    let file = memory.iter().next().unwrap().get_mmap().file_offset().unwrap().clone();
    std::os::unix::fs::FileExt::write_all_at(file.file(), &PAGE, 0).unwrap();
    let userfault = Userfault::new(Arc::clone(&memory), Features::MINOR_SHARED).unwrap();
    userfault.register(0, Mode::Minor).unwrap();
    let reader = {
        let memory = Arc::clone(&memory);
        thread::spawn(move || byte(&memory, 0))
    };
    assert_eq!(next(&userfault), Fault { region: 0, offset: 0, kind: FaultKind::Unmapped });
    userfault.wake(0, 0..PAGE_SIZE).unwrap();
    next(&userfault);
    userfault.map(0, 0..PAGE_SIZE).unwrap();
    assert_eq!(reader.join().unwrap(), 7);
}

#[test]
fn what_a_kernel_lacks_is_told() {
    let beyond = Features(1 << 63) | Features::WRITE_PROTECT;
    match Userfault::new(memory(false), beyond) {
        Err(UserfaultError::Lacks(lacking)) => assert_eq!(lacking, Features(1 << 63)),
        other => panic!("{other:?}"),
    }
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGE_SIZE).unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(
        4096,
        vm_memory::bitmap::AtomicBitmap::new(4096, std::num::NonZeroUsize::MIN),
    )
    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
    .with_mmap_flags(libc::MAP_PRIVATE)
    .with_file_offset(FileOffset::new(file, 0))
    .build()
    .unwrap();
    let memory =
        GuestRam::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap();
    let userfault = Userfault::new(Arc::new(memory), Features::WRITE_PROTECT).unwrap();
    assert!(
        matches!(
            userfault.register(0, Mode::WriteProtect),
            Err(UserfaultError::Call { source, .. }) if source.raw_os_error() == Some(libc::EINVAL)
        ),
        "a private mapping of a file"
    );
}
