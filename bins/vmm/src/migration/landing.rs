//! The thread that reads a connection of a destination; memory lands from here.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::dma::GuestRam;
use vmm_migration_protocol::{
    Barrier, Bulk, Command, Fault, Frame, Intake, Item, MemoryLayout, MemoryRange, Message, PAGE, Reason,
    Zero, contents_checksum,
};

use super::link::{End, Frames, Socket};

/// Where memory is to land.
#[derive(Debug, Default)]
pub(super) struct Ground {
    /// Empty while the destination takes none.
    target: Mutex<Option<Arc<Target>>>,
    /// The connection on which descriptors of memory are to come; 0 for none.
    handed: AtomicU64,
}

/// The memory of a session.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) memory: Arc<GuestRam>,
    pub(super) layout: MemoryLayout,
    /// The connection that it comes on.
    pub(super) connection: u64,
}

impl Ground {
    pub(super) fn open(&self, target: Target) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(target));
    }

    pub(super) fn close(&self) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Descriptors of memory are to come on this connection, whose number is not 0.
    pub(super) fn expect_files(&self, connection: u64) {
        self.handed.store(connection, Ordering::SeqCst);
    }

    /// No descriptors are to come any more.
    pub(super) fn refuse_files(&self) {
        self.handed.store(0, Ordering::SeqCst);
    }

    fn takes_files(&self, connection: u64) -> bool {
        self.handed.load(Ordering::SeqCst) == connection
    }

    fn target(&self, connection: u64) -> Option<Arc<Target>> {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        target.as_ref().filter(|target| target.connection == connection).map(Arc::clone)
    }
}

/// What came on a connection.
#[derive(Debug)]
pub(super) enum Said {
    /// The first frame of all.
    First(Arc<Socket>, Frame),
    Frame(Frame),
    /// The frame about descriptors of memory, and what came beside it or before.
    Files(Frame, Vec<OwnedFd>),
    Garbage(String),
    Lost(String),
    Landed {
        pass: u32,
        last: bool,
    },
    Damaged(MemoryRange),
    /// Memory cannot land.
    Failed(Fault),
}

/// Reads `socket` to its end, and tells `to` as connection `number`.
pub(super) fn read<T: From<(u64, Said)>>(number: u64, socket: &Arc<Socket>, ground: &Ground, to: &Sender<T>) {
    let mut frames = Frames::of(socket);
    let tell = |said: Said| to.send((number, said).into()).is_ok();
    match frames.next() {
        Ok(Item::Frame(frame)) if may_be_first(frame.command()) => {
            if !tell(Said::First(Arc::clone(socket), frame)) {
                return;
            }
        }
        // Somebody looked whether this end is there, or did not come to speak.
        Err(End::Lost(text)) => {
            log::debug!("migration: a connection without a word: {text}");
            return socket.shutdown(Shutdown::Both);
        }
        other => {
            log::warn!("migration: a connection that does not begin as one: {other:?}");
            return socket.shutdown(Shutdown::Both);
        }
    }
    // Before there is memory, and with it.
    let end = match control(&mut frames, &|| ground.takes_files(number), &tell) {
        Ok(Some(item)) => match ground.target(number) {
            Some(target) => land(&mut frames, item, (ground, number, target), &tell),
            None => Err(End::Garbage("memory out of place".to_owned())),
        },
        Ok(None) => return,
        Err(end) => Err(end),
    };
    match end {
        Ok(()) => {}
        Err(End::Garbage(text)) => drop(tell(Said::Garbage(text))),
        Err(End::Lost(text)) => drop(tell(Said::Lost(text))),
    }
}

fn may_be_first(command: Command) -> bool {
    matches!(command, Command::Hello | Command::Query)
}

