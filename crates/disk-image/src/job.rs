//! A request as a chain of system calls: what to do next, and what an answer means.
//!
//! Both engines carry out jobs; only how they make the calls differs. So short transfers, interruptions, bounce buffers and the
//! fallbacks of discard and write-zeroes are here once, and are tested without a kernel.

use std::io;

use crate::bounce::Bounce;
use crate::buffers::{Buffers, IoRange};
use crate::engine::Op;
use crate::raw::{DioAlign, Feature, Raw};

/// Most ranges the kernel takes in one call.
const RANGES_MAX: usize = 1024;
/// Interruptions and `EAGAIN`s in a row that are tried again.
const RETRIES_MAX: u32 = 1000;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The next system call of a job. The memory of `ranges` belongs to the job, or to the disk.
#[derive(Debug)]
pub(crate) enum Step<'a> {
    Read { offset: u64, ranges: &'a [IoRange] },
    Write { offset: u64, ranges: &'a [IoRange] },
    Sync,
    Fallocate { mode: i32, offset: u64, len: u64 },
    BlockDiscard { offset: u64, len: u64 },
}

/// What the answer to a step leads to.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Ask for the next step.
    Again,
    /// The request has ended.
    Finished(io::Result<u32>),
}

/// A request being carried out.
#[derive(Debug)]
pub(crate) struct Job {
    work: Work,
    retries: u32,
}

#[derive(Debug)]
enum Work {
    Transfer(Transfer),
    Flush,
    Discard { offset: u64, len: u64, way: Feature },
    Zero(Zero),
}

impl Job {
    pub(crate) fn new(op: Op, raw: &Raw) -> Self {
        let work = match op {
            Op::Read { offset, buffers } => Work::Transfer(Transfer::new(false, offset, buffers)),
            Op::Write { offset, buffers } => Work::Transfer(Transfer::new(true, offset, buffers)),
            Op::Flush => Work::Flush,
            Op::Discard { offset, len } => {
                let (offset, len) = if raw.block_device {
                    shrink(offset, len, raw.parts.topology.logical_block.into())
                } else {
                    (offset, len)
                };
                Work::Discard { offset, len, way: Feature::Punch }
            }
            Op::WriteZeroes { offset, len, may_unmap } => Work::Zero(Zero::new(offset, len, may_unmap)),
        };
        Self { work, retries: 0 }
    }

    /// The next system call; `None` if there is nothing (more) to do, which is success.
    pub(crate) fn step(&mut self, raw: &Raw) -> io::Result<Option<Step<'_>>> {
        match &mut self.work {
            Work::Transfer(transfer) => transfer.step(raw),
            Work::Flush => Ok(Some(Step::Sync)),
            Work::Discard { offset, len, way } => {
                let (offset, len) = (*offset, *len);
                if *way == Feature::Punch && !raw.quirks.can(Feature::Punch) {
                    *way = Feature::BlockDiscard;
                }
                let able =
                    *way == Feature::Punch || (raw.block_device && raw.quirks.can(Feature::BlockDiscard));
                Ok((len > 0 && able).then_some(match way {
                    Feature::BlockDiscard => Step::BlockDiscard { offset, len },
                    _ => Step::Fallocate { mode: PUNCH, offset, len },
                }))
            }
            Work::Zero(zero) => zero.step(raw),
        }
    }

    /// Takes the answer to the last step: bytes moved (0 where none are counted), or the error.
    pub(crate) fn answer(&mut self, answer: io::Result<usize>, raw: &Raw) -> Progress {
        let answer = match answer {
            Err(error) if passing(&error) && self.retries < RETRIES_MAX => {
                self.retries += 1;
                return Progress::Again;
            }
            answer => answer,
        };
        self.retries = 0;
        match (&mut self.work, answer) {
            (Work::Transfer(transfer), Ok(moved)) => transfer.moved(moved),
            (Work::Zero(zero), answer) => zero.answer(answer, raw),
            (Work::Discard { way, .. }, Err(error)) if unsupported(&error) => {
                raw.missing(*way, &error);
                if *way == Feature::BlockDiscard {
                    return Progress::Finished(Ok(0));
                }
                *way = Feature::BlockDiscard;
                Progress::Again
            }
            (_, Err(error)) => Progress::Finished(Err(error)),
            (_, Ok(_)) => Progress::Finished(Ok(0)),
        }
    }

    /// The buffers of a read or write that has ended.
    pub(crate) fn into_buffers(self) -> Option<Buffers> {
        match self.work {
            Work::Transfer(transfer) => Some(transfer.buffers),
            _ => None,
        }
    }
}

