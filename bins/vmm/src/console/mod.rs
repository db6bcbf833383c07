//! Where consoles end outside the guest: terminal, file, pty, socket, nowhere.
//!
//! One function ([`Consoles::open`]) wires them for every boot of a VM, and they outlive a reboot. The guest
//! never waits: its output goes into a bounded ring, which a thread of its own writes out; input that the
//! device does not take stays here until it has room.

mod outlet;
mod output;
mod sys;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_api::socket::ListeningSocket;
use vmm_api::spec::{MachineSpec, Sink};
use vmm_device_model::thread::ThreadHook;
use vmm_platform_devices::output::{ByteSink, Discard, Notify};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use outlet::Outlet;
pub use outlet::{ClientInput, Link};
use output::OutputThread;
pub use sys::{RawTerminal, restore_terminal};
pub(crate) use sys::{for_writing, restore_terminal_in_handler};

/// Puts bytes into a device; returns how many it took.
pub type Enqueue = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;
/// Tells a device the columns and rows of its window.
pub type Resize = Box<dyn Fn(u16, u16) + Send + Sync>;

/// The inner end: a device.
struct Device {
    enqueue: Enqueue,
    /// Where it has a window.
    resize: Option<Resize>,
}

/// What tells the size of the window.
#[derive(Debug)]
enum Window {
    /// Nothing.
    Unknown,
    /// The terminal on standard output.
    Terminal,
    /// Our side of a pty.
    Pty(File),
}

/// The outer end of one console; devices of one boot after the other are connected to it.
pub struct End {
    sink: Arc<dyn ByteSink>,
    room: Arc<EventFd>,
    window: Window,
    device: Mutex<Option<Device>>,
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

    /// Columns and rows of the user's terminal or of the pty; 80 by 25 where there is none, or it does not know.
    pub fn size(&self) -> (u16, u16) {
        self.known_size().unwrap_or((80, 25))
    }

    fn known_size(&self) -> Option<(u16, u16)> {
        match &self.window {
            Window::Unknown => None,
            Window::Terminal => sys::window_size(&io::stdout()),
            Window::Pty(main) => sys::window_size(main),
        }
    }

    /// The window may have another size than the device knows. A pty's owner tells nobody (it is no terminal that
    /// controls us), so it is asked when something is typed.
    pub fn resized(&self) {
        if let Some((columns, rows)) = self.known_size()
            && let Some(Device { resize: Some(resize), .. }) = &*self.device()
        {
            resize(columns, rows);
        }
    }

    /// The eventfd behind [`room`](Self::room).
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn room_event(&self) -> io::Result<EventFd> {
        self.room.try_clone()
    }

    /// Input goes to this device from now on; it has no window.
    pub fn connect(&self, enqueue: Enqueue) {
        self.attach(Some(Device { enqueue, resize: None }));
    }

    /// Input goes to this device from now on, and changes of the window's size; it has got the [`size`](Self::size).
    pub fn connect_window(&self, enqueue: Enqueue, resize: Resize) {
        self.attach(Some(Device { enqueue, resize: Some(resize) }));
    }

    /// The device is gone: input is lost.
    pub fn disconnect(&self) {
        self.attach(None);
    }

    fn attach(&self, device: Option<Device>) {
        *self.device() = device;
        self.room.notify();
    }

    /// Gives `bytes` to the device; returns how many need not be kept. Without a device that is all.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        self.device().as_ref().map_or(bytes.len(), |device| (device.enqueue)(bytes))
    }

    fn device(&self) -> MutexGuard<'_, Option<Device>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a console's input comes from.
#[derive(Debug)]
pub enum InputSource {
    /// A terminal, pty or pipe.
    Stream(File),
    /// Clients of a socket.
    Clients {
        /// Where they come in.
        listener: UnixListener,
        /// Takes one of them at a time.
        link: Arc<Link>,
    },
}

/// One console with what it holds open.
#[derive(Debug)]
pub struct Console {
    end: Arc<End>,
    /// Where input comes from, until the control loop takes it.
    input: Option<InputSource>,
    place: Place,
    // Dropped last, it writes out what the guest said.
    _output: Option<OutputThread>,
}

/// What users find a console by.
#[derive(Debug)]
enum Place {
    /// Nothing that is ours.
    Elsewhere,
    /// The terminal that a user attaches to.
    Pty {
        path: PathBuf,
        /// Held open, so that the main side is never hung up while nobody is attached.
        _other: File,
    },
    /// The socket that clients connect to; its file goes with it.
    Socket { _socket: ListeningSocket },
}

