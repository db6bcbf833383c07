//! Copies a raw image through an engine: `copy FROM TO [auto|io_uring|sync]`. TO must exist and be at least as large.

use std::error::Error;

use vmm_disk_image::{Buffers, Completion, Disk, Engine, EngineKind, Op, OpenOptions, Request, open};

const BLOCK: u64 = 1 << 20;
const DEPTH: u16 = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else {
        return Err("usage: copy FROM TO [auto|io_uring|sync]".into());
    };
    let kind = match args.next().as_deref() {
        None | Some("auto") => EngineKind::Auto,
        Some("io_uring") => EngineKind::IoUring,
        Some("sync") => EngineKind::Sync,
        Some(other) => return Err(format!("unknown engine {other:?}").into()),
    };
    let from = open(&OpenOptions { read_only: true, ..OpenOptions::raw(from) })?;
    let to = open(&OpenOptions::raw(to))?;
    let bytes = copy(&*from, &*to, kind)?;
    println!("{bytes} bytes copied");
    Ok(())
}

/// Reads up to `DEPTH` blocks at once, writes them at once, and so on. The token of a block is its offset.
fn copy(from: &dyn Disk, to: &dyn Disk, kind: EngineKind) -> Result<u64, Box<dyn Error>> {
    let mut reader = from.engine(kind, DEPTH)?;
    let mut writer = to.engine(kind, DEPTH)?;
    let mut offset = 0;
    while offset < from.size() {
        for _ in 0..DEPTH {
            let len = BLOCK.min(from.size() - offset);
            if len > 0 {
                let buffers = Buffers::zeroed(usize::try_from(len)?)?;
                reader.submit(Request { token: offset, op: Op::Read { offset, buffers } })?;
            }
            offset += len;
        }
        for completion in finish(&mut *reader)? {
            completion.result?;
            let buffers = completion.buffers.ok_or("a read without buffers")?;
            let op = Op::Write { offset: completion.token, buffers };
            writer.submit(Request { token: completion.token, op })?;
        }
        for completion in finish(&mut *writer)? {
            completion.result?;
        }
    }
    writer.submit(Request { token: 0, op: Op::Flush })?;
    for completion in finish(&mut *writer)? {
        completion.result?;
    }
    Ok(offset)
}

/// Waits for everything in flight. A device would wait for `completion_fd` in its epoll loop.
fn finish(engine: &mut dyn Engine) -> Result<Vec<Completion>, Box<dyn Error>> {
    engine.kick()?;
    let mut done = Vec::new();
    while engine.in_flight() > 0 {
        engine.reap(&mut done)?;
        std::thread::yield_now();
    }
    Ok(done)
}
