//! A long life of the real binary's API with rude clients: descriptors, threads and memory stay where they were.
//!
//! `VMM_SOAK_REQUESTS` says how many requests; 5,000 without it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_tests::harness::{Holdings, LIMIT, Scratch, Vmm, vm_config, wait_until};
use vmm_tests::tiny::Guest;

/// How much more memory may be resident after the soak than after its first tenth, in KiB: the allocator's noise.
/// Ten bytes lost with each of 100,000 requests would be as much.
const SLACK: u64 = 1024;

#[test]
fn rude_clients_leave_nothing_behind() {
    let requests = std::env::var("VMM_SOAK_REQUESTS").map_or(5000, |number| number.parse().unwrap());
    let scratch = Scratch::new();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let config = vm_config(&scratch.guest(Guest::Halt), &scratch.path("serial")).to_string();
    let rude = Rude { socket: vmm.socket(), config: &config, null: File::open("/dev/null").unwrap() };
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let fresh = vmm.holdings_at_rest();
    (0..requests / 10).for_each(|_| rude.request(&mut random));
    settle(&vmm, &fresh);
    let before = resident(&vmm);
    (0..requests - requests / 10).for_each(|_| rude.request(&mut random));
    settle(&vmm, &fresh);
    let after = resident(&vmm);
    println!("{requests} requests: {fresh:?}; {before} KiB resident after a tenth, {after} KiB at the end");
    assert!(after <= before + SLACK, "{before} KiB became {after} KiB");
}

/// Removes the VM until it stays away and nothing more is held than before: of those who have left, some are still to be
/// served, and may make another.
fn settle(vmm: &Vmm, before: &Holdings) {
    let settled = || {
        vmm.api().puts(&["vm.delete"]);
        (vmm.holdings() == *before).then_some(())
    };
    wait_until(LIMIT, settled, || format!("the VMM to hold {before:?}; it holds {:?}", vmm.holdings()));
}

/// The memory of the process that no file stands behind, in KiB.
fn resident(vmm: &Vmm) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Clients that come and go.
struct Rude<'a> {
    socket: &'a Path,
    config: &'a str,
    null: File,
}

impl Rude<'_> {
    /// One request of any kind on a connection of its own, sent in one or two parts, with descriptors or without, and
    /// left at any point: before its end, before the answer, in the middle of it, or after it.
    fn request(&self, random: &mut Random) {
        let request = self.text(random);
        let stream = UnixStream::connect(self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let fds: Vec<RawFd> = vec![self.null.as_raw_fd(); [0, 0, 0, 1, 3, 64, 70][random.below(7)]];
        let (first, second) = request.as_bytes().split_at(1 + random.below(request.len() - 1));
        stream.send_with_fds(&[first], &fds).unwrap();
        if random.below(4) == 0 {
            return;
        }
        // The server may have refused it already.
        let sent = (&stream).write_all(second);
        if random.below(4) == 0 || sent.is_err() {
            return;
        }
        let mut answer = vec![0; [1, 20, 4096][random.below(3)]];
        let count = (&stream).read(&mut answer).unwrap_or_default();
        // Nothing comes before the end of a connection whose request was refused and not read to its end.
        let answer = &answer[..count];
        assert!(b"HTTP/1.1 ".starts_with(&answer[..count.min(9)]), "{}", String::from_utf8_lossy(answer));
    }

    fn text(&self, random: &mut Random) -> String {
        const PLAIN: [&str; 14] = [
            "GET /api/v1/vmm.ping",
            "GET /api/v1/vmm.ping",
            "GET /api/v1/vm.info",
            "GET /api/v1/vm.info",
            "GET /api/v1/vmm.openapi",
            "PUT /api/v1/vm.boot",
            "PUT /api/v1/vm.pause",
            "PUT /api/v1/vm.resume",
            "PUT /api/v1/vm.reboot",
            "PUT /api/v1/vm.shutdown",
            "PUT /api/v1/vm.delete",
            "POST /api/v1/vm.delete",
            "GET /nowhere",
            "PUT /api/v1/vm.snapshot",
        ];
        let with_body = |name, body: &str| {
            format!("PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        };
        match random.below(20) {
            0..=2 => with_body("vm.create", self.config),
            3 => with_body("vm.validate", self.config),
            4 => with_body("vm.create", "{\"disks\": [{}, 1]"),
            5 => with_body("vm.add-disk", "{\"path\": \"/nowhere\", \"image_type\": \"Raw\"}"),
            _ => format!("{} HTTP/1.1\r\n\r\n", PLAIN[random.below(PLAIN.len())]),
        }
    }
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }
}
