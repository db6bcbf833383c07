//! What happens in the VMM, told to whoever watches.
//!
//! There are two audiences. The *event monitor* of the contract (`--event-monitor`) gets the events that its readers
//! know, in the form that they know. The *stream* of the API (`vmm.events`) gets all of them, numbered, with
//! their causes. [`Event`] is the one list of both; `docs/events.md` is made from it.
//!
//! A [`Journal`] keeps the newest encoded events for readers of any speed: whoever tells an event never waits, and a
//! reader that is too slow loses the oldest and learns how many.
//!
//! An event never holds guest data or secrets: no command lines, no paths. Its texts are names, cut to
//! [`Text::MOST`] bytes, so a line stays under [`LINE_MOST`] bytes.

mod docs;
mod event;
mod form;
mod journal;
mod received;
mod stream;

pub use docs::events_markdown;
pub use event::{
    CrashReason, Event, ExitCause, ExitVia, JobOutcome, Kind, PanicEvent, Property, RebootCause, Text,
};
pub use form::{LINE_MOST, Stamp, monitor_line, stream_line};
pub use journal::{Bounds, Journal, Taken};
pub use received::{Received, StreamItem, Time};
pub use stream::{EVENTS_ROUTE, EventRoute};
