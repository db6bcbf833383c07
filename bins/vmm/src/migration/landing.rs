//! The thread that reads a connection of a destination; memory lands from here.

mod ground;

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm_device_model::dma::GuestRam;
use vmm_memory_manager::straight::slice;
use vmm_migration_protocol::{
    Bulk, Command, Fault, Features, Frame, Intake, Item, MemoryRange, Message, PAGE, Reason, Zero,
    contents_checksum, unpack,
};

use super::backlog::Place;
use super::link::{End, Frames, Socket};
use super::straight::page_sums;
pub(super) use ground::Ground;
use ground::Target;

/// How long a frame may take to be written. They are small, and a socket has room for them.
pub(super) const WRITE: Duration = Duration::from_secs(1);

/// How long a connection may take before it has said what it wants.
const FIRST: Duration = Duration::from_secs(10);

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
    /// All of memory is there, under a guest that runs.
    Whole,
    /// Memory cannot land.
    Failed(Fault),
}

impl Said {
    /// Bytes that it carries, about.
    fn carried(&self) -> usize {
        match self {
            Self::First(_, frame) | Self::Frame(frame) | Self::Files(frame, _) => frame.payload().len(),
            Self::Garbage(text) | Self::Lost(text) => text.len(),
            Self::Landed { .. } | Self::Damaged(_) | Self::Whole | Self::Failed(_) => 0,
        }
    }
}