/// What a console is made of.
struct Parts {
    outlet: Outlet,
    input: Option<InputSource>,
    place: Place,
    window: Window,
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

    /// A guest has them: the user's terminal is in raw mode, and a device that was restored learns the size of its window.
    ///
    /// What came while the device was being built was not taken, and is offered again.
    pub fn attach(&mut self) {
        self.resized();
        self.iter_mut().for_each(|console| console.end.room.notify());
        if self.reads_stdin && self.raw.is_none() {
            self.raw = RawTerminal::enter();
        }
    }

    /// No guest has them: input is lost, and the user's terminal is as it was.
    pub fn detach(&mut self) {
        self.iter_mut().for_each(|console| console.end.disconnect());
        self.raw = None;
    }

    /// The user's terminal may have another size.
    pub fn resized(&self) {
        let all = [&self.serial, &self.console, &self.debug].into_iter().flatten();
        all.for_each(|console| console.end.resized());
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
        let failed = |what| move |source| ConsoleError { name, what, source };
        let parts = match sink {
            Sink::Null => return Self::silent().map_err(failed("set up")),
            Sink::Tty => Parts::terminal(&mut from.stdin).map_err(failed("use the terminal for"))?,
            Sink::File(path) => Parts::file(path).map_err(failed("open the file of"))?,
            Sink::Pty => Parts::pty(name).map_err(failed("create a pty for"))?,
            Sink::Socket(path) => Parts::socket(path).map_err(failed("create the socket of"))?,
        };
        Self::with(name, parts, from.threads).map_err(failed("set up"))
    }

    fn silent() -> io::Result<Self> {
        let end = End {
            sink: Arc::new(Discard),
            room: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            window: Window::Unknown,
            device: Mutex::default(),
        };
        Ok(Self { end: Arc::new(end), input: None, place: Place::Elsewhere, _output: None })
    }

    fn with(name: &str, parts: Parts, threads: &Arc<dyn ThreadHook>) -> io::Result<Self> {
        let Parts { outlet, input, place, window } = parts;
        let (output, ring) = OutputThread::start(name, outlet, threads)?;
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let end = Arc::new(End { sink: ring, room, window, device: Mutex::default() });
        Ok(Self { end, input, place, _output: Some(output) })
    }

    /// Its outer end, for the device.
    pub fn end(&self) -> Arc<End> {
        Arc::clone(&self.end)
    }

    /// Where its input comes from; the caller reads it from now on.
    pub fn take_input(&mut self) -> Option<InputSource> {
        self.input.take()
    }

    /// The terminal that a user attaches to.
    pub fn pty_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Pty { path, .. } => Some(path),
            Place::Elsewhere | Place::Socket { .. } => None,
        }
    }
}

impl Parts {
    fn terminal(stdin: &mut StdinOnce) -> io::Result<Self> {
        Ok(Self {
            outlet: Outlet::Fixed(Arc::new(for_writing(&io::stdout())?)),
            input: stdin.take().map(InputSource::Stream),
            place: Place::Elsewhere,
            window: Window::Terminal,
        })
    }

    fn file(path: &Path) -> io::Result<Self> {
        let outlet = Outlet::Fixed(Arc::new(create(path)?));
        Ok(Self { outlet, input: None, place: Place::Elsewhere, window: Window::Unknown })
    }

    fn pty(name: &str) -> io::Result<Self> {
        let pair = sys::open_pty()?;
        log::info!("{name}: {}", pair.path.display());
        Ok(Self {
            outlet: Outlet::Fixed(Arc::new(pair.main.try_clone()?)),
            window: Window::Pty(pair.main.try_clone()?),
            input: Some(InputSource::Stream(pair.main)),
            place: Place::Pty { path: pair.path, _other: pair.other },
        })
    }

    fn socket(path: &Path) -> io::Result<Self> {
        let socket = ListeningSocket::bind(path).map_err(io::Error::other)?;
        let link = Link::new()?;
        Ok(Self {
            outlet: Outlet::Client(Arc::clone(&link)),
            input: Some(InputSource::Clients { listener: socket.listener().try_clone()?, link }),
            place: Place::Socket { _socket: socket },
            window: Window::Unknown,
        })
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
