//! The subcommands that are one command of the API each.

use std::fmt;
use std::path::PathBuf;

use clap::{Arg, ArgMatches};
use vmm_api::client::ClientError;
use vmm_api::command::{Command, Decode, Encode, Incoming, Method};
use vmm_api::commands::{device, vm, vmm};
use vmm_api::config::{Fault, FaultKind, UnknownFields};

use crate::exit::ExitCode;

/// A command of the API that can be given on the command line.
pub(super) trait Subcommand: Command {
    /// The subcommand; two commands may share one, and differ in when they apply.
    const WORD: &'static str;

    /// What it takes.
    fn arguments() -> Vec<Arg>;

    /// Whether these arguments mean this command.
    fn applies(given: &ArgMatches) -> bool;

    /// The request that the arguments mean.
    fn request(given: &ArgMatches) -> Result<Ask<Self::Request>, Vec<Fault>>;

    /// The reply, for people.
    fn show(reply: Self::Reply) -> Shown;
}

/// What is sent.
pub(super) enum Ask<R> {
    /// A request that was made here, and the numbers of descriptors that go with it.
    Made(R, Vec<i32>),
    /// A document that the VMM is to judge: a file, or standard input.
    Document(Option<PathBuf>),
}

/// A reply, for people.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    /// What is printed.
    pub(super) text: String,
    /// Whether the answer is the one that was hoped for.
    pub(super) success: bool,
}

impl Shown {
    /// Says what is there.
    pub(super) fn text(text: String) -> Self {
        Self { text, success: true }
    }

    pub(super) fn code(&self) -> ExitCode {
        if self.success { ExitCode::Success } else { ExitCode::VmmError }
    }
}

/// A request as bytes.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(super) body: Body,
    /// Descriptors that were passed to this process.
    pub(super) fds: Vec<i32>,
}

/// A request's body.
#[derive(Debug)]
pub(crate) enum Body {
    /// As it was made here.
    Bytes(Vec<u8>),
    /// As a file or standard input holds it.
    File(Option<PathBuf>),
}

/// A subcommand, its types erased.
pub struct Row {
    /// The subcommand.
    pub word: &'static str,
    /// The command of the API.
    pub name: &'static str,
    /// Its method.
    pub method: Method,
    /// One sentence about it.
    pub doc: &'static str,
    arguments: fn() -> Vec<Arg>,
    applies: fn(&ArgMatches) -> bool,
    payload: fn(&ArgMatches) -> Result<Payload, Vec<Fault>>,
    show: fn(Vec<u8>) -> Result<Shown, ClientError>,
}

impl Row {
    const fn of<C: Subcommand>() -> Self {
        Self {
            word: C::WORD,
            name: C::NAME,
            method: C::METHOD,
            doc: C::DOC,
            arguments: C::arguments,
            applies: C::applies,
            payload: payload::<C>,
            show: show::<C>,
        }
    }

    /// What it takes.
    pub(super) fn arguments(&self) -> Vec<Arg> {
        (self.arguments)()
    }

    /// Whether these arguments mean this row.
    pub(super) fn applies(&self, given: &ArgMatches) -> bool {
        (self.applies)(given)
    }

    /// The request that the arguments mean, or what is wrong with them.
    pub(super) fn payload(&self, given: &ArgMatches) -> Result<Payload, Vec<Fault>> {
        (self.payload)(given)
    }

    /// The reply, for people.
    pub(super) fn show(&self, body: Vec<u8>) -> Result<Shown, ClientError> {
        (self.show)(body)
    }
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {})", self.word, self.method.name(), self.name)
    }
}

fn payload<C: Subcommand>(given: &ArgMatches) -> Result<Payload, Vec<Fault>> {
    match C::request(given)? {
        Ask::Document(file) => Ok(Payload { body: Body::File(file), fds: Vec::new() }),
        Ask::Made(request, fds) => {
            let body = request.encode();
            let body = body.map_err(|error| vec![Fault::new(C::WORD, FaultKind::Invalid, error.to_string())]);
            Ok(Payload { body: Body::Bytes(body?), fds })
        }
    }
}

fn show<C: Subcommand>(body: Vec<u8>) -> Result<Shown, ClientError> {
    // A newer VMM may say more than this client knows.
    let unknown_fields = UnknownFields::Warn;
    match C::Reply::decode(Incoming { body, fds: Vec::new(), unknown_fields }) {
        Ok(reply) => Ok(C::show(reply)),
        Err(error) => Err(ClientError::Answer { name: C::NAME.to_owned(), what: error.to_string() }),
    }
}

/// Every command of the API, in the order of the help.
pub static ROWS: &[Row] = &[
    Row::of::<vmm::Ping>(),
    Row::of::<vm::Create>(),
    Row::of::<vm::Validate>(),
    Row::of::<vm::Boot>(),
    Row::of::<vm::Info>(),
    Row::of::<vm::Counters>(),
    Row::of::<vmm::Metrics>(),
    Row::of::<vm::Pause>(),
    Row::of::<vm::Resume>(),
    Row::of::<vm::Shutdown>(),
    Row::of::<vm::Reboot>(),
    Row::of::<vm::Delete>(),
    Row::of::<vm::PowerButton>(),
    Row::of::<vm::Nmi>(),
    Row::of::<vm::Resize>(),
    Row::of::<vm::ResizeDisk>(),
    Row::of::<vm::ResizeZone>(),
    Row::of::<device::AddDevice>(),
    Row::of::<device::AddDisk>(),
    Row::of::<device::AddFs>(),
    Row::of::<device::AddGenericVhostUser>(),
    Row::of::<device::AddNet>(),
    Row::of::<device::AddPmem>(),
    Row::of::<device::AddUserDevice>(),
    Row::of::<device::AddVdpa>(),
    Row::of::<device::AddVsock>(),
    Row::of::<device::RemoveDevice>(),
    Row::of::<vm::Snapshot>(),
    Row::of::<vm::Cancel>(),
    Row::of::<vm::Restore>(),
    Row::of::<vm::Coredump>(),
    Row::of::<vm::SendMigration>(),
    Row::of::<vm::ReceiveMigration>(),
    Row::of::<vm::MigrationProgress>(),
    Row::of::<vm::MigrationKeep>(),
    Row::of::<vm::MigrationYield>(),
    Row::of::<vmm::LogLevel>(),
    Row::of::<vmm::SetLogLevel>(),
    Row::of::<vm::BootTrace>(),
    Row::of::<vmm::OpenApi>(),
    Row::of::<vmm::Shutdown>(),
];
