//! How long it takes to make ranges of a bitmap of dirty pages: 64 GiB of memory, a tenth of it dirty.
//!
//! `cargo bench -p vmm-memory-manager --bench dirty`. One JSON object per case: the median of the rounds.

use std::hint::black_box;
use std::time::Instant;

use vmm_memory_manager::dirty::ranges;

/// Words of 64 pages of 4 KiB.
const WORDS: usize = (64 << 30) / 4096 / 64;
const ROUNDS: usize = 51;

fn main() {
    for (run, name) in
        [(1, "64 GiB of which each tenth page is dirty, by chance"), (16, "the same in runs of 16 pages")]
    {
        let bitmap = bitmap(run);
        let mut times: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                drop(black_box(ranges(black_box(&bitmap))));
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let median = times.get(ROUNDS / 2).copied().unwrap_or(f64::NAN);
        println!(
            "{{\"name\":\"{name}, to ranges\",\"unit\":\"ms\",\"ours\":{median},\"floor\":null,\"ratio\":null,\
             \"goal\":\"at-most\",\"target\":5.0}}"
        );
    }
}

/// A tenth of all runs of so many pages is dirty.
fn bitmap(run: u32) -> Vec<u64> {
    // Marsaglia's xorshift, shifts 13, 7, 17.
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut chance = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.is_multiple_of(10)
    };
    let ones = u64::MAX >> (u64::BITS - run);
    let word = |chance: &mut dyn FnMut() -> bool| {
        (0..u64::BITS / run).filter(|_| chance()).fold(0, |word, at| word | ones << (at * run))
    };
    (0..WORDS).map(|_| word(&mut chance)).collect()
}