/// A read or a write.
#[derive(Debug)]
struct Transfer {
    write: bool,
    offset: u64,
    buffers: Buffers,
    done: u64,
    window: Window,
}

/// The memory that the current step moves.
#[derive(Debug)]
enum Window {
    /// All of the buffers.
    Whole,
    /// The rest of the buffers, or as much of it as one call takes.
    Rest(Vec<IoRange>),
    /// Aligned memory, of which `wanted` bytes after the first `lead` are meant.
    Bounce { memory: Bounce, range: IoRange, lead: u64, wanted: u64 },
}

impl Transfer {
    fn new(write: bool, offset: u64, buffers: Buffers) -> Self {
        Self { write, offset, buffers, done: 0, window: Window::Whole }
    }

    fn step(&mut self, raw: &Raw) -> io::Result<Option<Step<'_>>> {
        if self.done >= self.buffers.len() {
            return Ok(None);
        }
        let position = self.offset.saturating_add(self.done);
        let whole = self.done == 0 && self.buffers.io_ranges().len() <= RANGES_MAX;
        self.window =
            if whole { Window::Whole } else { Window::Rest(self.buffers.rest(self.done, RANGES_MAX)) };
        let mut start = position;
        if let Some(dio) = raw.parts.dio
            && !aligned(dio, position, self.ranges())
        {
            start = self.bounce(dio, position, raw)?;
        }
        let ranges = self.ranges();
        Ok(Some(if self.write {
            Step::Write { offset: start, ranges }
        } else {
            Step::Read { offset: start, ranges }
        }))
    }

    /// Sets up a bounce window for what comes at `position`; returns where on the disk it begins.
    fn bounce(&mut self, dio: DioAlign, position: u64, raw: &Raw) -> io::Result<u64> {
        let lead = position % dio.offset;
        let start = position - lead;
        let wanted = (self.buffers.len() - self.done).min(raw.bounced.piece(dio.offset) - lead);
        let len = (lead + wanted).next_multiple_of(dio.offset);
        if self.write && len != wanted {
            // Reading, changing and writing back would race with other writes to the same block.
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut memory = raw.bounced.take(len)?;
        if self.write {
            self.buffers.copy_out(self.done, memory.as_mut_slice());
        }
        let range = memory.io_range();
        self.window = Window::Bounce { memory, range, lead, wanted };
        Ok(start)
    }

    fn ranges(&self) -> &[IoRange] {
        match &self.window {
            Window::Whole => self.buffers.io_ranges(),
            Window::Rest(rest) => rest,
            Window::Bounce { range, .. } => std::slice::from_ref(range),
        }
    }

    fn moved(&mut self, moved: usize) -> Progress {
        let moved = moved as u64;
        let useful = match &self.window {
            Window::Bounce { memory, lead, wanted, .. } => {
                let useful = moved.saturating_sub(*lead).min(*wanted);
                // `lead` and `useful` are within a bounce buffer's length.
                let bytes = memory.as_slice().get(*lead as usize..(*lead + useful) as usize);
                if let (false, Some(bytes)) = (self.write, bytes) {
                    self.buffers.copy_in(self.done, bytes);
                }
                useful
            }
            Window::Whole | Window::Rest(_) => moved,
        };
        if useful == 0 {
            // The file has become shorter than it was at opening, or a device refuses to go on.
            let kind = if self.write { io::ErrorKind::WriteZero } else { io::ErrorKind::UnexpectedEof };
            return Progress::Finished(Err(kind.into()));
        }
        self.done = self.done.saturating_add(useful);
        if self.done < self.buffers.len() {
            return Progress::Again;
        }
        Progress::Finished(Ok(u32::try_from(self.buffers.len()).unwrap_or(u32::MAX)))
    }
}

