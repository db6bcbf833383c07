//! Page faults of guest memory, handled here (userfaultfd(2), linux/userfaultfd.h).
//!
//! Faults of vCPUs and of the kernel's own access to guest memory come from kernel mode. A descriptor that handles
//! them needs CAP_SYS_PTRACE, `vm.unprivileged_userfaultfd=1`, or access to /dev/userfaultfd. One that handles
//! faults of user mode alone is of no use to a VM, and is not asked for.
#![expect(unsafe_code, reason = "userfaultfd is a system call and its ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{BitOr, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vm_memory::GuestMemoryBackend;
use vmm_device_model::dma::GuestRam;

use crate::layout::PAGE_SIZE;
use crate::zone::Region;

/// Where userfaultfds come from that the system call refuses (Linux 6.1).
pub const DEVICE: &str = "/dev/userfaultfd";

/// What a kernel's userfaultfd can do: `UFFD_FEATURE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u64);

impl Features {
    /// Nothing that had to be asked for: missing pages of private memory.
    pub const NONE: Self = Self(0);
    /// Writes to protected pages (Linux 5.7).
    pub const WRITE_PROTECT: Self = Self(1);
    /// Missing pages of hugetlbfs.
    pub const MISSING_HUGE: Self = Self(1 << 4);
    /// Missing pages of shared memory.
    pub const MISSING_SHARED: Self = Self(1 << 5);
    /// Pages of shared memory that are there and not mapped.
    pub const MINOR_SHARED: Self = Self(1 << 10);
    /// Writes to protected pages of shared memory and hugetlbfs (Linux 5.19).
    pub const WRITE_PROTECT_SHARED: Self = Self(1 << 12);

    /// Those of `wanted` that are not among these.
    #[must_use]
    pub const fn lacking(self, wanted: Self) -> Self {
        Self(wanted.0 & !self.0)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which accesses are faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Those to pages that are not there.
    Missing,
    /// Writes to pages that are protected.
    WriteProtect,
    /// Those to pages that are in the file and not mapped.
    Minor,
}

/// What an access met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// No page.
    Missing,
    /// A page that is protected.
    Protected,
    /// A page that is not mapped.
    Unmapped,
}

/// An access that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Number of the region.
    pub region: usize,
    /// First byte of the page in it.
    pub offset: u64,
    /// What it met.
    pub kind: FaultKind,
}

/// A userfaultfd for the regions of one guest's memory. Dropped, it lets go of all: what waits goes on, and protected
/// pages are so no more.
///
/// Ranges are offsets in a region, whole pages of the kind that it consists of.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    memory: Arc<GuestRam>,
    regions: Vec<Place>,
}

/// Where a region is in this process.
#[derive(Debug, Clone, Copy)]
struct Place {
    host: u64,
    size: u64,
    /// Bytes of a page.
    unit: u64,
}

/// What this kernel has to offer to this process.
///
/// # Errors
/// No userfaultfd for faults of the kernel can be had.
pub fn supported() -> Result<Features, UserfaultError> {
    handshake(&open()?, Features::NONE)
}

impl Userfault {
    /// One for the regions of `memory`, which stays mapped as long as this lives. None is registered yet.
    ///
    /// # Errors
    /// None can be had, or not with the features that are `wanted`.
    pub fn new(memory: Arc<GuestRam>, wanted: Features) -> Result<Self, UserfaultError> {
        // A kernel refuses what it does not know, without a word on what it knows.
        let lacking = supported()?.lacking(wanted);
        if lacking != Features::NONE {
            return Err(UserfaultError::Lacks(lacking));
        }
        let fd = open()?;
        handshake(&fd, wanted)?;
        let regions = memory.iter().map(place).collect::<io::Result<_>>();
        let regions = regions.map_err(failed("look at guest memory"))?;
        Ok(Self { fd, memory, regions })
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// Bytes of a page of `region`.
    pub fn unit(&self, region: usize) -> u64 {
        self.regions.get(region).map_or(PAGE_SIZE, |place| place.unit)
    }

    /// From now on such accesses to `region` are faults, told by [`faults`](Self::faults).
    ///
    /// # Errors
    /// Memory of this kind cannot be so registered (EINVAL).
    pub fn register(&self, region: usize, mode: Mode) -> Result<(), UserfaultError> {
        let mode = match mode {
            Mode::Missing => 1,
            Mode::WriteProtect => 2,
            Mode::Minor => 4,
        };
        let [start, len] = self.range(region, 0..u64::MAX)?;
        self.call(REGISTER, &mut [start, len, mode, 0]).map_err(failed("register guest memory"))
    }

    /// Lets go of `region`, as dropping does of all.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unregister(&self, region: usize) -> Result<(), UserfaultError> {
        let mut range = self.range(region, 0..u64::MAX)?;
        self.call(UNREGISTER, &mut range).map_err(failed("unregister guest memory"))?;
        // Of those who wait the kernel wakes only who waits for missing pages.
        self.wake(region, 0..u64::MAX)
    }

