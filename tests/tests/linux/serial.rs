//! The serial port with an unmodified driver at its other end.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmm_tests::harness::linux::LinuxGuest;
use vmm_tests::harness::{Scratch, Vmm};
use vmm_tests::image::rootfs;
use vmm_tests::kernels::KernelVersion;
use vmm_tests::nested::Nested;

use super::{BOOT_LIMIT, Bench};

/// Bytes that go over the serial port in each direction: a mebibyte where KVM is KVM, less in the nested one, where
/// each byte is several exits of milliseconds; a soak sets `VMM_SERIAL_BYTES`.
fn both_ways() -> usize {
    let usual = if Nested::is_inside() { 16 << 10 } else { 1 << 20 };
    std::env::var("VMM_SERIAL_BYTES").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// How long no byte may come back. Each is several exits each way, which an emulated machine makes slow.
const STALL_LIMIT: Duration = Duration::from_secs(120);
/// Sends back `$bytes` of what comes. The driver's RTS is the only way to say that it cannot take more for now.
const ECHO: &str = r#"
exec 3<>/dev/ttyS0
stty raw -echo crtscts <&3
echo "VMM-TEST: echo=begin"
head -c $bytes <&3 >&3
echo "VMM-TEST: echo=$?"
exec 3>&-
"#;

/// A mebibyte goes over the serial port and comes back whole; the guest's own console is virtio-console.
pub(crate) fn carries(bench: &Bench, mode: &str) {
    let (scratch, bytes) = (Scratch::new(), both_ways());
    let (kernel, initramfs) = bench.images.kernel(KernelVersion::Debian13);
    let guest = LinuxGuest {
        kernel: kernel.vmlinux(),
        initramfs: initramfs.to_owned(),
        cmdline: format!("console=hvc0 quiet {}", rootfs::script_word(&format!("bytes={bytes}\n{ECHO}"))),
        cpus: 1,
        memory_mib: 512,
        disks: Vec::new(),
    };
    let console = bench.disks.console("serial-port");
    let mut config = guest.document(Path::new("unused"));
    config["console"] = json!({ "mode": "File", "file": console.path() });
    let socket = scratch.path("serial.sock");
    config["serial"] = match mode {
        "Socket" => json!({ "mode": mode, "socket": socket }),
        _ => json!({ "mode": mode }),
    };
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = vmm.api();
    api.create(&config);
    api.puts(&["vm.boot"]);
    console.wait_for(&mut vmm, BOOT_LIMIT, "echo", "begin");

    let pty = api.get("vm.info").json()["config"]["serial"]["file"].as_str().map(PathBuf::from);
    let file = match pty {
        Some(pty) => OpenOptions::new().read(true).write(true).open(pty).unwrap(),
        None => fs::File::from(OwnedFd::from(UnixStream::connect(&socket).unwrap())),
    };
    let (sent, mut writer, reader) = (noise(bytes), file.try_clone().unwrap(), file);
    let out = sent.clone();
    thread::spawn(move || writer.write_all(&out));
    let back = read_all(&reader, bytes);
    assert_eq!(back.len(), bytes);
    let differs = back.iter().zip(&sent).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the first byte that came back as another one");
    console.wait_for_power_off(&mut vmm, BOOT_LIMIT);
    assert_eq!(console.facts("echo"), ["begin", "0"]);
    assert_eq!(console.facts("run-status"), ["0"]);
}

/// Reads `bytes` from the guest's port.
fn read_all(port: &fs::File, bytes: usize) -> Vec<u8> {
    let (come, chunks) = std::sync::mpsc::channel();
    let mut port = port.try_clone().unwrap();
    // On a thread, for there may never be more.
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(len @ 1..) = port.read(&mut chunk)
            && come.send(chunk[..len].to_vec()).is_ok()
        {}
    });
    let mut back = Vec::with_capacity(bytes);
    while back.len() < bytes {
        match chunks.recv_timeout(STALL_LIMIT) {
            Ok(chunk) => back.extend(chunk),
            Err(error) => {
                panic!("waited {STALL_LIMIT:?} for byte {} of {bytes} to come back: {error}", back.len())
            }
        }
    }
    back
}

/// Bytes of all values.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(byte).take(len).collect()
}
