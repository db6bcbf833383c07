//! A disk behaves as a vector of bytes.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmm_disk_image::{Buffers, Op, Request};

use super::{Bench, Setup, fill};

/// Requests of a batch run at the same time, so each has a region of its own.
const REGION: u64 = 256 << 10;
const REGIONS: usize = 8;
/// Unit of offsets and lengths, which suits every direct disk of the tests.
const BLOCK: u64 = 4096;

#[derive(Clone, Debug)]
struct Plan {
    what: What,
    /// Start and length in blocks, within the region.
    start: u64,
    len: u64,
    chunk: usize,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Read,
    Write(u64),
    Zero(bool),
    Discard,
    Flush,
}

fn plan() -> impl Strategy<Value = Plan> {
    let what = prop_oneof![
        4 => Just(What::Read),
        4 => any::<u64>().prop_map(What::Write),
        2 => any::<bool>().prop_map(What::Zero),
        1 => Just(What::Discard),
        1 => Just(What::Flush),
    ];
    let blocks = REGION / BLOCK;
    let range = (0..blocks).prop_flat_map(move |start| (Just(start), 0..=blocks - start));
    let chunk = prop_oneof![Just(usize::MAX), Just(512), Just(4096), 1_usize..9000];
    (what, range, chunk).prop_map(|(what, (start, len), chunk)| Plan { what, start, len, chunk })
}

pub(crate) fn like_a_vector_of_bytes(setup: &Setup) {
    let config = Config { cases: 8, failure_persistence: None, ..Config::default() };
    let batches = vec(vec(plan(), 1..=REGIONS), 1..12);
    TestRunner::new(config)
        .run(&batches, |batches| {
            let mut bench = Bench::new(setup);
            let mut model = vec![0; usize::try_from(REGION).unwrap() * REGIONS];
            for batch in batches {
                run(&mut bench, &mut model, &batch);
            }
            prop_assert!(bench.read(0, model.len()) == model);
            Ok(())
        })
        .unwrap();
}

/// Carries out a batch at once, on the disk and on the model, and compares what was read.
fn run(bench: &mut Bench, model: &mut [u8], batch: &[Plan]) {
    for (index, plan) in batch.iter().enumerate() {
        let region = index as u64 * REGION;
        let (offset, len) = (region + plan.start * BLOCK, plan.len * BLOCK);
        let range = offset as usize..(offset + len) as usize;
        let buffers =
            |bytes: &[u8]| Buffers::from_slice(bytes).unwrap().chunked(plan.chunk.max(len as usize / 4000));
        let op = match plan.what {
            What::Read => Op::Read { offset, buffers: buffers(&vec![0xa5; range.len()]) },
            What::Write(seed) => {
                model[range.clone()].copy_from_slice(&fill(seed, range.len()));
                Op::Write { offset, buffers: buffers(&model[range]) }
            }
            What::Zero(may_unmap) => {
                model[range].fill(0);
                Op::WriteZeroes { offset, len, may_unmap }
            }
            What::Discard => Op::Discard { offset, len },
            What::Flush => Op::Flush,
        };
        bench.engine.submit(Request { token: index as u64, op }).unwrap();
    }
    let done = bench.finish();
    assert_eq!(done.len(), batch.len());
    for completion in done {
        let index = usize::try_from(completion.token).unwrap();
        let plan = &batch[index];
        let start = index * REGION as usize + (plan.start * BLOCK) as usize;
        let expected = &mut model[start..start + (plan.len * BLOCK) as usize];
        let moved = completion.result.unwrap() as usize;
        let buffers = completion.buffers;
        match plan.what {
            What::Read => {
                assert_eq!(moved, expected.len());
                assert!(buffers.unwrap().as_slice().unwrap() == expected, "{plan:?}");
            }
            What::Write(_) => assert_eq!(moved, expected.len()),
            What::Zero(_) | What::Flush => assert_eq!(moved, 0),
            What::Discard => {
                // Each byte is what it was, or zero.
                let found = bench.read(start as u64, expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    assert!(*found == *expected || *found == 0, "{plan:?}");
                    *expected = *found;
                }
            }
        }
    }
}