/// Reads `socket` to its end, and tells `to` as connection `number`.
pub(super) fn read<T: From<(u64, Said, Place)>>(
    number: u64,
    socket: &Arc<Socket>,
    ground: &Ground,
    to: &Sender<T>,
) {
    let _ = socket.set_timeouts(None, Some(WRITE));
    let mut frames = Frames::of(socket);
    let tell = |said: Said| {
        let place = ground.backlog.place(said.carried());
        to.send((number, said, place).into()).is_ok()
    };
    // Who says nothing does not keep others out.
    match frames.first(FIRST) {
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
    let end = match control(&mut frames, (ground, number), &tell) {
        Ok(Some(item)) => {
            frames.note_in(&ground.came);
            match (ground.late(number), ground.target(number)) {
                (Some(late), _) => late.land(&mut frames, (number, item), &tell),
                (None, Some((target, _))) => land(&mut frames, item, (ground, number, target), &tell),
                (None, None) => Err(End::Garbage("memory out of place".to_owned())),
            }
        }
        Ok(None) => return,
        Err(end) => Err(end),
    };
    match end {
        Ok(()) => {}
        Err(End::Garbage(text)) => drop(tell(Said::Garbage(text))),
        Err(End::Lost(text)) => drop(tell(Said::Lost(text))),
    }
}

fn is_data(item: &Item) -> bool {
    match item {
        Item::Frame(frame) => frame.command().is_data(),
        Item::Bulk(_) => true,
    }
}

fn may_be_first(command: Command) -> bool {
    matches!(command, Command::Hello | Command::Join | Command::Query | Command::Rejoin)
}

/// Up to the first frame about memory. `None`: nobody listens.
fn control(
    frames: &mut Frames,
    (ground, number): (&Ground, u64),
    tell: &dyn Fn(Said) -> bool,
) -> Result<Option<Item>, End> {
    loop {
        // Looked at before each wait: a source attaches them to a frame that follows an answer.
        frames.want_files(ground.takes_files(number));
        frames.take_large(ground.is_first(number));
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
    let (layout, features) = (target.layout.clone(), target.features);
    // It does not keep memory that is given up.
    drop(target);
    frames.take_large(ground.is_first(number));
    let mut intake = Intake::new(&layout).with_page_sums(features.sums_pages());
    let (mut rooms, mut item) = (Rooms::default(), first);
    let place = || ground.target(number).ok_or_else(|| End::Garbage("memory out of place".to_owned()));
    loop {
        let said = match item {
            Item::Frame(frame) if !frame.command().is_data() => vec![Said::Frame(frame)],
            Item::Frame(frame) => about(frame, &mut intake, &place()?, &mut rooms)?,
            Item::Bulk(bulk) => {
                let (target, _) = place()?;
                if bulk.command() == Command::Packed && !features.contains(Features::LZ4) {
                    return Err(End::Garbage("compression was not agreed on".to_owned()));
                }
                target.barrier().take(bulk.pass(), bulk.range().length()).map_err(garbage)?;
                intake.bulk(&bulk).map_err(garbage)?;
                // Later, it is there.
                if let Some(ahead) = target.ahead.as_ref().filter(|_| bulk.pass() == 0) {
                    ahead.note(&layout, bulk.range());
                }
                put(frames, &target, &bulk, &mut rooms)?.into_iter().collect()
            }
        };
        for said in said {
            if !tell(said) {
                return Ok(());
            }
        }
        item = frames.next()?;
        if is_data(&item)
            && let Some(late) = ground.late(number)
        {
            return late.land(frames, (number, item), tell);
        }
    }
}

/// What the driver is to hear of a frame about memory that is not bulk.
fn about(
    frame: Frame,
    intake: &mut Intake<'_>,
    (target, index): &(Arc<Target>, u16),
    rooms: &mut Rooms,
) -> Result<Vec<Said>, End> {
    let said = match Message::decode(frame).map_err(garbage)? {
        Message::Zero(zero) => {
            target.barrier().take(zero.pass, zero.range.length()).map_err(garbage)?;
            intake.zero(zero).map_err(garbage)?;
            clear(&target.memory, zero, &mut rooms.arrived).err().map(Said::Failed)
        }
        Message::Absent(absent) => {
            target.barrier().take(absent.pass, absent.range.length()).map_err(garbage)?;
            intake.absent(absent).map_err(garbage)?;
            target.leave_out(absent)
        }
        Message::Sums(sums) => {
            intake.sums(&sums).map_err(garbage)?;
            let found = match slice(&target.memory, sums.range.gpa(), sums.range.length()) {
                Ok(landed) => page_sums(&landed),
                Err(error) => return Ok(vec![Said::Failed(cannot(&error))]),
            };
            return Ok(sums.damaged(&found).into_iter().map(Said::Damaged).collect());
        }
        Message::Mark(mark) => {
            intake.mark(mark).map_err(garbage)?;
            let all = target.barrier().mark(*index, mark.last).map_err(garbage)?;
            all.then_some(Said::Landed { pass: mark.pass, last: mark.last })
        }
        other => Some(Said::Garbage(format!("{:?} is not for this", other.command()))),
    };
    Ok(said.into_iter().collect())
}

fn garbage(error: impl std::error::Error) -> End {
    End::Garbage(error.to_string())
}

/// Where contents are that do not go straight to where they belong.
#[derive(Default)]
struct Rooms {
    arrived: Vec<u8>,
    unpacked: Vec<u8>,
}

/// Puts contents where they belong: straight from the link, unless they have to be right, or have to become others, first.
fn put(frames: &mut Frames, target: &Target, bulk: &Bulk, rooms: &mut Rooms) -> Result<Option<Said>, End> {
    let (range, memory) = (bulk.range(), &target.memory);
    let is_packed = bulk.command() == Command::Packed;
    let has_sum = !target.features.contains(Features::UNCHECKED_MEMORY);
    let has_own = has_sum && (is_packed || !target.features.sums_pages());
    if !is_packed && !has_own {
        let place = match slice(memory, range.gpa(), range.length()) {
            Ok(place) => place,
            Err(error) => return Ok(Some(Said::Failed(cannot(&error)))),
        };
        if frames.contents_into(&place)? {
            return Ok(None);
        }
    }
    let Rooms { arrived, unpacked } = rooms;
    arrived.resize(bulk.length(), 0);
    frames.contents(arrived)?;
    if has_own && bulk.check(contents_checksum([arrived.as_slice()])).is_err() {
        return Ok(Some(Said::Damaged(range)));
    }
    let contents = if is_packed {
        // A range of one frame is short.
        unpacked.resize(usize::try_from(range.length()).unwrap_or_default(), 0);
        unpack(arrived, unpacked).map_err(garbage)?;
        unpacked
    } else {
        arrived
    };
    let written = memory.write_slice(contents, GuestAddress(range.gpa()));
    Ok(written.err().map(|error| Said::Failed(cannot(&error))))
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

#[cfg(test)]
#[cfg(feature = "compression")]
mod packed_tests;
#[cfg(test)]
mod tests;
