//! Frames of memory that go to the link from where memory lies: it is looked at a page at a time, and not copied.

use std::ops::Range;

use vmm_memory_manager::source::GuestMemorySource;
use vmm_memory_manager::straight::{GuestSlice, each_page};
use vmm_migration_protocol::{Bulk, Fault, MemoryRange, Message, PAGE, Sums, Zero, page_checksum};

use super::course::{Course, Piece};
use super::sender::{failed, unreadable};
use super::vectors::Part;

/// Bytes of a page.
const LENGTH: usize = PAGE as usize;

static ZERO_PAGE: [u8; LENGTH] = [0; LENGTH];

/// Frames that go to the link in one call.
#[derive(Debug, Default)]
pub(super) struct Batch<'m> {
    /// All of them but the contents of memory.
    own: Vec<u8>,
    /// Contents, and how much of `own` goes before them.
    contents: Vec<(usize, GuestSlice<'m>)>,
    /// Bytes of guest memory that they describe.
    described: u64,
}

impl<'m> Batch<'m> {
    /// Adds what is to be said of a part of a region, of which `lies` is there and the rest is zero; with checksums of pages if they are
    /// `summed`.
    ///
    /// # Errors
    /// It cannot be read, or does not fit the wire.
    pub(super) fn add(
        &mut self,
        memory: &'m GuestMemorySource,
        Piece { region, range }: &Piece,
        lies: &[Range<u64>],
        (course, summed): (&Course, bool),
    ) -> Result<(), Fault> {
        let begin = memory.gpa(*region).ok_or_else(|| unreadable(&std::io::ErrorKind::NotFound.into()))?;
        let (mut runs, mut at) = (Runs(Vec::new()), range.start);
        for lie in lies {
            runs.add_zero(at..lie.start);
            let slice = memory.slice(*region, lie).map_err(|error| unreadable(&error))?;
            let mut page = lie.start;
            each_page(&slice, |bytes| {
                runs.add(page, bytes, summed);
                page += PAGE;
            });
            at = lie.end;
        }
        runs.add_zero(at..range.end);
        let pass = course.number;
        for Run { zero, range, sums } in runs.0 {
            // Memory that was never sent is zero.
            if zero && course.all {
                continue;
            }
            let said = MemoryRange::new(begin + range.start, range.end - range.start);
            let said = said.map_err(|error| failed(&error))?;
            self.described += said.length();
            if zero {
                self.say(Message::Zero(Zero { range: said, pass }))?;
                continue;
            }
            let bulk = Bulk::memory(said, pass, 0).map_err(|error| failed(&error))?;
            self.own.extend(bulk.header());
            let slice = memory.slice(*region, &range).map_err(|error| unreadable(&error))?;
            self.contents.push((self.own.len(), slice));
            if summed {
                self.say(Message::Sums(Sums { range: said, pass, sums }))?;
            }
        }
        Ok(())
    }

    fn say(&mut self, message: Message) -> Result<(), Fault> {
        let frame = message.encode().map_err(|error| failed(&error))?;
        self.own.extend(frame.encode());
        Ok(())
    }

    /// Bytes of guest memory that it describes.
    pub(super) fn described(&self) -> u64 {
        self.described
    }

    /// All that is to be sent, in order; no part is empty.
    pub(super) fn parts(&self) -> Vec<Part<'_>> {
        let (mut parts, mut at) = (Vec::new(), 0);
        for (before, slice) in &self.contents {
            parts.push(Part::Own(self.own.get(at..*before).unwrap_or_default()));
            parts.push(Part::Guest(*slice));
            at = *before;
        }
        let rest = self.own.get(at..).unwrap_or_default();
        if !rest.is_empty() {
            parts.push(Part::Own(rest));
        }
        parts
    }
}

/// Pages next to each other that are all zero, or all not.
struct Run {
    zero: bool,
    range: Range<u64>,
    sums: Vec<u32>,
}

struct Runs(Vec<Run>);

impl Runs {
    /// A page at `at`.
    fn add(&mut self, at: u64, bytes: &[u8], summed: bool) {
        if *bytes == ZERO_PAGE {
            return self.add_zero(at..at + PAGE);
        }
        let sum = summed.then(|| page_checksum(bytes));
        let run = self.grow(false, at..at + PAGE);
        run.into_iter().for_each(|run| run.sums.extend(sum));
    }