    /// The same for `regions`. What the kernel refuses is in the log: the end of the descriptor does it as well.
    pub(crate) fn let_go(&self, regions: impl IntoIterator<Item = usize>) {
        for region in regions {
            if let Err(error) = self.unregister(region) {
                log::error!("guest memory is still watched: {error}");
            }
        }
    }

    /// Protects pages from writes. Of private memory those that are not there are left out.
    ///
    /// # Errors
    /// What the kernel says; some pages may be protected then.
    pub fn protect(&self, region: usize, range: Range<u64>) -> Result<(), UserfaultError> {
        self.write_protect(region, range, 1)
    }

    /// Protects pages no more, and wakes who waits for them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn release(&self, region: usize, range: Range<u64>) -> Result<(), UserfaultError> {
        self.write_protect(region, range, 0)
    }

    fn write_protect(&self, region: usize, range: Range<u64>, mode: u64) -> Result<(), UserfaultError> {
        let [start, len] = self.range(region, range)?;
        loop {
            match self.call(WRITEPROTECT, &mut [start, len, mode]) {
                // Another thread changes mappings.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                done => return done.map_err(failed("protect guest memory")),
            }
        }
    }

    /// Fills missing pages from `offset` on and wakes who waits for them. A page that is there is left as it is.
    ///
    /// # Errors
    /// What the kernel says: a host without memory.
    pub fn copy(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), UserfaultError> {
        let end = offset.saturating_add(bytes.len() as u64);
        let mut source = bytes.as_ptr() as u64;
        self.fill(region, offset..end, "fill guest memory", |start, len| {
            // destination, source, length, mode, bytes that were copied
            let mut arg = [start, source, len, 0, 0];
            let done = self.call(COPY, &mut arg);
            let [.., copied] = arg;
            let copied = step(done, copied)?;
            source += copied.unwrap_or(self.unit(region));
            Ok(copied)
        })
    }

    /// Makes missing pages zero and wakes who waits for them. A page that is there is left as it is. Not for huge
    /// pages: [`copy`](Self::copy) zeroes there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn zero(&self, region: usize, range: Range<u64>) -> Result<(), UserfaultError> {
        self.fill(region, range, "zero guest memory", |start, len| {
            let mut arg = [start, len, 0, 0];
            let done = self.call(ZEROPAGE, &mut arg);
            let [.., zeroed] = arg;
            step(done, zeroed)
        })
    }

    /// Maps pages that are in the file (after a [`FaultKind::Unmapped`]) and wakes who waits for them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn map(&self, region: usize, range: Range<u64>) -> Result<(), UserfaultError> {
        self.fill(region, range, "map guest memory", |start, len| {
            let mut arg = [start, len, 0, 0];
            let done = self.call(CONTINUE, &mut arg);
            let [.., mapped] = arg;
            step(done, mapped)
        })
    }

    /// Wakes who waits for pages of `range`, to try again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, region: usize, range: Range<u64>) -> Result<(), UserfaultError> {
        let mut range = self.range(region, range)?;
        self.call(WAKE, &mut range).map_err(failed("wake who waits for guest memory"))
    }

    /// Does `some` from the start of `range` until its end: of an address and a length it says how many bytes are done,
    /// or that there is a page already.
    fn fill(
        &self,
        region: usize,
        range: Range<u64>,
        what: &'static str,
        mut some: impl FnMut(u64, u64) -> io::Result<Option<u64>>,
    ) -> Result<(), UserfaultError> {
        let [mut start, mut len] = self.range(region, range)?;
        let unit = self.unit(region);
        while len > 0 {
            let done = match some(start, len).map_err(failed(what))? {
                Some(done) => done,
                None => {
                    self.call(WAKE, &mut [start, unit]).map_err(failed(what))?;
                    unit
                }
            };
            start = start.saturating_add(done);
            len = len.saturating_sub(done);
        }
        Ok(())
    }

    /// Waits until there is something to be told by [`faults`](Self::faults), or until `over`, an eventfd, is readable.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&self, over: impl AsFd) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN), PollFd::new(&over, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What waits, at most 16 accesses and perhaps none: poll for [`as_fd`](Self::as_fd) to be readable.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn faults(&self) -> io::Result<Vec<Fault>> {
        let mut bytes = [0; 16 * MESSAGE];
        let count = match rustix::io::read(&self.fd, &mut bytes) {
            Ok(count) => count,
            // Who waited was woken meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let messages = bytes.as_chunks::<MESSAGE>().0.iter().take(count / MESSAGE);
        Ok(messages.filter_map(|message| self.fault(message)).collect())
    }

    /// Takes a `struct uffd_msg` apart.
    fn fault(&self, message: &[u8; MESSAGE]) -> Option<Fault> {
        let (words, _) = message.as_chunks::<8>();
        let [event, flags, address, _] = words else { return None };
        let [event, ..] = *event;
        let (flags, address) = (u64::from_ne_bytes(*flags), u64::from_ne_bytes(*address));
        if event != EVENT_PAGEFAULT {
            return None;
        }
        let kind = match (flags & FLAG_WP != 0, flags & FLAG_MINOR != 0) {
            (true, _) => FaultKind::Protected,
            (false, true) => FaultKind::Unmapped,
            (false, false) => FaultKind::Missing,
        };
        let within = |place: &&Place| address >= place.host && address - place.host < place.size;
        let region = self.regions.iter().position(|place| within(&place))?;
        let place = self.regions.get(region)?;
        let offset = address - place.host;
        Some(Fault { region, offset: offset - offset % place.unit, kind })
    }

    /// Start and length in this process; `range` is cut to the region.
    fn range(&self, region: usize, range: Range<u64>) -> Result<[u64; 2], UserfaultError> {
        let place = self.regions.get(region).ok_or(UserfaultError::NoRegion { region })?;
        let (start, end) = (range.start.min(place.size), range.end.min(place.size));
        Ok([place.host + start, end.saturating_sub(start)])
    }

    /// An ioctl whose argument is `words`, of which the kernel may change some.
    fn call<const N: usize>(&self, request: libc::Ioctl, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: the requests of this module take structures of as many `u64`. Ranges are within guest memory, which
        // `self.memory` keeps mapped, which is always accessed by volatile copies, and what it holds is any bytes.
        // The source of COPY is a slice that outlives the call.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, words.as_mut_ptr()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What an ioctl that fills did: so many bytes, or nothing, for there is a page.
fn step(result: io::Result<()>, done: u64) -> io::Result<Option<u64>> {
    match result {
        Ok(()) => Ok(Some(done)),
        // It was interrupted, and says how far it came, or minus the error.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            Ok(Some(if done.cast_signed() > 0 { done } else { 0 }))
        }
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(None),
        Err(error) => Err(error),
    }
}

