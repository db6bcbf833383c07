//! Serial port, virtio-console and debug console.

use std::path::PathBuf;

use super::table::{choice, object, pci_object};

choice! {
    /// Where a console goes.
    pub enum ConsoleMode {
        /// There is no such device.
        Off = "Off" | "off",
        /// The device is there; its output is dropped.
        Null = "Null" | "null",
        /// The terminal of the VMM.
        Tty = "Tty" | "tty",
        /// A new pseudo terminal.
        Pty = "Pty" | "pty",
        /// A file.
        File = "File" | "file",
        /// A UNIX socket.
        Socket = "Socket" | "socket",
    }
}

pci_object! {
    /// The virtio-console.
    pub struct ConsoleConfig {
        /// The file, for mode `File`; with `Pty` the path of the pseudo terminal, once it exists.
        [current] file: Option<PathBuf> = None,
        /// The socket, for mode `Socket`.
        [current] socket: Option<PathBuf> = None,
        /// Where the console goes.
        [current, required] mode: ConsoleMode = ConsoleMode::Tty,
    }
}

object! {
    /// The serial port (16550A at 0x3f8).
    pub struct SerialConfig {
        /// The file, for mode `File`; with `Pty` the path of the pseudo terminal, once it exists.
        [current] file: Option<PathBuf> = None,
        /// The socket, for mode `Socket`.
        [current] socket: Option<PathBuf> = None,
        /// Where the serial port goes.
        [current, required] mode: ConsoleMode = ConsoleMode::Null,
    }
    retired {
        "iommu" = "false", "the serial port is not a PCI device";
    }
}

object! {
    /// The debug console: one output port.
    pub struct DebugConsoleConfig {
        /// The file, for mode `File`; with `Pty` the path of the pseudo terminal, once it exists.
        [current] file: Option<PathBuf> = None,
        /// Where the debug console goes.
        [current, required] mode: ConsoleMode = ConsoleMode::Off,
        /// I/O port.
        [current] iobase: Option<u16> = Some(0xe9),
    }
}
