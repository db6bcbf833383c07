//! The REST API over HTTP/1.1 on a UNIX socket.
//!
//! [`parser`] and [`response`] are pure: bytes in, a request or an error out, and back. [`Server`] moves the bytes: one
//! thread, many connections, every one of them bounded in bytes, descriptors and time. It decodes requests, posts them
//! to the host's mailbox and goes on; it never waits for the host. Answers that go on are [`stream`]s.

pub mod board;
mod connection;
pub mod counts;
pub(crate) mod descriptors;
pub mod parser;
pub mod response;
pub mod route;
mod server;
mod socket;
pub mod stream;

pub use board::Board;
pub use counts::Counts;
pub use server::{Config, Server, ServerError, ServerHandle};
pub use socket::{ApiSocket, SocketError};
