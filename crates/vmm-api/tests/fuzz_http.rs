//! The server under a seeded mutator. One test in its own process, for it counts this process's descriptors.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod fuzzing;

use vmm_fuzzing::{Random, mutate, rounds};

/// Whole requests and parts of some.
const PARTS: [&str; 16] = [
    "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n",
    "PUT /api/v1/vm.take HTTP/1.1\r\n\r\n",
    "PUT /api/v1/vm.take HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    "PUT /api/v1/vm.take HTTP/1.1\r\nAccept: application/json\r\nContent-Length: 2\r\n\r\n!a",
    "PUT /api/v1/vm.take HTTP/1.1\r\nContent-Length: 4\r\n\r\ndrop",
    "PUT /api/v1/vm.take HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 40\r\n\r\n",
    "HEAD /api/v1/vmm.ping HTTP/1.1\r\n\r\n",
    "GET /api/v1/vm.take HTTP/1.1\r\nHost: x\r\n\r\n",
    "PUT /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n",
    "GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n",
    "PUT /api/v1/vm.take HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "PUT /api/v1/vm.take HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
    "PUT /api/v1/vm.take HTTP/2.0\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\n\r\n",
    "\r\n",
    "PUT /api/v1/vm.ta",
];

#[test]
fn fuzz_requests_and_descriptors() {
    fuzzing::seeds("api_server").iter().for_each(|seed| fuzzing::http::serve(seed));
    let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
    for _ in 0..rounds(3000) {
        let controls: Vec<u8> = (0..random.below(12)).map(|_| random.byte()).collect();
        let mut stream: Vec<u8> =
            (0..random.below(12)).flat_map(|_| PARTS[random.below(PARTS.len())].bytes()).collect();
        // Half of them stay as they are: what is well formed must get through, too.
        for _ in 0..random.below(6).saturating_sub(2) {
            mutate(&mut stream, &mut random, &[]);
        }
        if random.below(100) == 0 {
            stream.splice(0..0, vec![b'x'; 20_000]);
        }
        let count = u8::try_from(controls.len()).unwrap();
        fuzzing::http::serve(&[&[count], controls.as_slice(), stream.as_slice()].concat());
    }
}
