//! Where consoles end outside the guest: terminal, file, pty, nowhere.
//!
//! One function ([`Consoles::open`]) wires them for every boot of a VM, and they outlive a reboot. The guest
//! never waits: its output goes into a bounded ring, which a thread of its own writes out; input that the
//! device does not take stays here until it has room.

mod output;
mod sys;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_api::spec::{MachineSpec, Sink};
use vmm_device_model::thread::ThreadHook;
use vmm_platform_devices::output::{ByteSink, Discard, Notify};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use output::OutputThread;
pub use sys::{RawTerminal, restore_terminal, restore_terminal_in_handler};

/// Puts bytes into a device; returns how many it took.
pub type Enqueue = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;

/// The outer end of one console; devices of one boot after the other are connected to it.
pub struct End {
    sink: Arc<dyn ByteSink>,
    room: Arc<EventFd>,
    device: Mutex<Option<Enqueue>>,
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End").field("sink", &self.sink).finish_non_exhaustive()
    }
}

impl End {
    /// Where the device's output goes.
    pub fn sink(&self) -> Arc<dyn ByteSink> {
        Arc::clone(&self.sink)
    }

    /// What the device notifies when it takes input again.
    pub fn room(&self) -> Arc<dyn Notify> {
        Arc::clone(&self.room) as _
    }

    /// Columns and rows of the user's terminal; 80 by 25 where there is none.
    pub fn size(&self) -> (u16, u16) {
        sys::terminal_size().unwrap_or((80, 25))
    }

    /// The eventfd behind [`room`](Self::room).
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn room_event(&self) -> io::Result<EventFd> {
        self.room.try_clone()
    }

    /// Input goes to this device from now on.
    pub fn connect(&self, device: Enqueue) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = Some(device);
        self.room.notify();
    }

    /// The device is gone: input is lost.
    pub fn disconnect(&self) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.room.notify();
    }

    /// Gives `bytes` to the device; returns how many need not be kept. Without a device that is all.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.as_ref().map_or(bytes.len(), |enqueue| enqueue(bytes))
    }
}

/// One console with what it holds open.
#[derive(Debug)]
pub struct Console {
    end: Arc<End>,
    /// Where input comes from, until the control loop takes it.
    input: Option<File>,
    /// The terminal that a user attaches to.
    pty: Option<Pty>,
    // Dropped last, it writes out what the guest said.
    _output: Option<OutputThread>,
}

#[derive(Debug)]
struct Pty {
    path: PathBuf,
    /// Held open, so that the main side is never hung up while nobody is attached.
    _other: File,
}

/// The consoles of a VM.
#[derive(Debug)]
pub struct Consoles {
    /// The serial port's.
    pub serial: Option<Console>,
    /// virtio-console's.
    pub console: Option<Console>,
    /// The debug console's.
    pub debug: Option<Console>,
    /// Whether one of them reads standard input.
    reads_stdin: bool,
    /// The user's terminal is in raw mode as long as this is here.
    raw: Option<RawTerminal>,
}

impl Consoles {
    /// Opens what a VM's consoles end in.
    ///
    /// # Errors
    /// A file or terminal cannot be opened; what was opened is closed again.
    pub fn open(spec: &MachineSpec, threads: &Arc<dyn ThreadHook>) -> Result<Self, ConsoleError> {
        let mut from = Origin { stdin: StdinOnce(false), threads };
        // The interactive console gets the terminal's input before the serial port.
        let console = spec.console.as_ref().map(|c| Console::open("console", &c.sink, &mut from));
        let console = console.transpose()?;
        let serial = spec.serial.as_ref().map(|sink| Console::open("serial", sink, &mut from)).transpose()?;
        let debug = spec.debug_console.as_ref().map(|c| Console::open("debug-console", &c.sink, &mut from));
        let debug = debug.transpose()?;
        Ok(Self { serial, console, debug, reads_stdin: from.stdin.0, raw: None })
    }

    /// A guest has them: the user's terminal is in raw mode.
    pub fn attach(&mut self) {
        if self.reads_stdin && self.raw.is_none() {
            self.raw = RawTerminal::enter();
        }
    }

    /// No guest has them: input is lost, and the user's terminal is as it was.
    pub fn detach(&mut self) {
        self.iter_mut().for_each(|console| console.end.disconnect());
        self.raw = None;
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Console> {
        [&mut self.serial, &mut self.console, &mut self.debug].into_iter().flatten()
    }
}

/// What consoles are opened with.
struct Origin<'a> {
    stdin: StdinOnce,
    threads: &'a Arc<dyn ThreadHook>,
}

/// Standard input goes to one console.
struct StdinOnce(bool);

impl StdinOnce {
    fn take(&mut self) -> Option<File> {
        if std::mem::replace(&mut self.0, true) {
            return None;
        }
        sys::duplicate(&io::stdin()).ok()
    }
}

impl Console {
    fn open(name: &'static str, sink: &Sink, from: &mut Origin<'_>) -> Result<Self, ConsoleError> {
        let threads = from.threads;
        let failed = |what| move |source| ConsoleError { name, what, source };
        match sink {
            Sink::Null => Self::silent().map_err(failed("set up")),
            Sink::Tty => {
                let out = sys::for_writing(&io::stdout()).map_err(failed("use the terminal for"))?;
                Self::with((name, threads), out, from.stdin.take(), None).map_err(failed("set up"))
            }
            Sink::File(path) => {
                let out = create(path).map_err(failed("open the file of"))?;
                Self::with((name, threads), out, None, None).map_err(failed("set up"))
            }
            Sink::Pty => {
                let pair = sys::open_pty().map_err(failed("create a pty for"))?;
                let out = pair.main.try_clone().map_err(failed("create a pty for"))?;
                let pty = Pty { path: pair.path, _other: pair.other };
                log::info!("{name}: {}", pty.path.display());
                Self::with((name, threads), out, Some(pair.main), Some(pty)).map_err(failed("set up"))
            }
        }
    }

    fn silent() -> io::Result<Self> {
        let end = End {
            sink: Arc::new(Discard),
            room: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            device: Mutex::default(),
        };
        Ok(Self { end: Arc::new(end), input: None, pty: None, _output: None })
    }

    fn with(
        (name, threads): (&str, &Arc<dyn ThreadHook>),
        out: File,
        input: Option<File>,
        pty: Option<Pty>,
    ) -> io::Result<Self> {
        let (output, ring) = OutputThread::start(name, out, threads)?;
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let end = Arc::new(End { sink: ring, room, device: Mutex::default() });
        Ok(Self { end, input, pty, _output: Some(output) })
    }

    /// Its outer end, for the device.
    pub fn end(&self) -> Arc<End> {
        Arc::clone(&self.end)
    }

    /// Where its input comes from; the caller reads it from now on.
    pub fn take_input(&mut self) -> Option<File> {
        self.input.take()
    }

    /// The terminal that a user attaches to.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_ref().map(|pty| pty.path.as_path())
    }
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    // A FIFO that nobody reads is refused rather than waited for.
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    file.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// A console cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {name}")]
pub struct ConsoleError {
    name: &'static str,
    what: &'static str,
    #[source]
    source: io::Error,
}