fn place(region: &Region) -> io::Result<Place> {
    let mapping = region.get_mmap();
    let unit = match mapping.file_offset().filter(|_| mapping.is_hugetlbfs() == Some(true)) {
        // hugetlbfs tells the size of its pages so.
        Some(file) => file.file().metadata()?.blksize(),
        None => PAGE_SIZE,
    };
    Ok(Place { host: mapping.as_ptr() as u64, size: mapping.size() as u64, unit })
}

fn open() -> Result<OwnedFd, UserfaultError> {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let refused = match owned(fd) {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    // The word of the system call is the better one where there is no device either.
    open_by_device().map_err(|_| UserfaultError::Refused(refused))
}

fn open_by_device() -> io::Result<OwnedFd> {
    let device: File =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(DEVICE)?;
    // SAFETY: the request takes flags only.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    owned(fd.into())
}

/// The descriptor that a call returned, or its error.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the call just returned the descriptor, and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asks for `wanted`, once for each descriptor, and gives what there is.
fn handshake(fd: &OwnedFd, wanted: Features) -> Result<Features, UserfaultError> {
    let mut arg = [API_VERSION, wanted.0, 0];
    // SAFETY: UFFDIO_API takes a structure of three `u64`.
    match unsafe { libc::ioctl(fd.as_raw_fd(), API, arg.as_mut_ptr()) } {
        0 => Ok(Features(arg[1])),
        _ => Err(failed("agree on features")(io::Error::last_os_error())),
    }
}

const API_VERSION: u64 = 0xaa;
/// `struct uffd_msg`.
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WP: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;

/// `USERFAULTFD_IOC_NEW`.
const NEW: libc::Ioctl = 0xaa00;
/// `UFFDIO_API` and so on.
const API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;
const WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
const COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
const WRITEPROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;
const CONTINUE: libc::Ioctl = 0xc020_aa07_u32 as libc::Ioctl;

fn failed(what: &'static str) -> impl Fn(io::Error) -> UserfaultError {
    move |source| UserfaultError::Call { what, source }
}

/// Page faults cannot be handled here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserfaultError {
    /// The kernel has none, or none for this process.
    #[error("the host gives no userfaultfd that handles faults of guests")]
    Refused(#[source] io::Error),
    /// The kernel is too old.
    #[error("the host's userfaultfd lacks features {:#x}", .0.0)]
    Lacks(Features),
    /// There is no such region.
    #[error("there is no memory region {region}")]
    NoRegion {
        /// The number asked for.
        region: usize,
    },
    /// The kernel refused.
    #[error("cannot {what}")]
    Call {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests;
