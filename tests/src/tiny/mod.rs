//! Tiny guests: a few dozen instructions each, assembled with this crate, for any KVM.
//!
//! [`Guest::write`] makes a kernel file of one: an ELF kernel with a PVH entry point that prints on the serial port. [`bzimage()`] makes
//! one of the other format.
#![expect(unsafe_code, reason = "the guests' code is assembled into this program's read-only data")]

pub mod bzimage;
mod elf;

use std::arch::global_asm;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

global_asm!(include_str!("guests.s"), options(att_syntax, raw));

unsafe extern "C" {
    safe static tiny_guests_start: u8;
    safe static tiny_guests_end: u8;
    safe static tiny_linux_start: u8;
    safe static tiny_linux_end: u8;
}

/// Where the blob is loaded (`BASE` in `guests.s`).
const BASE: u32 = 0x10_0000;
/// Bytes of the loaded segment; the blob's code uses the rest as its stack (`STACK` in `guests.s`).
const SEGMENT_SIZE: u64 = 0x8000;

/// A tiny guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Prints `hello ` and its command line, and powers off.
    Hello,
    /// Prints `boot` and resets through ACPI's register: at each boot.
    Reset,
    /// The same through the keyboard controller.
    I8042Reset,
    /// Prints `fault` and takes a triple fault.
    TripleFault,
    /// Prints a dot now and then and never waits.
    Spin,
    /// Prints `halted` and halts for good.
    Halt,
    /// Prints `ready`, then what it is sent; `q` powers off.
    Echo,
    /// Starts as many vCPUs as the digit on its command line says; each prints `cpu` and its APIC id, then the first prints
    /// `all up` and powers off.
    Smp,
    /// Counts for ever, from 0, eight hexadecimal digits a line.
    Ticker,
    /// Writes 1 to port 0x80 before anything else, and halts.
    Post,
    /// Prints `ports` or `ecam`, device number and vendor:device of each function on PCI bus 0, and powers off.
    PciScan,
    /// Prints `debug console` on port 0xe9, and powers off.
    DebugConsole,
    /// Prints `crash` and runs off into an address where nothing is.
    Crash,
    /// Prints `boot` and goes to the firmware's reset vector: at each boot.
    BiosReset,
    /// Reports a panic through pvpanic, prints `panicked`, and halts. Without the device prints `no pvpanic` and powers off.
    Panic,
    /// Prints `ready`, halts with interrupts off, prints `nmi` at a non-maskable interrupt, and halts for good.
    Nmi,
    /// Prints `ready`, polls the GED until the power button is pressed, prints `button`, and powers off.
    PowerButton,
    /// Counts for ever as fast as it can, as `Ticker`; a dot on port 0xe9 for every 16 lines.
    Flood,
    /// Prints the size of virtio-console's window, rows and columns as four hexadecimal digits each, at first and whenever it is
    /// another one.
    ConsoleSize,
    /// Drives every virtio disk, random source and console: prints `disk ` and the status of a read, a write, a flush, a discard
    /// and zeroes written, `rng`, `console` (there, too), at last `driven`, and halts.
    Drivers,
    /// Counts for ever as `Ticker`, in 256 pages of memory at once; prints `memory is not what it was` and halts when one of them
    /// is not. If its command line begins with `h`, it prints `halted` when it is sent something, and halts.
    Pages,
    /// Prints half of its generation ID for ever, 16 hexadecimal digits a line, and `another` when the event device tells of a new
    /// one.
    Generation,
    /// Prints its clocks for ever, 72 hexadecimal digits a line: TSC (16), of kvm-clock `system_time` (16), `tsc_timestamp` (16),
    /// `tsc_to_system_mul` (8) and the double word that begins with `tsc_shift` (8), PM timer (8).
    Clocks,
    /// Counts for ever as `Pages`, each number by way of its first disk, in one of 256 sectors: n in sector n mod 256. Prints
    /// `the disk's memory is not what it was` and halts when another one is read than was written.
    Disk,
}

