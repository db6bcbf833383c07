//! Commands, wire types, HTTP server and client of the VMM's REST API.
//!
//! - [`command`]: what a command is, the table of commands, admission, replies.
//! - [`commands`]: the contract's commands.
//! - [`config`]: wire types of a VM's configuration. [`spec`]: its checked form.
//!   [`options`]: its form on the command line.
//! - [`events`]: what happens in the VMM, told to whoever watches.
//! - [`error`]: stable error codes and their forms on the wire.
//! - [`http`]: the server. [`client`]: the client.
//! - [`info`]: replies about the VMM and the VM. [`metrics`]: what it counts, as OpenMetrics text.
//! - [`progress`]: how far a migration is.
//! - [`socket`]: listening UNIX sockets with a path.
//! - [`openapi`]: the document of all this, and the page of error codes.

pub mod client;
pub mod command;
pub mod commands;
pub mod config;
pub mod error;
pub mod events;
pub mod http;
pub mod info;
pub mod metrics;
pub mod openapi;
pub mod options;
pub mod progress;
pub mod socket;
pub mod spec;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
