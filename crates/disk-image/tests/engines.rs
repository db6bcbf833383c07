//! One suite for every engine on every kind of disk: buffered and direct, files and block devices.
//!
//! What this machine cannot offer (io_uring, loop devices) is counted as ignored, with the reason in the test's kind.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use common::{Bench, Setup, fill, readable, wait};
use libtest_mimic::{Arguments, Trial};
use vmm_disk_image::{Buffers, Op, Request, SubmitError};

type Case = (&'static str, fn(&Setup));

const CASES: &[Case] = &[
    ("round_trip_in_chunks", round_trip_in_chunks),
    ("one_token_for_many_requests", one_token_for_many_requests),
    ("depth_is_a_limit", depth_is_a_limit),
    ("nothing_goes_past_the_end", nothing_goes_past_the_end),
    ("too_many_bytes_are_refused", too_many_bytes_are_refused),
    ("thousands_of_ranges", thousands_of_ranges),
    ("empty_requests_complete", empty_requests_complete),
    ("unaligned_memory_is_bounced", unaligned_memory_is_bounced),
    ("unaligned_offsets", unaligned_offsets),
    ("write_zeroes_zeroes", write_zeroes_zeroes),
    ("discard_leaves_the_rest_alone", discard_leaves_the_rest_alone),
    ("completion_fd_follows_the_completions", completion_fd_follows_the_completions),
    (
        "what_is_not_announced_is_told_before_the_owner_sleeps",
        what_is_not_announced_is_told_before_the_owner_sleeps,
    ),
    ("memory_is_held_and_given_back", memory_is_held_and_given_back),
    ("dropping_finishes_what_was_kicked", dropping_finishes_what_was_kicked),
    ("engines_share_a_disk_and_cross_threads", engines_share_a_disk_and_cross_threads),
    ("like_a_vector_of_bytes", common::model::like_a_vector_of_bytes),
];

/// These need to look at the file behind the disk.
const FILE_CASES: &[Case] = &[
    ("a_file_cut_short_is_an_error", a_file_cut_short_is_an_error),
    ("a_discard_frees_storage", a_discard_frees_storage),
];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for setup in Setup::all() {
        let file_cases = if setup.is_file() { FILE_CASES } else { &[] };
        for &(name, case) in CASES.iter().chain(file_cases) {
            let missing = setup.missing();
            let trial = Trial::test(format!("{setup}::{name}"), move || {
                case(&setup);
                Ok(())
            });
            let trial = match missing {
                Some(what) => trial.with_kind(what).with_ignored_flag(true),
                None => trial,
            };
            trials.push(trial);
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn round_trip_in_chunks(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let data = fill(1, 256 << 10);
    for chunk in [512, 4096, 65536, 1 << 20] {
        bench.write(4096, Buffers::from_slice(&data).unwrap().chunked(chunk)).unwrap();
        bench.flush();
        assert_eq!(bench.read_chunked(4096, data.len(), chunk), data);
    }
}

fn one_token_for_many_requests(setup: &Setup) {
    let mut bench = Bench::new(setup);
    for block in 0..8_u8 {
        bench.write(u64::from(block) * 4096, Buffers::from_slice(&[block; 4096]).unwrap()).unwrap();
    }
    for block in 0..8 {
        let op = Op::Read { offset: block * 4096, buffers: Buffers::from_slice(&[0xff; 4096]).unwrap() };
        bench.engine.submit(Request { token: 42, op }).unwrap();
    }
    let done = bench.finish();
    assert_eq!(done.len(), 8);
    let mut seen: Vec<u8> = done
        .into_iter()
        .map(|completion| {
            assert_eq!(completion.token, 42);
            assert_eq!(completion.result.unwrap(), 4096);
            let buffers = completion.buffers.unwrap();
            let bytes = buffers.as_slice().unwrap();
            assert!(bytes.iter().all(|&byte| byte == bytes[0]));
            bytes[0]
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6, 7]);
}

fn depth_is_a_limit(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let read = |token| Request {
        token,
        op: Op::Read { offset: 0, buffers: Buffers::from_slice(&[7; 4096]).unwrap() },
    };
    for round in 0..3 {
        for token in 0..u64::from(common::DEPTH) {
            bench.engine.submit(read(token)).unwrap();
        }
        assert_eq!(bench.engine.in_flight(), usize::from(common::DEPTH));
        let rejected = bench.engine.submit(read(99)).unwrap_err();
        assert_eq!(rejected.reason, SubmitError::Full, "round {round}");
        assert_eq!(rejected.request.token, 99);
        let Op::Read { buffers, .. } = rejected.request.op else { panic!("another request") };
        assert_eq!(buffers.as_slice().unwrap(), [7; 4096]);
        assert_eq!(bench.finish().len(), usize::from(common::DEPTH));
        assert_eq!(bench.engine.in_flight(), 0);
    }
    // Requests that need no kernel count as well.
    for _ in 0..common::DEPTH {
        bench.engine.submit(Request { token: 0, op: Op::Discard { offset: 0, len: 0 } }).unwrap();
    }
    assert_eq!(bench.engine.submit(read(0)).unwrap_err().reason, SubmitError::Full);
}

fn nothing_goes_past_the_end(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let size = bench.disk.size();
    for offset in [size - 4096 + 512, size, size + 4096, u64::MAX - 100, u64::MAX] {
        let buffers = || Buffers::zeroed(4096).unwrap();
        let ops = [
            Op::Read { offset, buffers: buffers() },
            Op::Write { offset, buffers: buffers() },
            Op::Discard { offset, len: 4096 },
            Op::WriteZeroes { offset, len: 4096, may_unmap: true },
            Op::WriteZeroes { offset: 4096, len: offset, may_unmap: false },
        ];
        for op in ops {
            let rejected = bench.engine.submit(Request { token: 0, op }).unwrap_err();
            assert!(matches!(rejected.reason, SubmitError::OutOfRange { .. }), "{rejected:?}");
        }
    }
    // The last block is within.
    bench.write(size - 4096, Buffers::from_slice(&[5; 4096]).unwrap()).unwrap();
    assert_eq!(bench.read(size - 4096, 4096), [5; 4096]);
    if setup.is_file() {
        assert_eq!(fs::metadata(bench.path()).unwrap().len(), size);
    }
}

fn too_many_bytes_are_refused(setup: &Setup) {
    #![expect(
        unsafe_code,
        reason = "more bytes than this machine has, by naming the same ones over and over"
    )]
    let mut bench = Bench::with_size(setup, 5 << 30);
    let memory = Arc::new(Buffers::zeroed(1 << 20).map(std::sync::Mutex::new).unwrap());
    let range = memory.lock().unwrap().ranges().next().unwrap();
    // SAFETY: the ranges are all the memory that the owner keeps, and nobody looks at it.
    let buffers = unsafe { Buffers::new(memory, std::iter::repeat_n(range, 4097)) };
    let request = Request { token: 0, op: Op::Read { offset: 0, buffers } };
    let rejected = bench.engine.submit(request).unwrap_err();
    assert_eq!(rejected.reason, SubmitError::TooLong { len: 4097 << 20 });
}

fn thousands_of_ranges(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let data = fill(2, 2500 * 512);
    bench.write(0, Buffers::from_slice(&data[..2496 * 512]).unwrap().chunked(512)).unwrap();
    assert_eq!(bench.read_chunked(0, 2496 * 512, 512), data[..2496 * 512]);
}

fn empty_requests_complete(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let ops = [
        Op::Read { offset: 0, buffers: Buffers::zeroed(0).unwrap() },
        Op::Write { offset: 0, buffers: Buffers::zeroed(0).unwrap() },
        Op::Discard { offset: 0, len: 0 },
        Op::WriteZeroes { offset: 0, len: 0, may_unmap: true },
    ];
    for op in ops {
        bench.engine.submit(Request { token: 3, op }).unwrap();
    }
    let done = bench.finish();
    assert_eq!(done.len(), 4);
    assert!(done.iter().all(|completion| matches!(completion.result, Ok(0))));
}

fn unaligned_memory_is_bounced(setup: &Setup) {
    let mut bench = Bench::new(setup);
    // More than a bounce buffer holds, in pieces that fit no block.
    let data = fill(3, (2 << 20) + 8192);
    bench.write(8192, Buffers::from_slice(&data).unwrap().chunked(4093)).unwrap();
    assert_eq!(bench.read(8192, data.len()), data);
    assert_eq!(bench.read_chunked(8192, data.len(), 4091), data);
}

fn unaligned_offsets(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let data = fill(4, 16384);
    bench.write(0, Buffers::from_slice(&data).unwrap()).unwrap();
    for (offset, len) in [(1, 1), (100, 5000), (511, 2), (4095, 4097), (12000, 4384)] {
        assert_eq!(bench.read(offset as u64, len), data[offset..offset + len]);
    }
    let writes = [
        Op::Write { offset: 100, buffers: Buffers::from_slice(&[1; 4096]).unwrap() },
        Op::Write { offset: 4096, buffers: Buffers::from_slice(&[1; 100]).unwrap() },
        Op::WriteZeroes { offset: 100, len: 8192, may_unmap: true },
        Op::WriteZeroes { offset: 4096, len: 100, may_unmap: false },
    ];
    for op in writes {
        match bench.engine.submit(Request { token: 0, op }) {
            Ok(()) => {
                assert!(!setup.direct);
                assert!(bench.finish().remove(0).result.is_ok());
            }
            Err(rejected) => {
                assert!(setup.direct);
                assert!(matches!(rejected.reason, SubmitError::Unaligned { .. }));
            }
        }
    }
    let mut expected = data;
    if !setup.direct {
        expected[100..4196].fill(1);
        expected[100..8292].fill(0);
        expected[4096..4196].fill(0);
    }
    assert_eq!(bench.read(0, 16384), expected);
}

fn write_zeroes_zeroes(setup: &Setup) {
    let mut bench = Bench::new(setup);
    for may_unmap in [false, true] {
        for (offset, len) in [(4096, 4096), (0, 8192), (8192, 1 << 20)] {
            let mut expected = fill(5, 2 << 20);
            bench.write(0, Buffers::from_slice(&expected).unwrap()).unwrap();
            bench.run(Op::WriteZeroes { offset, len, may_unmap }).unwrap();
            let (start, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            expected[start..start + len].fill(0);
            assert_eq!(bench.read(0, expected.len()), expected);
        }
    }
}

fn discard_leaves_the_rest_alone(setup: &Setup) {
    let mut bench = Bench::new(setup);
    assert!(bench.disk.supports_discard());
    let data = fill(6, 1 << 20);
    for (offset, len) in [(0, 4096), (4096, 512 << 10), (100, 9000)] {
        bench.write(0, Buffers::from_slice(&data).unwrap()).unwrap();
        bench.run(Op::Discard { offset: offset as u64, len: len as u64 }).unwrap();
        let found = bench.read(0, data.len());
        assert_eq!(found[..offset], data[..offset]);
        assert_eq!(found[offset + len..], data[offset + len..]);
    }
}

fn completion_fd_follows_the_completions(setup: &Setup) {
    let mut bench = Bench::new(setup);
    assert!(!readable(bench.engine.completion_fd(), 0));
    for round in 0..3 {
        for token in 0..4 {
            let op = Op::Read { offset: token * 4096, buffers: Buffers::zeroed(4096).unwrap() };
            bench.engine.submit(Request { token, op }).unwrap();
        }
        bench.engine.kick().unwrap();
        let mut done = Vec::new();
        while done.len() < 4 {
            assert!(readable(bench.engine.completion_fd(), 5000), "round {round}");
            bench.engine.reap(&mut done).unwrap();
        }
        // Readable once too often at most.
        bench.engine.reap(&mut done).unwrap();
        assert!(!readable(bench.engine.completion_fd(), 0));
        assert_eq!(done.len(), 4);
    }
    // What needs no kernel is announced too.
    bench.engine.submit(Request { token: 0, op: Op::Discard { offset: 0, len: 0 } }).unwrap();
    assert!(readable(bench.engine.completion_fd(), 0));
}

fn what_is_not_announced_is_told_before_the_owner_sleeps(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let submit = |bench: &mut Bench, token| {
        let op = Op::Read { offset: token * 4096, buffers: Buffers::zeroed(4096).unwrap() };
        bench.engine.submit(Request { token, op }).unwrap();
        bench.engine.kick().unwrap();
    };
    assert!(!bench.engine.announce(false));
    for round in 0..3 {
        let mut done = Vec::new();
        submit(&mut bench, 0);
        // As a thread that is never out of work.
        poll_until(|| {
            bench.engine.reap(&mut done).unwrap();
            done.len() == 1
        });
        submit(&mut bench, 1);
        submit(&mut bench, 2);
        // As a thread that is about to sleep.
        while done.len() < 3 {
            if !bench.engine.announce(true) {
                assert!(readable(bench.engine.completion_fd(), 5000), "round {round}");
            }
            bench.engine.announce(false);
            bench.engine.reap(&mut done).unwrap();
        }
    }
    // What needs no kernel is told, too.
    bench.engine.submit(Request { token: 0, op: Op::Discard { offset: 0, len: 0 } }).unwrap();
    assert!(bench.engine.announce(true));
}

/// Waits for what comes without a signal; each look is a system call.
fn poll_until(mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < std::time::Duration::from_secs(10));
        std::thread::yield_now();
    }
}

