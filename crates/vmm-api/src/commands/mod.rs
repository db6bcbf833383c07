//! The commands: every route of the contract and our own, each a type.

pub mod device;
pub mod vm;
pub mod vmm;

use crate::command::{Endpoint, Handle};
use crate::openapi::Operation;

/// Declares a command: `name(Request) -> Reply, Method "route", Action`, and the codes it can fail with.
macro_rules! command {
    ($(#[doc = $text:literal])* $name:ident($request:ty) -> $reply:ty, $method:ident $route:literal, $action:ident $(, $failure:ident)*) => {
        $(#[doc = $text])*
        #[derive(Clone, Copy, Debug)]
        pub enum $name {}

        impl $crate::command::Command for $name {
            type Request = $request;
            type Reply = $reply;
            const NAME: &'static str = $route;
            const METHOD: $crate::command::Method = $crate::command::Method::$method;
            const ACTION: vmm_state::Action = vmm_state::Action::$action;
            const DOC: &'static str = concat!($($text),*).trim_ascii_start();
            const FAILURES: &'static [$crate::error::Code] = &[$($crate::error::Code::$failure),*];
        }
    };
}
pub(crate) use command;

/// Lists the commands: those whose work is built, then those that are answered with `not_built`. The only such list.
macro_rules! commands {
    (built { $($built:path,)+ } later { $($later:path,)+ }) => {
        /// A host of every command that is built.
        pub trait HandleAll: $(Handle<$built> +)+ {}

        impl<H> HandleAll for H where H: $(Handle<$built> +)+ {}

        /// How many commands there are.
        pub const COUNT: usize = [$(stringify!($built),)+ $(stringify!($later),)+].len();

        /// The command table of a host: `static TABLE: [Endpoint<Vmm>; COUNT] = table();`.
        #[must_use]
        pub const fn table<H: HandleAll + 'static>() -> [Endpoint<H>; COUNT] {
            [$(Endpoint::of::<$built>(),)+ $(Endpoint::later::<$later>(),)+]
        }

        /// Every command as data, for documents.
        #[must_use]
        pub const fn operations() -> [Operation; COUNT] {
            [$(Operation::of::<$built>(),)+ $(Operation::of::<$later>(),)+]
        }
    };
}

commands! {
    built {
        vmm::Ping,
        vmm::Shutdown,
        vmm::OpenApi,
        vmm::Metrics,
        vmm::LogLevel,
        vmm::SetLogLevel,
        vm::Create,
        vm::Validate,
        vm::Boot,
        vm::Info,
        vm::Counters,
        vm::BootTrace,
        vm::Shutdown,
        vm::Reboot,
        vm::Delete,
        vm::Pause,
        vm::Resume,
        vm::Snapshot,
        vm::Restore,
        vm::Cancel,
        vm::ReceiveMigration,
        vm::SendMigration,
        vm::MigrationProgress,
        vm::MigrationKeep,
        vm::MigrationYield,
        vm::PowerButton,
        vm::Nmi,
        device::AddDevice,
        device::AddUserDevice,
        device::AddDisk,
        device::AddFs,
        device::AddGenericVhostUser,
        device::AddPmem,
        device::AddNet,
        device::AddVdpa,
        device::AddVsock,
        device::RemoveDevice,
    }
    later {
        vm::Resize,
        vm::ResizeDisk,
        vm::ResizeZone,
        vm::Coredump,
    }
}
