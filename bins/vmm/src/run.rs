//! One run of the VMM: threads, sockets and signals around the control loop.

use std::sync::Arc;

use vmm_api::command::ApiRequest;
use vmm_api::commands::vm;
use vmm_api::events::{Event, EventRoute, Journal};
use vmm_api::http::{self, ApiSocket, Board, Counts, Server, ServerError, ServerHandle, SocketError};
use vmm_device_model::thread::ThreadHook;
use vmm_epoll::{ControlLoop, LoopError, Mailbox, mailbox};
use vmm_hypervisor::kvm::{Kvm, OpenError};

use crate::boot_trace::{Startup, TraceFileError};
use crate::cli::{ApiSocketArg, RunOptions};
use crate::console::restore_terminal;
use crate::events::{Events, Monitor, MonitorError, MonitorTarget, NO_MACHINE};
use crate::exit::ExitCode;
use crate::logger::LogPlace;
use crate::sandbox::{API_THREAD, CONTROL_THREAD, PathPolicy, Sandbox, filters, report_violations};
use crate::signals::{self, SignalError};
use crate::vmm::{Policy, TABLE, Vmm, VmmError};

/// What holds for the whole process from its first moment: files are the user's own, threads share a heap, a panic, crash
/// or forbidden system call restores the terminal, and a panic or such a call says where it happened.
///
/// # Errors
/// The signal of a forbidden system call cannot be received.
pub fn confine(log: LogPlace) -> Result<(), RunError> {
    signals::private_files();
    signals::one_heap();
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        report(info);
    }));
    signals::restore_terminal_in_crashes();
    report_violations(log).map_err(RunError::Violations)
}

/// Runs until the guest, a client or a signal ends it.
///
/// # Errors
/// The VMM cannot be set up, or the VM of the command line does not boot.
pub fn run(options: RunOptions, mut startup: Startup) -> Result<ExitCode, RunError> {
    // SIGPIPE is ignored by the runtime; what comes here is asked for by the user.
    let signals = signals::block()?;
    let threads = filters::hook(options.seccomp);
    let (events, monitor) = start_events(options.event_monitor.as_ref(), &threads)?;
    if let Some(path) = &options.boot_trace {
        startup.write_to(path)?;
    }
    let hypervisor = Arc::new(startup.time("kvm", Kvm::open)?);
    startup.publish();
    let (post, machines) = mailbox().map_err(RunError::Mailbox)?;
    let (requests, inbox) = mailbox::<ApiRequest<Vmm>>().map_err(RunError::Mailbox)?;
    let (stream, board) = (events.stream(), Board::new());
    let server = options
        .api_socket
        .map(|socket| {
            serve(socket, requests, (stream, board.clone()), options.unknown_fields, Arc::clone(&threads))
        })
        .transpose()?;
    let (server, answers) = server.unzip();

    let policy = Policy {
        serves_clients: server.is_some(),
        verify_state: options.verify_state,
        reactions: options.reactions,
    };
    let paths = match (&server, options.no_landlock) {
        (Some(_), _) => PathPolicy::AsConfigured,
        (None, false) => PathPolicy::Always,
        (None, true) => PathPolicy::Never,
    };
    let sandbox = Sandbox::new(Arc::clone(&threads), paths);
    let mut vmm = Vmm::new(hypervisor, post, policy, events.clone()).confined(sandbox);
    if let Some(answers) = answers {
        vmm.serve(answers, board);
    }
    let mut control_loop = ControlLoop::new(vmm)?;
    control_loop.on_error(|_, error| log::error!("{}", crate::exit::chain(error)));
    control_loop.control(|_, control| -> Result<(), LoopError> {
        control.add_mailbox("machine", machines, |vmm, control, message| {
            vmm.machine_says(message);
            vmm.settle(control);
            Ok(())
        })?;
        control.add_mailbox("api", inbox, |vmm, control, request: ApiRequest<Vmm>| {
            request.dispatch(vmm);
            vmm.settle(control);
            Ok(())
        })?;
        control.add_fd("signals", signals, |vmm, control, signals, _| {
            for signal in signals::take(signals)? {
                if signal == signals::WINDOW_CHANGED {
                    vmm.window_changed();
                } else {
                    log::info!("ended by signal {signal}");
                    vmm.end(ExitCode::Success);
                }
            }
            vmm.settle(control);
            Ok(())
        })?;
        Ok(())
    })?;
    threads.begin(CONTROL_THREAD).map_err(RunError::Confine)?;
    events.tell(NO_MACHINE, &Event::VmmStarted);
    if let Some(checked) = options.config {
        control_loop.control(|vmm, control| {
            vmm.create(checked);
            vmm.boot_at_start();
            vmm.settle(control);
        });
    }
    if let Some(restore) = options.restore {
        control_loop.control(|vmm, control| {
            vmm.restore_at_start(restore);
            vmm.settle(control);
        });
    }
    control_loop.run()?;
    let failure = control_loop.control(|vmm, _| vmm.take_failure());
    let code = control_loop.state().ending().unwrap_or(ExitCode::Success);
    // First the loop, so that whoever waits is answered; then the server, which sends the answers.
    drop(control_loop);
    if let Some(server) = server {
        server.stop();
    }
    drop(monitor);
    failure.map_or(Ok(code), |error| Err(error.into()))
}

