//! Memory that lands under a guest that runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_memory_manager::absent::{AbsentError, AbsentMemory};
use vmm_migration_protocol::{
    Bulk, Command, Fault, Features, Item, MemoryLayout, MemoryRange, Message, Reason, contents_checksum,
    unpack,
};

use crate::exit::chain;
use crate::migration::landing::Said;
use crate::migration::link::{End, Frames};

/// Where it lands.
#[derive(Debug)]
pub(in crate::migration) struct Arriving {
    memory: Arc<AbsentMemory>,
    layout: MemoryLayout,
    /// What was agreed on.
    features: Features,
    /// The number that it carries.
    pass: u32,
    /// The connections that it comes on, by their numbers here.
    connections: Mutex<BTreeSet<u64>>,
}

impl Arriving {
    pub(super) fn new(
        memory: Arc<AbsentMemory>,
        layout: MemoryLayout,
        features: Features,
        pass: u32,
    ) -> Self {
        Self { memory, layout, features, pass, connections: Mutex::default() }
    }

    /// Takes it on connection `number`, too.
    pub(super) fn admit(&self, number: u64) {
        self.connections().insert(number);
    }

    pub(super) fn refuse(&self, number: u64) {
        self.connections().remove(&number);
    }

    /// Whether it comes on connection `number`.
    pub(in crate::migration) fn takes(&self, number: u64) -> bool {
        self.connections().contains(&number)
    }

