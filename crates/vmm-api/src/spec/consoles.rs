//! Serial port, virtio-console and debug console.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::check::Checker;
use super::{ConsoleSpec, DebugConsoleSpec, Sink};
use crate::config::{ConsoleConfig, ConsoleMode, DebugConsoleConfig, SerialConfig};

pub(super) fn serial(config: &SerialConfig, checker: &mut Checker) -> Option<Sink> {
    sink("serial", config.mode, config.file.as_ref(), config.socket.as_ref(), checker)
}

pub(super) fn console(config: &ConsoleConfig, checker: &mut Checker) -> Option<ConsoleSpec> {
    let sink = sink("console", config.mode, config.file.as_ref(), config.socket.as_ref(), checker)?;
    let identity = checker.identity("console", config.id.as_deref(), config.pci_device_id)?;
    Some(ConsoleSpec { identity, sink })
}

pub(super) fn debug_console(config: &DebugConsoleConfig, checker: &mut Checker) -> Option<DebugConsoleSpec> {
    if config.mode == ConsoleMode::Socket {
        checker.invalid("debug_console.mode", "the debug console cannot be a socket");
        return None;
    }
    let sink = sink("debug_console", config.mode, config.file.as_ref(), None, checker)?;
    Some(DebugConsoleSpec { port: config.iobase.unwrap_or(0xe9), sink })
}

/// What the serial port and virtio-console cannot share.
pub(super) fn together(serial: Option<&Sink>, console: Option<&Sink>, checker: &mut Checker) {
    match (serial, console) {
        (Some(Sink::Tty), Some(Sink::Tty)) => {
            let message = "is the terminal, as is serial's: what is typed there goes to virtio-console alone";
            checker.warn("console.mode", message);
        }
        (Some(Sink::Socket(one)), Some(Sink::Socket(other))) if one == other => {
            checker.invalid("console.socket", "is also that of serial");
        }
        _ => {}
    }
}

/// The longest path of a socket in bytes (unix(7): `sun_path` with its NUL).
const MAX_SOCKET_PATH: usize = 107;

/// Where a console goes; `None` if it is off, or if its place is missing.
fn sink(
    path: &str,
    mode: ConsoleMode,
    file: Option<&PathBuf>,
    socket: Option<&PathBuf>,
    checker: &mut Checker,
) -> Option<Sink> {
    let mut needed = |name: &str, place: Option<&PathBuf>| {
        if place.is_none() {
            checker.invalid(format!("{path}.{name}"), format!("is required by mode {}", mode.word()));
        }
        place.cloned()
    };
    match mode {
        ConsoleMode::Off => None,
        ConsoleMode::Null => Some(Sink::Null),
        ConsoleMode::Tty => Some(Sink::Tty),
        ConsoleMode::Pty => Some(Sink::Pty),
        ConsoleMode::File => needed("file", file).map(Sink::File),
        ConsoleMode::Socket => {
            let place = needed("socket", socket)?;
            if place.as_os_str().as_bytes().len() > MAX_SOCKET_PATH {
                let message =
                    format!("is longer than the {MAX_SOCKET_PATH} bytes that a socket's path may have");
                checker.invalid(format!("{path}.socket"), message);
            }
            Some(Sink::Socket(place))
        }
    }
}
