//! A scripted driver of the disk.

use std::time::Instant;

use vmm_hypervisor::fake::{Answer, Exit, Fake};
use vmm_tests::harness::LIMIT;

use super::Rig;

fn config_address(device: u8, register: u32) -> Exit {
    let address = 0x8000_0000 | u32::from(device) << 11 | register;
    Exit::PioWrite { port: 0xcf8, data: address.to_le_bytes().to_vec() }
}

const READ_CONFIG: Exit = Exit::PioRead { port: 0xcfc, size: 4, count: 1 };

impl Rig {
    /// The guest's driver of the disk comes up: the device has something to start and to stop.
    pub(crate) fn drive_the_disk(&mut self, fake: &Fake) {
        let before = fake.answers().len();
        for device in 0..32 {
            for register in [0, 0x10, 0x14] {
                fake.script(0, [config_address(device, register), READ_CONFIG]);
            }
        }
        let answers = self.until(|| fake.answers().get(before..before + 96).map(<[Answer]>::to_vec));
        let value = |at: usize| u32::from_le_bytes(answers[at].data.as_slice().try_into().unwrap());
        let device = (0..32).find(|device| value(3 * device) == 0x1042_1af4).unwrap();
        let bar = u64::from(value(3 * device + 2)) << 32 | u64::from(value(3 * device + 1) & !0xf);
        let set = |offset: u64, bytes: &[u8]| Exit::MmioWrite { address: bar + offset, data: bytes.to_vec() };
        let ring = |offset, gpa: u32| [set(offset, &gpa.to_le_bytes()), set(offset + 4, &[0; 4])];
        let enable = Exit::PioWrite { port: 0xcfc, data: vec![6] };
        fake.script(0, [config_address(device as u8, 4), enable]);
        // Status, VIRTIO_F_VERSION_1, FEATURES_OK, queue 0 with 8 descriptors, DRIVER_OK: virtio 1.3, 4.1.4.3.
        fake.script(0, [set(0x14, &[3]), set(8, &[1, 0, 0, 0]), set(0xc, &[1, 0, 0, 0]), set(0x14, &[11])]);
        fake.script(0, [set(0x16, &[0, 0]), set(0x18, &[8, 0])]);
        fake.script(
            0,
            [(0x20, 0x20_0000), (0x28, 0x20_1000), (0x30, 0x20_2000)].map(|(a, b)| ring(a, b)).concat(),
        );
        fake.script(0, [set(0x1c, &[1, 0]), set(0x14, &[15])]);
        let status = Exit::MmioRead { address: bar + 0x14, size: 1 };
        fake.script(0, [status]);
        let status = self.until(|| fake.answers().get(before + 96).cloned());
        assert_eq!(status.data, [15], "the driver is up");
        // The device's thread starts on this one.
        self.pump();
    }

    fn until<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < end, "it does not happen");
            self.pump();
            std::thread::yield_now();
        }
    }
}