impl Guest {
    /// Every guest, in the order of the blob's table.
    pub const ALL: [Self; 24] = [
        Self::Hello,
        Self::Reset,
        Self::I8042Reset,
        Self::TripleFault,
        Self::Spin,
        Self::Halt,
        Self::Echo,
        Self::Smp,
        Self::Ticker,
        Self::Post,
        Self::PciScan,
        Self::DebugConsole,
        Self::Crash,
        Self::BiosReset,
        Self::Panic,
        Self::Nmi,
        Self::PowerButton,
        Self::Flood,
        Self::ConsoleSize,
        Self::Drivers,
        Self::Pages,
        Self::Generation,
        Self::Clocks,
        Self::Disk,
    ];

    /// A name for files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Reset => "reset",
            Self::I8042Reset => "i8042-reset",
            Self::TripleFault => "triple-fault",
            Self::Spin => "spin",
            Self::Halt => "halt",
            Self::Echo => "echo",
            Self::Smp => "smp",
            Self::Ticker => "ticker",
            Self::Post => "post",
            Self::PciScan => "pci-scan",
            Self::DebugConsole => "debug-console",
            Self::Crash => "crash",
            Self::BiosReset => "bios-reset",
            Self::Panic => "panic",
            Self::Nmi => "nmi",
            Self::PowerButton => "power-button",
            Self::Flood => "flood",
            Self::ConsoleSize => "console-size",
            Self::Drivers => "drivers",
            Self::Pages => "pages",
            Self::Generation => "generation",
            Self::Clocks => "clocks",
            Self::Disk => "disk",
        }
    }

    /// The kernel file's content.
    #[must_use]
    pub fn elf(self) -> Vec<u8> {
        let code = blob();
        let entry = table(code).get(self as usize).copied().unwrap_or_default();
        elf::file(code, BASE.into(), SEGMENT_SIZE, BASE + entry)
    }

    /// Writes the kernel file into `folder`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(self, folder: &Path) -> io::Result<PathBuf> {
        let path = folder.join(self.name());
        fs::write(&path, self.elf())?;
        Ok(path)
    }
}

/// The content of a bzImage that prints `linux ` and its command line, and powers off.
#[must_use]
pub fn bzimage() -> Vec<u8> {
    let code = between(&raw const tiny_linux_start, &raw const tiny_linux_end);
    bzimage::file(code, BASE.into(), SEGMENT_SIZE as u32)
}

/// The code of all guests.
fn blob() -> &'static [u8] {
    between(&raw const tiny_guests_start, &raw const tiny_guests_end)
}

/// What `guests.s` has between two of its symbols.
fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: the callers give the symbols of the start and the end of one piece of a read-only section.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Entry offsets, which the blob begins with; a zero ends them.
fn table(code: &[u8]) -> Vec<u32> {
    code.chunks_exact(4)
        .filter_map(|bytes| bytes.try_into().ok().map(u32::from_le_bytes))
        .take_while(|offset| *offset != 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_has_an_entry_of_its_own_in_the_blob() {
        let entries = table(blob());
        assert_eq!(entries.len(), Guest::ALL.len());
        assert!(entries.is_sorted_by(|a, b| a < b), "{entries:?}");
        assert!(entries.iter().all(|entry| (*entry as usize) < blob().len()));
        for (index, guest) in Guest::ALL.into_iter().enumerate() {
            assert_eq!(guest as usize, index, "{guest:?}");
        }
    }

    #[test]
    fn the_blob_leaves_room_for_the_stack() {
        assert!((blob().len() as u64) < SEGMENT_SIZE / 2, "{}", blob().len());
    }

    #[test]
    fn nothing_in_the_blob_was_left_to_a_linker() {
        // `hello` begins with `mov $STACK, %esp`.
        let entry = table(blob())[Guest::Hello as usize] as usize;
        assert_eq!(blob()[entry..entry + 5], [0xbc, 0x00, 0x80, 0x10, 0x00]);
    }
}