/// The event monitor first of all, so that it tells of everything.
fn start_events(
    target: Option<&MonitorTarget>,
    threads: &Arc<dyn ThreadHook>,
) -> Result<(Events, Option<Monitor>), MonitorError> {
    let journal = target.map(|_| Journal::default());
    let events = Events::new().with_monitor(journal.clone());
    let start = |(target, journal)| Monitor::start(target, journal, threads);
    let monitor = target.zip(journal).map(start).transpose()?;
    events.tell(NO_MACHINE, &Event::VmmStarting { version: env!("CARGO_PKG_VERSION").into() });
    Ok((events, monitor))
}

fn serve(
    socket: ApiSocketArg,
    requests: Mailbox<ApiRequest<Vmm>>,
    (events, info): (Journal, Board<vm::Info>),
    unknown_fields: vmm_api::config::UnknownFields,
    threads: Arc<dyn ThreadHook>,
) -> Result<(ServerHandle, Arc<Counts>), RunError> {
    let socket = match socket {
        ApiSocketArg::Path(path) => ApiSocket::bind(&path)?,
        ApiSocketArg::Fd(fd) => {
            let inherited = signals::inherited(fd);
            ApiSocket::from_fd(inherited.map_err(|source| RunError::Descriptor { fd, source })?)?
        }
    };
    let config = http::Config { unknown_fields, ..http::Config::default() };
    let server =
        Server::new(socket, &TABLE, requests, config)?.with_stream(EventRoute(events)).with_board(info);
    let counts = server.counts();
    Ok((server.start(move || threads.begin(API_THREAD))?, counts))
}

/// The VMM cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[from] SignalError),
    /// The signal of a forbidden system call cannot be received.
    #[error("cannot receive SIGSYS")]
    Violations(#[source] std::io::Error),
    /// The control thread cannot be confined.
    #[error("cannot confine the control thread (`--seccomp false` runs without filters)")]
    Confine(#[source] std::io::Error),
    /// The event monitor cannot be set up.
    #[error("event monitor")]
    Monitor(#[from] MonitorError),
    /// KVM cannot be used.
    #[error("cannot use KVM (`vmm doctor` says what this host lacks)")]
    Kvm(#[from] OpenError),
    /// The file for boot traces cannot be used.
    #[error(transparent)]
    BootTrace(#[from] TraceFileError),
    /// A mailbox cannot be made.
    #[error("cannot create a mailbox")]
    Mailbox(#[source] std::io::Error),
    /// The API socket's descriptor is not one that was passed.
    #[error("cannot take descriptor {fd} as the API socket")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The API socket cannot be used.
    #[error("API socket")]
    Socket(#[from] SocketError),
    /// The API server cannot be set up.
    #[error("API server")]
    Server(#[from] ServerError),
    /// The control loop cannot be set up or failed.
    #[error("control loop")]
    Loop(#[from] LoopError),
    /// The VM of the command line does not boot.
    #[error("the VM does not boot")]
    Boot(#[from] VmmError),
}
