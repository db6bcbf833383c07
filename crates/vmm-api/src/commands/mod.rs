//! The commands of the contract: those that are built, each a type, and those that are not yet, as one list.

pub mod later;
pub mod vm;
pub mod vmm;

use crate::command::{Endpoint, Handle};

/// Declares a command: `name, Request => Reply, "route", method, action, "doc"`.
macro_rules! command {
    ($(#[doc = $text:literal])* $name:ident($request:ty) -> $reply:ty, $method:ident $route:literal, $action:ident) => {
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
        }
    };
}
pub(crate) use command;

/// A host of every command that is built.
pub trait HandleAll:
    Handle<vmm::Ping>
    + Handle<vmm::Shutdown>
    + Handle<vm::Create>
    + Handle<vm::Boot>
    + Handle<vm::Info>
    + Handle<vm::Shutdown>
    + Handle<vm::Reboot>
    + Handle<vm::Delete>
    + Handle<vm::Pause>
    + Handle<vm::Resume>
{
}

impl<H> HandleAll for H where
    H: Handle<vmm::Ping>
        + Handle<vmm::Shutdown>
        + Handle<vm::Create>
        + Handle<vm::Boot>
        + Handle<vm::Info>
        + Handle<vm::Shutdown>
        + Handle<vm::Reboot>
        + Handle<vm::Delete>
        + Handle<vm::Pause>
        + Handle<vm::Resume>
{
}

/// The command table of a host: `static TABLE: [Endpoint<Vmm>; 10] = table();`.
#[must_use]
pub const fn table<H: HandleAll + 'static>() -> [Endpoint<H>; 10] {
    [
        Endpoint::of::<vmm::Ping>(),
        Endpoint::of::<vmm::Shutdown>(),
        Endpoint::of::<vm::Create>(),
        Endpoint::of::<vm::Boot>(),
        Endpoint::of::<vm::Info>(),
        Endpoint::of::<vm::Shutdown>(),
        Endpoint::of::<vm::Reboot>(),
        Endpoint::of::<vm::Delete>(),
        Endpoint::of::<vm::Pause>(),
        Endpoint::of::<vm::Resume>(),
    ]
}
