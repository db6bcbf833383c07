//! Disks.

use super::check::Checker;
use super::{DiskFormat, DiskImage, DiskSpec, MAX_DISK_SERIAL, MAX_QUEUE_SIZE};
use crate::config::{DiskConfig, ImageType};

/// A request needs three descriptors: header, data, status.
const MIN_QUEUE_SIZE: u16 = 4;
/// The limit of virtio (1.2, section 2.7).
const VIRTIO_QUEUE_SIZE: u16 = 32768;

pub(super) fn check(configs: &[DiskConfig], boot_vcpus: u32, checker: &mut Checker) -> Vec<DiskSpec> {
    let disk = |(index, config)| disk(&format!("disks[{index}]"), config, boot_vcpus, checker);
    configs.iter().enumerate().filter_map(disk).collect()
}

fn disk(path: &str, config: &DiskConfig, boot_vcpus: u32, checker: &mut Checker) -> Option<DiskSpec> {
    queues(path, config, boot_vcpus, checker);
    if let Some(serial) = &config.serial {
        check_serial(path, serial, checker);
    }
    let identity = checker.identity(path, config.id.as_deref(), config.pci_device_id);
    let image = image(path, config, checker)?;
    Some(DiskSpec {
        identity: identity?,
        image,
        queues: u16::try_from(config.num_queues).ok()?,
        queue_size: config.queue_size,
        serial: config.serial.clone(),
        io_uring: !config.disable_io_uring,
        aio: !config.disable_aio,
    })
}

fn image(path: &str, config: &DiskConfig, checker: &mut Checker) -> Option<DiskImage> {
    let image = match (&config.path, &config.vhost_socket) {
        (Some(_), Some(_)) => {
            checker.invalid(format!("{path}.path"), "cannot be combined with vhost_socket");
            return None;
        }
        (None, socket) => {
            // A back-end of its own needs no path; that it is not supported is said elsewhere.
            if !config.vhost_user && socket.is_none() {
                checker.invalid(format!("{path}.path"), "is required, and missing");
            }
            return None;
        }
        (Some(image), None) => image,
    };
    match config.image_type {
        ImageType::Raw => {}
        ImageType::Unknown => {
            let message = "is not given: the image is used as raw; say image_type Raw if that is meant";
            checker.warn(format!("{path}.image_type"), message);
        }
        other => checker.not_built(format!("{path}.image_type"), format_args!("image type {}", other.word())),
    }
    Some(DiskImage {
        path: image.clone(),
        format: DiskFormat::Raw,
        readonly: config.readonly,
        direct: config.direct,
        sparse: config.sparse,
        lock: config.lock_granularity,
    })
}

fn queues(path: &str, config: &DiskConfig, boot_vcpus: u32, checker: &mut Checker) {
    let (queues, size) = (config.num_queues, config.queue_size);
    if queues == 0 {
        checker.invalid(format!("{path}.num_queues"), "must not be 0");
    } else if queues > boot_vcpus && checker.was_read("cpus") {
        checker
            .invalid(format!("{path}.num_queues"), format!("{queues} is more than boot_vcpus, {boot_vcpus}"));
    }
    let path = format!("{path}.queue_size");
    if !size.is_power_of_two() || !(MIN_QUEUE_SIZE..=VIRTIO_QUEUE_SIZE).contains(&size) {
        let message = format!("{size} is not a power of two from {MIN_QUEUE_SIZE} to {VIRTIO_QUEUE_SIZE}");
        checker.invalid(path, message);
    } else if size > MAX_QUEUE_SIZE {
        checker.not_built(path, format_args!("queues of more than {MAX_QUEUE_SIZE} entries"));
    }
}

fn check_serial(path: &str, serial: &str, checker: &mut Checker) {
    let printable = serial.chars().all(|c| c.is_ascii_graphic() || c == ' ');
    if serial.is_empty() || serial.len() > MAX_DISK_SERIAL || !printable {
        let message = format!("must be 1 to {MAX_DISK_SERIAL} printable ASCII characters");
        checker.invalid(format!("{path}.serial"), message);
    }
}
