//! What an access to configuration space costs behind the bus.
//!
//! `cargo bench -p vmm-pci --bench config`
#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use vmm_pci::config::{ConfigSpace, Identity};

const COMMAND: u16 = 4;
const IDENTITY: Identity =
    Identity { vendor: 1, device: 2, subsystem_vendor: 3, subsystem: 4, class: 0x01_8000, revision: 1 };

fn access(criterion: &mut Criterion) {
    let mut config = ConfigSpace::new(&IDENTITY);
    let mut group = criterion.benchmark_group("pci-config");
    group.bench_function("read", |bencher| {
        bencher.iter(|| {
            let mut data = [0; 4];
            config.read(black_box(0), &mut data);
            data
        });
    });
    group.bench_function("write", |bencher| {
        bencher.iter(|| config.write(black_box(COMMAND), black_box(&[6, 0])));
    });
    group.finish();
}

criterion_group!(benches, access);
criterion_main!(benches);
