//! Post-copy: the guest goes on at the destination before all of its memory is there.
//!
//! | module | thread | what |
//! |---|---|---|
//! | `opening` | `migration-join` | opens the connection for wanted memory, and finds the way again after a lost link |
//! | `supplying` | `migration` | drives the source's end after the hand-over |
//! | `pushing` | `migration-out`, `migration-want` | sends what is owed, what is wanted first |
//! | `owed` | | what that is |
//! | `filling` | `migration` | drives the destination's end |
//! | `arriving` | `migration-in` | memory that lands under a guest that runs |
//! | `wanting` | `migration-fault` | asks for what the guest waits for |

pub(super) mod arriving;
pub(super) mod filling;
pub(super) mod opening;
pub(super) mod owed;
pub(super) mod pushing;
pub(super) mod supplying;
pub(super) mod wanting;

use vmm_migration_protocol::Failure;

/// What a source tells of memory that it owes.
#[derive(Debug)]
pub enum SupplyStep {
    /// So many bytes of memory are owed, and so many have been on the link.
    Owes(u64, u64),
    /// The link is lost, and the guest stands still at the destination.
    Severed(Failure),
    /// The link is there again.
    Restored,
    /// The way is not looked for any more, until an operator wants it.
    Stranded(Failure),
}

/// What a destination asks and tells of memory that is to come.
#[derive(Debug)]
pub enum FillStep {
    /// Keep the guest from running, and wait for nobody; answer with Done or Failed.
    Hold,
    /// Let it go on; answer likewise.
    Release,
    /// So many bytes are absent.
    Lacks(u64),
    /// The link is lost.
    Severed(Failure),
    /// The guest goes on.
    Restored,
    /// All of memory is there; why the guest does not go on, if it does not.
    Whole(Option<vmm_migration_protocol::Fault>),
}