/// Making a range zero, by the best of the ways that the file has.
#[derive(Debug)]
struct Zero {
    offset: u64,
    len: u64,
    way: ZeroWay,
    range: Option<IoRange>,
}

#[derive(Clone, Copy, Debug)]
enum ZeroWay {
    Punch,
    ZeroRange,
    Write,
}

impl Zero {
    fn new(offset: u64, len: u64, may_unmap: bool) -> Self {
        let way = if may_unmap { ZeroWay::Punch } else { ZeroWay::ZeroRange };
        Self { offset, len, way, range: None }
    }

    fn step(&mut self, raw: &Raw) -> io::Result<Option<Step<'_>>> {
        if matches!(self.way, ZeroWay::Punch) && !raw.quirks.can(Feature::Punch) {
            self.way = ZeroWay::ZeroRange;
        }
        if matches!(self.way, ZeroWay::ZeroRange) && !raw.quirks.can(Feature::ZeroRange) {
            self.way = ZeroWay::Write;
        }
        let (offset, len) = (self.offset, self.len);
        if len == 0 {
            return Ok(None);
        }
        Ok(Some(match self.way {
            ZeroWay::Punch => Step::Fallocate { mode: PUNCH, offset, len },
            ZeroWay::ZeroRange => Step::Fallocate { mode: ZERO_RANGE, offset, len },
            ZeroWay::Write => {
                let range = self.range.insert(raw.zeroes(len)?);
                Step::Write { offset, ranges: std::slice::from_ref(range) }
            }
        }))
    }

    fn answer(&mut self, answer: io::Result<usize>, raw: &Raw) -> Progress {
        match (self.way, answer) {
            (ZeroWay::Write, Ok(0)) => Progress::Finished(Err(io::ErrorKind::WriteZero.into())),
            (ZeroWay::Write, Ok(written)) => {
                let written = (written as u64).min(self.len);
                self.offset = self.offset.saturating_add(written);
                self.len -= written;
                if self.len == 0 { Progress::Finished(Ok(0)) } else { Progress::Again }
            }
            (ZeroWay::Punch, Err(error)) if unsupported(&error) => {
                raw.missing(Feature::Punch, &error);
                self.way = ZeroWay::ZeroRange;
                Progress::Again
            }
            (ZeroWay::ZeroRange, Err(error)) if unsupported(&error) => {
                raw.missing(Feature::ZeroRange, &error);
                self.way = ZeroWay::Write;
                Progress::Again
            }
            (_, Err(error)) => Progress::Finished(Err(error)),
            (_, Ok(_)) => Progress::Finished(Ok(0)),
        }
    }
}

/// The whole blocks within a range.
fn shrink(offset: u64, len: u64, block: u64) -> (u64, u64) {
    let end = offset.saturating_add(len);
    let start = offset.checked_next_multiple_of(block).unwrap_or(end).min(end);
    (start, (end - start) / block * block)
}

fn aligned(dio: DioAlign, position: u64, ranges: &[IoRange]) -> bool {
    position.is_multiple_of(dio.offset)
        && ranges.iter().all(|range| {
            (range.base.addr() as u64).is_multiple_of(dio.memory)
                && (range.len as u64).is_multiple_of(dio.offset)
        })
}