fn memory_is_held_and_given_back(setup: &Setup) {
    #![expect(unsafe_code, reason = "memory of somebody else's, as a guest's is")]
    let mut bench = Bench::new(setup);
    bench.write(0, Buffers::from_slice(&[9; 4096]).unwrap()).unwrap();
    let owner = Arc::new(std::sync::Mutex::new(Buffers::zeroed(4096).unwrap()));
    let range = owner.lock().unwrap().ranges().next().unwrap();
    // SAFETY: the range is all the memory that `owner` keeps, and it is looked at only when the request has ended.
    let buffers = unsafe { Buffers::new(owner.clone(), [range]) };
    bench.engine.submit(Request { token: 0, op: Op::Read { offset: 0, buffers } }).unwrap();
    assert_eq!(Arc::strong_count(&owner), 2);
    let mut done = bench.finish();
    let buffers = done.remove(0).buffers.unwrap();
    assert_eq!(Arc::strong_count(&owner), 2);
    drop(buffers);
    assert_eq!(Arc::strong_count(&owner), 1);
    assert_eq!(owner.lock().unwrap().as_slice().unwrap(), [9; 4096]);
}

fn dropping_finishes_what_was_kicked(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let data = fill(7, 64 << 10);
    for token in 0..u64::from(common::DEPTH) {
        let op = Op::Write { offset: token << 16, buffers: Buffers::from_slice(&data).unwrap() };
        bench.engine.submit(Request { token, op }).unwrap();
    }
    bench.engine.kick().unwrap();
    bench.engine = bench.disk.engine(setup.kind, 1).unwrap();
    for token in 0..u64::from(common::DEPTH) {
        assert_eq!(bench.read(token << 16, data.len()), data);
    }
}