    fn connections(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads connection `number` on from the first frame about memory that follows the guest.
    pub(in crate::migration) fn land(
        &self,
        frames: &mut Frames,
        (number, first): (u64, Item),
        tell: &dyn Fn(Said) -> bool,
    ) -> Result<(), End> {
        let (mut item, mut contents, mut room) = (first, Vec::new(), Vec::new());
        loop {
            let landed = match item {
                Item::Frame(frame) if !frame.command().is_data() => {
                    if !tell(Said::Frame(frame)) {
                        return Ok(());
                    }
                    item = frames.next()?;
                    continue;
                }
                Item::Frame(frame) => match Message::decode(frame) {
                    Ok(Message::Zero(zero)) => {
                        self.check(number, &zero.range, zero.pass)?;
                        self.memory.zero(zero.range.gpa()..zero.range.end())
                    }
                    Ok(other) => {
                        return Err(End::Garbage(format!("{} after the hand-over", other.command())));
                    }
                    Err(error) => return Err(End::Garbage(error.to_string())),
                },
                Item::Bulk(bulk) => {
                    self.check(number, &bulk.range(), bulk.pass())?;
                    self.read(frames, &bulk, &mut contents, &mut room)?;
                    self.memory.put(bulk.range().gpa(), &contents)
                }
            };
            if told(landed).is_some_and(|said| !tell(said)) {
                return Ok(());
            }
            item = frames.next()?;
        }
    }

    fn check(&self, number: u64, range: &MemoryRange, pass: u32) -> Result<(), End> {
        if !self.takes(number) {
            return Err(End::Garbage("memory out of place".to_owned()));
        }
        if !self.layout.contains(range) {
            let text =
                format!("{} bytes at {:#x} are not in the guest's memory", range.length(), range.gpa());
            return Err(End::Garbage(text));
        }
        if pass != self.pass {
            let text = format!("memory of pass {pass} arrives after the hand-over, which is {}", self.pass);
            return Err(End::Garbage(text));
        }
        Ok(())
    }

    /// The contents of a frame. What is damaged is asked for again, on another link.
    fn read(
        &self,
        frames: &mut Frames,
        bulk: &Bulk,
        contents: &mut Vec<u8>,
        room: &mut Vec<u8>,
    ) -> Result<(), End> {
        let packed = bulk.command() == Command::Packed;
        if packed && !self.features.contains(Features::LZ4) {
            return Err(End::Garbage("compression was not agreed on".to_owned()));
        }
        let came = if packed { &mut *room } else { &mut *contents };
        came.resize(bulk.length(), 0);
        frames.contents(came)?;
        if !self.features.contains(Features::UNCHECKED_MEMORY) {
            bulk.check(contents_checksum([&**came])).map_err(|error| End::Garbage(error.to_string()))?;
        }
        if packed {
            // A range of one frame is short.
            contents.resize(usize::try_from(bulk.range().length()).unwrap_or_default(), 0);
            unpack(room, contents).map_err(|error| End::Garbage(error.to_string()))?;
        }
        Ok(())
    }
}

/// What is to be told of memory that has landed: that it was the last, or could not.
fn told(landed: Result<bool, AbsentError>) -> Option<Said> {
    match landed {
        Ok(false) => None,
        Ok(true) => Some(Said::Whole),
        Err(error) => Some(Said::Failed(Fault::new(Reason::Failed, &chain(&error)))),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_device_model::dma::GuestRam;
    use vmm_memory_manager::pages::Pages;
    use vmm_migration_protocol::{Absent, Mark, PAGE, Region, Zero};

    use super::*;
    use crate::migration::link::Socket;

    const SIZE: u64 = 64 * PAGE;
    const PASS: u32 = 2;

    /// What a source's frames come to, that of pages 1 to 3 of the guest, of which 2 and 3 are absent: what is told, how the connection
    /// ends, and what is in page 1.
    fn land(bytes: &[u8], number: u64) -> (Vec<String>, String, u8, u64) {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), usize::try_from(SIZE).unwrap())]).unwrap();
        let memory = Arc::new(memory);
        memory.write_obj(1_u8, GuestAddress(PAGE)).unwrap();
        let mut pages = Pages::none([(0, SIZE)]);
        pages.insert(2 * PAGE..4 * PAGE);
        let absent = Arc::new(AbsentMemory::watch(Arc::clone(&memory), pages).unwrap());
        absent.leave().unwrap();
        let layout = MemoryLayout::new(vec![Region { gpa: 0, length: SIZE, zone: "z".into() }]).unwrap();
        let arriving = Arriving::new(Arc::clone(&absent), layout, Features::PAGE_SUMS, PASS);
        arriving.admit(7);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(bytes).unwrap();
        drop(ours);
        let mut frames = Frames::of(&Arc::new(Socket::Unix(theirs)));
        let told = RefCell::new(Vec::new());
        let tell = |said: Said| {
            told.borrow_mut().push(format!("{said:?}"));
            true
        };
        let first = frames.next().unwrap();
        let end = arriving.land(&mut frames, (number, first), &tell).unwrap_err();
        let left = absent.left();
        absent.end();
        (told.into_inner(), format!("{end:?}"), memory.read_obj(GuestAddress(PAGE)).unwrap(), left)
    }

    fn page(page: u64, pages: u64, pass: u32, damage: u32) -> Vec<u8> {
        let contents = vec![9; usize::try_from(pages * PAGE).unwrap()];
        let range = MemoryRange::new(page * PAGE, pages * PAGE).unwrap();
        let bulk = Bulk::memory(range, pass, contents_checksum([&contents[..]]) ^ damage).unwrap();
        [&bulk.header()[..], &contents].concat()
    }

    fn said(message: Message) -> Vec<u8> {
        message.encode().unwrap().encode()
    }

    #[test]
    fn memory_lands_where_it_is_absent_and_nowhere_else() {
        let (told, end, first, left) = land(&page(1, 2, PASS, 0), 7);
        assert_eq!((told.len(), first, left), (0, 1, PAGE), "{told:?}");
        assert!(end.starts_with("Lost"), "{end}");
        let zero = Zero { range: MemoryRange::new(0, SIZE).unwrap(), pass: PASS };
        let bytes = [page(3, 1, PASS, 0), said(Message::Zero(zero)), page(1, 3, PASS, 0)].concat();
        let (told, _, first, left) = land(&bytes, 7);
        assert_eq!((told, first, left), (vec!["Whole".to_owned(), "Whole".to_owned()], 1, 0));
    }

    #[test]
    fn what_no_source_may_send_after_the_hand_over_ends_the_link() {
        let range = MemoryRange::new(2 * PAGE, PAGE).unwrap();
        let outside = MemoryRange::new(SIZE - PAGE, 2 * PAGE).unwrap();
        for (bytes, number, words) in [
            (page(64, 1, PASS, 0), 7, "are not in the guest's memory"),
            (said(Message::Zero(Zero { range: outside, pass: PASS })), 7, "are not in the guest's memory"),
            (page(2, 1, PASS + 1, 0), 7, "after the hand-over"),
            (page(2, 1, PASS - 1, 0), 7, "after the hand-over"),
            (page(2, 1, PASS, 1), 7, "checksum"),
            (page(2, 1, PASS, 0), 8, "out of place"),
            (said(Message::Absent(Absent { range, pass: PASS })), 7, "Absent after"),
            (said(Message::Mark(Mark { pass: PASS, last: true, bytes: 0 })), 7, "Mark after"),
        ] {
            let (told, end, first, left) = land(&bytes, number);
            assert!(told.is_empty() && end.starts_with("Garbage") && end.contains(words), "{told:?} {end}");
            assert_eq!((first, left), (1, 2 * PAGE), "{words}");
        }
    }
}
