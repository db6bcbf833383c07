//! The control loop: one thread, one state, typed event sources.
//!
//! [`ControlLoop<S>`] owns a state `S` and waits (with epoll, through the `event-manager` crate) for its sources:
//! eventfds, readable descriptors, timers and [`Mailbox`]es. A source's handler gets `&mut S` and a [`Control`], with
//! which it may add, remove, mask and re-arm sources, or stop the loop. There is no lock: whatever the handlers touch
//! lives on the loop's thread.
//!
//! What the loop guarantees:
//! - A handler's error never ends the loop; it goes to the error hook, and the other sources go on.
//! - An eventfd, timer or mailbox is always consumed when it fires, whatever the handler does: no spinning.
//! - A mailbox hands over everything that is queued, not one message per wake-up.
//! - A removed or masked source never fires again, not even for an event that was already fetched.
//! - A descriptor at its end (end of file, hang-up, error) is told to its handler once and is then gone.
//! - A stale token is ignored, an interrupted wait is repeated.
//!
//! ```
//! use vmm_epoll::{ControlLoop, mailbox};
//!
//! let (post, inbox) = mailbox::<u32>()?;
//! let mut control_loop = ControlLoop::new(0)?;
//! control_loop.control(|_sum, control| {
//!     control.add_mailbox("numbers", inbox, |sum, control, number| {
//!         *sum += number;
//!         if number == 0 {
//!             control.stop();
//!         }
//!         Ok(())
//!     })
//! })?;
//! let sender = std::thread::spawn(move || [1, 2, 0].map(|number| post.send(number).is_ok()));
//! control_loop.run()?;
//! assert_eq!(*control_loop.state(), 3);
//! # sender.join().unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod control;
mod error;
mod mailbox;
mod run;
mod source;

pub use control::Control;
pub use error::{HandlerError, LoopError, SourceError};
pub use mailbox::{Inbox, Mailbox, Undelivered, mailbox};
pub use run::{ControlLoop, Stopper};
pub use source::{Input, Readiness, SourceId};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
