//! Descriptor chains that no driver would make, for every device.

use std::io;
use std::time::{Duration, Instant};

use vmm_device_model::device::Lifecycle;

use super::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use super::{TEST_MMIO, TestDriver};
use crate::transport::VIRTIO_F_VERSION_1;

const LIMIT: Duration = Duration::from_secs(10);

/// What is written to a queue: descriptors from index 0 on, then the heads made available.
type Case = (&'static str, &'static [Descriptor], &'static [u16]);

const fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}

/// Buffers of the cases lie here; below what [`TestDriver`] gives out.
const BUFFER: u64 = 0x4000;

const CASES: &[Case] = &[
    ("a chain of itself", &[descriptor(BUFFER, 16, NEXT, 0)], &[0]),
    ("a loop of two", &[descriptor(BUFFER, 16, NEXT, 1), descriptor(BUFFER, 16, NEXT | WRITE, 0)], &[0]),
    ("next outside the table", &[descriptor(BUFFER, 16, NEXT, 0xffff)], &[0]),
    ("head outside the table", &[], &[0xffff]),
    ("outside memory", &[descriptor(1 << 60, 16, NEXT, 1), descriptor(1 << 60, 16, WRITE, 0)], &[0]),
    (
        "end of the address space",
        &[descriptor(u64::MAX, 16, NEXT, 1), descriptor(u64::MAX, 1, WRITE, 0)],
        &[0],
    ),
    ("at MMIO", &[descriptor(TEST_MMIO, 16, NEXT, 1), descriptor(TEST_MMIO, 16, WRITE, 0)], &[0]),
    ("length 0", &[descriptor(BUFFER, 0, NEXT, 1), descriptor(BUFFER, 0, WRITE, 0)], &[0]),
    ("length 4 GiB", &[descriptor(BUFFER, u32::MAX, NEXT, 1), descriptor(BUFFER, u32::MAX, WRITE, 0)], &[0]),
    (
        "readable after writable",
        &[descriptor(BUFFER, 16, NEXT | WRITE, 1), descriptor(BUFFER, 16, 0, 0)],
        &[0],
    ),
    ("only readable", &[descriptor(BUFFER, 16, 0, 0)], &[0]),
    ("only writable", &[descriptor(BUFFER, 16, WRITE, 0)], &[0]),
    (
        "the same head twice",
        &[
            descriptor(BUFFER, 16, NEXT, 1),
            descriptor(BUFFER + 64, 512, NEXT | WRITE, 2),
            descriptor(BUFFER + 32, 1, WRITE, 0),
        ],
        &[0, 0],
    ),
    ("an indirect table of itself", &[descriptor(BUFFER, 16, INDIRECT, 0)], &[0]),
    ("an indirect table outside memory", &[descriptor(1 << 60, 64, INDIRECT, 0)], &[0]),
    ("an indirect table of odd length", &[descriptor(BUFFER, 17, INDIRECT, 0)], &[0]),
    (
        "indirect and next",
        &[descriptor(BUFFER, 16, INDIRECT | NEXT, 1), descriptor(BUFFER, 16, WRITE, 0)],
        &[0],
    ),
];

/// Puts chains into queue `queue` that loop, point outside memory or at registers, have length 0 or 4 GiB, come
/// twice, and the like, with several features agreed on; also an available index that runs ahead. After each
/// the device must stop with nothing in flight, and work again after a reset; the error names the case
/// otherwise.
///
/// # Errors
/// The device did not stop, or did not start again.
pub fn hostile_chains(driver: &mut TestDriver, queue: u16) -> io::Result<()> {
    for features in [VIRTIO_F_VERSION_1, !0] {
        for (what, descriptors, heads) in CASES {
            provoke(driver, queue, features, |driver| {
                for (index, descriptor) in (0..).zip(*descriptors) {
                    driver.write_descriptor(queue, index, *descriptor)?;
                }
                heads.iter().try_for_each(|head| driver.publish(queue, *head))
            })
            .map_err(|e| io::Error::other(format!("{what}, features {features:#x}: {e}")))?;
        }
        for by in [0x101, 0x8000, 0xffff] {
            provoke(driver, queue, features, |driver| driver.advance(queue, by))
                .map_err(|e| io::Error::other(format!("available index ahead by {by:#x}: {e}")))?;
        }
    }
    driver.start(!0).map(drop)
}

fn provoke(
    driver: &mut TestDriver,
    queue: u16,
    features: u64,
    attack: impl FnOnce(&mut TestDriver) -> io::Result<()>,
) -> io::Result<()> {
    driver.start(features)?;
    attack(driver)?;
    driver.kick(queue);
    // Once to let the device meet it, whether it saw the kick or the queue at its next start.
    for _ in 0..2 {
        driver.device.quiesce_begin();
        driver.device.quiesce_finish(Instant::now() + LIMIT).map_err(io::Error::other)?;
        driver.device.resume().map_err(io::Error::other)?;
    }
    driver.reset()
}
