//! What a guest's exit costs on the bus: the look-up among 20 mappings, the device's lock, the call.
//!
//! `cargo bench -p vmm-device-model --bench bus`
#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use std::hint::black_box;
use std::sync::{Arc, Mutex};

use criterion::{Criterion, criterion_group, criterion_main};
use vmm_device_model::bus::{Bus, BusDevice, BusError, Mapping};

const MAPPINGS: u64 = 20;
const SIZE: u64 = 0x1000;

/// A device with one register.
struct Register(u64);

impl BusDevice for Register {
    fn read(&mut self, _: u16, _: u64, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.0.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&mut self, _: u16, offset: u64, data: &[u8]) {
        self.0 = data.iter().fold(offset, |value, byte| value << 8 | u64::from(*byte));
    }
}

fn bus() -> Result<Bus, BusError> {
    let bus = Bus::new();
    bus.update(|map| {
        (0..MAPPINGS).try_for_each(|n| {
            let target = Arc::new(Mutex::new(Register(n)));
            map.insert(Mapping { base: n * 2 * SIZE, len: SIZE, target, region: 0 })
        })
    })?;
    Ok(bus)
}

/// Every mapping in turn, so that no branch predictor learns one.
fn addresses() -> impl Iterator<Item = u64> {
    (0..MAPPINGS).map(|n| n * 7 % MAPPINGS * 2 * SIZE + 8).cycle()
}

fn dispatch(criterion: &mut Criterion) {
    let Ok(bus) = bus() else { unreachable!("the mappings do not overlap") };
    let mut group = criterion.benchmark_group("bus");
    let mut at = addresses();
    group.bench_function("read", |bencher| {
        bencher.iter(|| {
            let mut data = [0; 4];
            bus.read(black_box(at.next().unwrap_or(0)), &mut data);
            data
        });
    });
    let mut at = addresses();
    group.bench_function("write", |bencher| {
        bencher.iter(|| bus.write(black_box(at.next().unwrap_or(0)), black_box(&[1, 2, 3, 4])));
    });
    group.bench_function("hole", |bencher| {
        bencher.iter(|| {
            let mut data = [0; 4];
            bus.read(black_box(SIZE), &mut data);
            data
        });
    });
    group.finish();
}

criterion_group!(benches, dispatch);
criterion_main!(benches);
