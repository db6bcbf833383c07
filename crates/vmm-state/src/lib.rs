//! The life cycle of a virtual machine, as one table.
//!
//! A VMM process holds at most one VM. [`Phase`] says how far it is; [`VmSlot`] is the variable that holds it and whose
//! variants carry what exists in that phase, so that no second flag can disagree. What a client may ask
//! ([`Action`]) and what a guest may do ([`GuestEvent`]) in each phase is data: [`ACTIONS`] and [`GUEST_EVENTS`]. What
//! follows a guest event is the operator's choice ([`Reactions`]). [`admit`] and [`on_guest_event`] read that data, and so
//! does [`lifecycle_markdown`], which writes `docs/lifecycle.md`.
//!
//! This crate is pure: it has no clock, no thread, no file. It decides; the owner of the VM acts, then reports the
//! outcome by moving the slot.
//!
//! ```
//! use vmm_state::{Action, Admission, Phase, VmSlot, admit};
//!
//! let mut slot: VmSlot<&str, &str> = VmSlot::Empty;
//! assert!(matches!(admit(slot.phase(), Action::Create), Admission::Run(_)));
//! slot.create("config").unwrap();
//! slot.begin_boot().unwrap();
//! assert_eq!(slot.phase(), Phase::Booting);
//! slot.start("machine").unwrap();
//! assert_eq!(slot.phase(), Phase::Running);
//! assert!(matches!(admit(slot.phase(), Action::Create), Admission::Refused(_)));
//! ```

#![forbid(unsafe_code)]

mod docs;
mod guest;
mod phase;
mod slot;
mod table;

pub use docs::lifecycle_markdown;
pub use guest::{EventCell, EventRow, GUEST_EVENTS, GuestEvent, Reaction, Reactions, on_guest_event};
pub use phase::{Phase, PhaseSet};
pub use slot::{Guest, Idle, Misplaced, VmSlot};
pub use table::{ACTIONS, Action, ActionRow, Admission, Cell, Reason, Refusal, Step, admit};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