fn passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Whether another way should be tried. `EINVAL` comes of a range that a device cannot do as one.
fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL | libc::ENODEV)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounce::{BUDGET, PIECE_MAX};
    use crate::raw::tests::raw_on;

    fn raw(dio: Option<DioAlign>) -> Raw {
        raw_on(tempfile::tempfile().unwrap(), 16 << 20, dio)
    }

    fn read(offset: u64, buffers: Buffers, raw: &Raw) -> Job {
        Job::new(Op::Read { offset, buffers }, raw)
    }

    fn errno(code: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(code))
    }

    /// The offset and the lengths of the ranges of a read or write step.
    fn shape(step: Option<Step<'_>>) -> (u64, Vec<usize>) {
        match step {
            Some(Step::Read { offset, ranges } | Step::Write { offset, ranges }) => {
                (offset, ranges.iter().map(|range| range.len).collect())
            }
            other => panic!("not a transfer: {other:?}"),
        }
    }

    fn fill(step: Option<&Step<'_>>, byte: u8) -> usize {
        let Some(Step::Read { ranges, .. }) = step else { panic!("not a read") };
        // Through a file, so that the test needs no unsafe code.
        let len = ranges.iter().map(|range| range.len).sum();
        let file = tempfile::tempfile().unwrap();
        let source = Buffers::from_slice(&vec![byte; len]).unwrap();
        crate::sys::pwritev(&file, source.io_ranges(), 0).unwrap();
        crate::sys::preadv(&file, ranges, 0).unwrap()
    }

    #[test]
    fn a_short_read_goes_on_where_it_stopped() {
        let raw = raw(None);
        let mut job = read(100, Buffers::zeroed(30).unwrap().chunked(10), &raw);
        assert_eq!(shape(job.step(&raw).unwrap()), (100, vec![10, 10, 10]));
        assert!(matches!(job.answer(Ok(14), &raw), Progress::Again));
        assert_eq!(shape(job.step(&raw).unwrap()), (114, vec![6, 10]));
        assert!(matches!(job.answer(Ok(16), &raw), Progress::Finished(Ok(30))));
    }

    #[test]
    fn interruptions_repeat_the_same_step_but_not_for_ever() {
        let raw = raw(None);
        let mut job = read(0, Buffers::zeroed(512).unwrap(), &raw);
        for code in [libc::EINTR, libc::EAGAIN].into_iter().cycle().take(RETRIES_MAX as usize) {
            assert_eq!(shape(job.step(&raw).unwrap()), (0, vec![512]));
            assert!(matches!(job.answer(errno(code), &raw), Progress::Again));
        }
        let Progress::Finished(Err(error)) = job.answer(errno(libc::EAGAIN), &raw) else { panic!("again") };
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    }

    #[test]
    fn an_end_of_file_is_an_error_not_a_loop() {
        let raw = raw(None);
        let mut job = read(0, Buffers::zeroed(512).unwrap(), &raw);
        let Progress::Finished(Err(error)) = job.answer(Ok(0), &raw) else { panic!("no error") };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let buffers = Buffers::zeroed(512).unwrap();
        let mut job = Job::new(Op::Write { offset: 0, buffers }, &raw);
        let Progress::Finished(Err(error)) = job.answer(Ok(0), &raw) else { panic!("no error") };
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn more_ranges_than_the_kernel_takes_go_in_several_calls() {
        let raw = raw(None);
        let mut job = read(0, Buffers::zeroed(2500).unwrap().chunked(1), &raw);
        for expected in [1024, 1024, 452] {
            let (_, lens) = shape(job.step(&raw).unwrap());
            assert_eq!(lens.len(), expected);
            let progress = job.answer(Ok(expected), &raw);
            assert_eq!(matches!(progress, Progress::Finished(Ok(2500))), expected == 452);
        }
    }

    #[test]
    fn an_error_ends_a_transfer_and_gives_the_buffers_back() {
        let raw = raw(None);
        let mut job = read(0, Buffers::zeroed(512).unwrap(), &raw);
        assert!(matches!(job.answer(errno(libc::EIO), &raw), Progress::Finished(Err(_))));
        assert_eq!(job.into_buffers().unwrap().len(), 512);
    }

    #[test]
    fn nothing_to_move_needs_no_call() {
        let raw = raw(None);
        assert!(read(5, Buffers::zeroed(0).unwrap(), &raw).step(&raw).unwrap().is_none());
        assert!(Job::new(Op::Discard { offset: 5, len: 0 }, &raw).step(&raw).unwrap().is_none());
        let zero = Op::WriteZeroes { offset: 5, len: 0, may_unmap: true };
        assert!(Job::new(zero, &raw).step(&raw).unwrap().is_none());
    }

    const DIO: DioAlign = DioAlign { memory: 512, offset: 4096 };

    #[test]
    fn aligned_buffers_are_not_bounced() {
        let raw = raw(Some(DIO));
        let mut job = read(8192, Buffers::zeroed(8192).unwrap().chunked(4096), &raw);
        assert_eq!(shape(job.step(&raw).unwrap()), (8192, vec![4096, 4096]));
    }

    #[test]
    fn an_unaligned_direct_read_takes_whole_blocks_and_gives_the_part_asked_for() {
        let raw = raw(Some(DIO));
        let mut job = read(4096 + 100, Buffers::zeroed(5000).unwrap(), &raw);
        let step = job.step(&raw).unwrap();
        assert_eq!(shape(step), (4096, vec![8192]));
        fill(job.step(&raw).unwrap().as_ref(), 7);
        assert!(matches!(job.answer(Ok(4096), &raw), Progress::Again));
        // 3996 bytes of it were wanted; the rest begins at a block.
        let step = job.step(&raw).unwrap();
        assert_eq!(shape(step), (8192, vec![4096]));
        fill(job.step(&raw).unwrap().as_ref(), 9);
        assert!(matches!(job.answer(Ok(4096), &raw), Progress::Finished(Ok(5000))));
        let buffers = job.into_buffers().unwrap();
        let (sevens, nines) = buffers.as_slice().unwrap().split_at(3996);
        assert!(sevens.iter().all(|&byte| byte == 7));
        assert!(nines.iter().all(|&byte| byte == 9));
    }

    #[test]
    fn bounce_buffers_are_bounded() {
        let raw = raw(Some(DIO));
        let len = 3 * PIECE_MAX + 4096;
        let buffers = Buffers::zeroed(usize::try_from(len).unwrap()).unwrap().chunked(4095);
        let mut job = Job::new(Op::Write { offset: 0, buffers }, &raw);
        let mut total = 0;
        loop {
            let (offset, lens) = shape(job.step(&raw).unwrap());
            assert_eq!(offset, total as u64);
            assert_eq!(lens.len(), 1);
            assert!(lens[0] as u64 <= PIECE_MAX);
            total += lens[0];
            if let Progress::Finished(result) = job.answer(Ok(lens[0]), &raw) {
                assert_eq!(u64::from(result.unwrap()), len);
                break;
            }
        }
        assert_eq!(total as u64, len);
    }

    #[test]
    fn what_all_requests_of_a_disk_bounce_is_bounded() {
        const DEPTH: u64 = 64;
        let raw = raw(Some(DIO));
        let mut jobs: Vec<_> = (0..DEPTH)
            .map(|_| {
                let buffers = Buffers::zeroed((1 << 20) + 4096).unwrap().chunked(4095);
                Job::new(Op::Write { offset: 0, buffers }, &raw)
            })
            .collect();
        for job in &mut jobs {
            let (_, lens) = shape(job.step(&raw).unwrap());
            assert!(lens[0] >= 4096);
        }
        let held = raw.bounced.held();
        assert!(held <= BUDGET + DEPTH * DIO.offset, "{held}");
        drop(jobs);
        assert_eq!(raw.bounced.held(), 0);
    }

    #[test]
    fn a_direct_write_that_stops_within_a_block_is_an_error() {
        let raw = raw(Some(DIO));
        let buffers = Buffers::zeroed(8192).unwrap();
        let mut job = Job::new(Op::Write { offset: 0, buffers }, &raw);
        assert!(matches!(job.answer(Ok(100), &raw), Progress::Again));
        assert_eq!(job.step(&raw).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn write_zeroes_falls_back_to_writing() {
        let raw = raw(None);
        let mut job = Job::new(Op::WriteZeroes { offset: 512, len: 300 << 10, may_unmap: true }, &raw);
        assert!(matches!(job.step(&raw).unwrap(), Some(Step::Fallocate { mode: PUNCH, .. })));
        assert!(matches!(job.answer(errno(libc::EOPNOTSUPP), &raw), Progress::Again));
        assert!(matches!(job.step(&raw).unwrap(), Some(Step::Fallocate { mode: ZERO_RANGE, .. })));
        assert!(matches!(job.answer(errno(libc::EINVAL), &raw), Progress::Again));
        assert_eq!(shape(job.step(&raw).unwrap()), (512, vec![256 << 10]));
        assert!(matches!(job.answer(Ok(1000), &raw), Progress::Again));
        assert_eq!(shape(job.step(&raw).unwrap()), (1512, vec![256 << 10]));
        assert!(matches!(job.answer(Ok(256 << 10), &raw), Progress::Again));
        assert_eq!(shape(job.step(&raw).unwrap()), (1512 + (256 << 10), vec![(44 << 10) - 1000]));
        assert!(matches!(job.answer(Ok((44 << 10) - 1000), &raw), Progress::Finished(Ok(0))));

        // What is permanently missing is not tried again.
        let mut job = Job::new(Op::WriteZeroes { offset: 0, len: 512, may_unmap: true }, &raw);
        assert!(matches!(job.step(&raw).unwrap(), Some(Step::Fallocate { mode: ZERO_RANGE, .. })));
    }

    #[test]
    fn write_zeroes_keeps_the_storage_unless_it_may_unmap() {
        let raw = raw(None);
        let mut job = Job::new(Op::WriteZeroes { offset: 0, len: 512, may_unmap: false }, &raw);
        assert!(matches!(job.step(&raw).unwrap(), Some(Step::Fallocate { mode: ZERO_RANGE, .. })));
    }

    #[test]
    fn a_discard_that_cannot_be_done_succeeds() {
        let raw = raw(None);
        let mut job = Job::new(Op::Discard { offset: 0, len: 4096 }, &raw);
        assert!(matches!(job.step(&raw).unwrap(), Some(Step::Fallocate { mode: PUNCH, .. })));
        assert!(matches!(job.answer(errno(libc::EOPNOTSUPP), &raw), Progress::Again));
        assert!(job.step(&raw).unwrap().is_none());
        assert!(Job::new(Op::Discard { offset: 0, len: 4096 }, &raw).step(&raw).unwrap().is_none());
    }

    #[test]
    fn a_discard_that_fails_says_so() {
        let raw = raw(None);
        let mut job = Job::new(Op::Discard { offset: 0, len: 4096 }, &raw);
        assert!(matches!(job.answer(errno(libc::EIO), &raw), Progress::Finished(Err(_))));
    }

    #[test]
    fn a_block_device_is_asked_for_whole_blocks_in_two_ways() {
        let mut raw = raw(None);
        raw.block_device = true;
        let discard = Op::Discard { offset: 100, len: 9000 };
        let mut job = Job::new(discard, &raw);
        let step = job.step(&raw).unwrap();
        assert!(matches!(step, Some(Step::Fallocate { mode: PUNCH, offset: 512, len: 8192 })), "{step:?}");
        assert!(matches!(job.answer(errno(libc::EOPNOTSUPP), &raw), Progress::Again));
        let step = job.step(&raw).unwrap();
        assert!(matches!(step, Some(Step::BlockDiscard { offset: 512, len: 8192 })), "{step:?}");
        assert!(matches!(job.answer(Ok(0), &raw), Progress::Finished(Ok(0))));

        let mut job = Job::new(Op::Discard { offset: 0, len: 512 }, &raw);
        assert!(matches!(job.step(&raw).unwrap(), Some(Step::BlockDiscard { .. })));
        assert!(matches!(job.answer(errno(libc::EOPNOTSUPP), &raw), Progress::Finished(Ok(0))));
        assert!(job.step(&raw).unwrap().is_none());
    }

    #[test]
    fn a_discard_shrinks_to_whole_blocks() {
        assert_eq!(shrink(0, 4096, 512), (0, 4096));
        assert_eq!(shrink(100, 1000, 512), (512, 512));
        assert_eq!(shrink(100, 300, 512), (400, 0));
        assert_eq!(shrink(u64::MAX - 10, 10, 512), (u64::MAX, 0));
    }
}