fn engines_share_a_disk_and_cross_threads(setup: &Setup) {
    let mut bench = Bench::new(setup);
    let threads: Vec<_> = (0..4_u8)
        .map(|index| {
            let mut engine = bench.disk.engine(setup.kind, 4).unwrap();
            std::thread::spawn(move || {
                let offset = u64::from(index) * 8192;
                for _ in 0..20 {
                    let op = Op::Write { offset, buffers: Buffers::from_slice(&[index; 8192]).unwrap() };
                    engine.submit(Request { token: 0, op }).unwrap();
                    assert!(wait(&mut *engine).remove(0).result.is_ok());
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let expected: Vec<u8> = (0..4).flat_map(|index| [index; 8192]).collect();
    assert_eq!(bench.read(0, expected.len()), expected);
}

fn a_file_cut_short_is_an_error(setup: &Setup) {
    let mut bench = Bench::new(setup);
    fs::OpenOptions::new().write(true).open(bench.path()).unwrap().set_len(8192).unwrap();
    let error = bench.run(Op::Read { offset: 4096, buffers: Buffers::zeroed(8192).unwrap() }).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let error = bench.run(Op::Read { offset: 16384, buffers: Buffers::zeroed(512).unwrap() }).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

fn a_discard_frees_storage(setup: &Setup) {
    let mut bench = Bench::new(setup);
    bench.write(0, Buffers::from_slice(&fill(8, 1 << 20)).unwrap()).unwrap();
    bench.flush();
    let before = fs::metadata(bench.path()).unwrap().blocks();
    bench.run(Op::Discard { offset: 0, len: 1 << 20 }).unwrap();
    assert!(fs::metadata(bench.path()).unwrap().blocks() < before);
    assert_eq!(bench.read(0, 1 << 20), vec![0; 1 << 20]);
    // Holes are filled again, and zeroes may make new ones.
    bench.write(0, Buffers::from_slice(&fill(8, 1 << 20)).unwrap()).unwrap();
    bench.flush();
    bench.run(Op::WriteZeroes { offset: 0, len: 1 << 20, may_unmap: true }).unwrap();
    assert!(fs::metadata(bench.path()).unwrap().blocks() < before);
}