    fn add_zero(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.grow(true, range);
        }
    }

    fn grow(&mut self, zero: bool, range: Range<u64>) -> Option<&mut Run> {
        match self.0.last_mut() {
            Some(last) if last.zero == zero => last.range.end = range.end,
            _ => self.0.push(Run { zero, range, sums: Vec::new() }),
        }
        self.0.last_mut()
    }
}

/// The checksum of each page.
pub(super) fn page_sums(memory: &GuestSlice<'_>) -> Vec<u32> {
    let mut sums = Vec::new();
    each_page(memory, |bytes| sums.push(page_checksum(bytes)));
    sums
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_hypervisor::fake::Fake;
    use vmm_hypervisor::{Hypervisor, VmOptions};
    use vmm_memory_manager::map::MemoryMap;
    use vmm_memory_manager::zone::{ZoneConfig, ZoneOptions};
    use vmm_migration_protocol::{Decoder, Item};

    use super::super::vectors;
    use super::*;

    fn map(shared: bool) -> MemoryMap {
        let vm = Fake::new().create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 }).unwrap();
        let options = ZoneOptions::default();
        let zone = ZoneConfig { id: "z".into(), size: 4 << 20, file: None, shared, huge_page: None, options };
        MemoryMap::create(vm, &[zone], 40).unwrap()
    }

    /// What is sent of pages 16 to 24, of which 17, 18 and 20 are written; they are written again after they were looked at. As words: the
    /// kind of frame, the first page, and how many.
    fn sent(map: &MemoryMap, all: bool, summed: bool) -> (Vec<(char, u64, u64)>, Vec<MemoryRange>) {
        let put = |page: u64, value: u8| map.memory().write_obj(value, GuestAddress(page * PAGE)).unwrap();
        [17, 18, 20].into_iter().for_each(|page| put(page, 1));
        put(23, 0);
        let (memory, piece) = (map.source().unwrap(), Piece { region: 0, range: 16 * PAGE..24 * PAGE });
        let what = (!all).then(|| vec![vec![piece.range.clone()]]);
        let (course, mut batch) = (Course::new(3, what, false), Batch::default());
        let lies = memory.lying(0, piece.range.clone()).unwrap().unwrap();
        batch.add(&memory, &piece, &lies, (&course, summed)).unwrap();
        put(18, 2);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let bytes: usize = batch.parts().iter().map(Part::len).sum();
        assert_eq!(vectors::send(ours.as_fd(), &batch.parts()).unwrap(), bytes);
        drop(ours);
        let (mut stream, mut decoder, mut said) = (Vec::new(), Decoder::new(), Vec::new());
        theirs.read_to_end(&mut stream).unwrap();
        let (mut rest, mut damaged, mut found) = (stream.as_slice(), Vec::new(), Vec::new());
        let mut say = |kind, range: MemoryRange| said.push((kind, range.gpa() / PAGE, range.length() / PAGE));
        while let Some(item) = decoder.push(&mut rest).unwrap() {
            match item {
                Item::Bulk(bulk) => {
                    say('m', bulk.range());
                    let (contents, after) = rest.split_at(bulk.length());
                    found = contents.chunks(LENGTH).map(page_checksum).collect();
                    rest = after;
                }
                Item::Frame(frame) => match Message::decode(frame).unwrap() {
                    Message::Zero(zero) => say('z', zero.range),
                    Message::Sums(sums) => damaged.extend(sums.damaged(&found)),
                    other => panic!("{other:?}"),
                },
            }
        }
        (said, damaged)
    }

    #[test]
    fn memory_is_sent_as_it_is_then_and_its_checksums_tell_what_has_changed() {
        for shared in [false, true] {
            let whole = vec![('z', 16, 1), ('m', 17, 2), ('z', 19, 1), ('m', 20, 1), ('z', 21, 3)];
            let changed = vec![MemoryRange::new(18 * PAGE, PAGE).unwrap()];
            assert_eq!(sent(&map(shared), false, true), (whole.clone(), changed), "{shared}");
            assert_eq!(sent(&map(shared), false, false), (whole, Vec::new()), "{shared}");
            let (first, _) = sent(&map(shared), true, true);
            assert_eq!(first, [('m', 17, 2), ('m', 20, 1)], "what was never sent is zero");
        }
    }
}