/// Up to the first frame about memory. `None`: nobody listens.
fn control(
    frames: &mut Frames,
    takes_files: &dyn Fn() -> bool,
    tell: &dyn Fn(Said) -> bool,
) -> Result<Option<Item>, End> {
    loop {
        // Looked at before each wait: a source attaches them to a frame that follows an answer.
        frames.want_files(takes_files());
        match frames.next()? {
            Item::Frame(frame) if !frame.command().is_data() => {
                let said = match frame.command() {
                    Command::Descriptors => Said::Files(frame, frames.take_files()),
                    _ => Said::Frame(frame),
                };
                if !tell(said) {
                    return Ok(None);
                }
            }
            item => return Ok(Some(item)),
        }
    }
}

/// From the first frame about memory on.
fn land(
    frames: &mut Frames,
    first: Item,
    (ground, number, target): (&Ground, u64, Arc<Target>),
    tell: &dyn Fn(Said) -> bool,
) -> Result<(), End> {
    let layout = target.layout.clone();
    // It does not keep memory that is given up.
    drop(target);
    let (mut intake, mut barrier) = (Intake::new(&layout), Barrier::new(1));
    let (mut buffer, mut item) = (Vec::new(), first);
    let garbage = |error: &dyn std::error::Error| End::Garbage(error.to_string());
    loop {
        let place = || ground.target(number).ok_or_else(|| End::Garbage("memory out of place".to_owned()));
        let said = match item {
            Item::Frame(frame) if !frame.command().is_data() => Some(Said::Frame(frame)),
            Item::Frame(frame) => match Message::decode(frame).map_err(|error| garbage(&error))? {
                Message::Zero(zero) => {
                    let target = place()?;
                    intake.zero(zero).map_err(|error| garbage(&error))?;
                    clear(&target.memory, zero, &mut buffer).err().map(Said::Failed)
                }
                Message::Mark(mark) => {
                    place()?;
                    intake.mark(mark).map_err(|error| garbage(&error))?;
                    let all = barrier.mark(0).map_err(|error| garbage(&error))?;
                    all.then_some(Said::Landed { pass: mark.pass, last: mark.last })
                }
                other => Some(Said::Garbage(format!("{:?} is not for this", other.command()))),
            },
            Item::Bulk(bulk) => {
                let target = place()?;
                if bulk.command() != Command::Memory {
                    return Err(End::Garbage("compression was not agreed on".to_owned()));
                }
                intake.bulk(&bulk).map_err(|error| garbage(&error))?;
                buffer.resize(bulk.length(), 0);
                frames.contents(&mut buffer)?;
                put(&target.memory, &bulk, &buffer)
            }
        };
        if let Some(said) = said
            && !tell(said)
        {
            return Ok(());
        }
        item = frames.next()?;
    }
}

fn put(memory: &GuestRam, bulk: &Bulk, contents: &[u8]) -> Option<Said> {
    let range = bulk.range();
    if bulk.check(contents_checksum([contents])).is_err() {
        return Some(Said::Damaged(range));
    }
    memory.write_slice(contents, GuestAddress(range.gpa())).err().map(|error| Said::Failed(cannot(&error)))
}

/// Makes a range zero; pages that are so are not made.
fn clear(memory: &GuestRam, zero: Zero, buffer: &mut Vec<u8>) -> Result<(), Fault> {
    let zeros = [0; PAGE as usize];
    buffer.resize(zeros.len(), 0);
    let mut gpa = zero.range.gpa();
    while gpa < zero.range.end() {
        let page = buffer.get_mut(..zeros.len()).unwrap_or_default();
        memory.read_slice(page, GuestAddress(gpa)).map_err(|error| cannot(&error))?;
        if *page != zeros {
            memory.write_slice(&zeros, GuestAddress(gpa)).map_err(|error| cannot(&error))?;
        }
        gpa += PAGE;
    }
    Ok(())
}

fn cannot(error: &dyn std::error::Error) -> Fault {
    Fault::new(Reason::Failed, &format!("guest memory: {error}"))
}
