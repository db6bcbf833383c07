//! The bundled VMM: the only place that names every crate.
//!
//! [`cli`] says what to do, [`run`] sets threads and sockets up, [`vmm`] is the state that the control thread
//! owns, [`machine`] is where all parts of a guest's machine meet.

pub mod boot_trace;
pub mod cli;
pub mod console;
pub mod ctl;
pub mod doctor;
pub mod events;
pub mod exit;
pub mod logger;
mod lost_memory;
pub mod machine;
pub mod metrics;
pub mod preflight;
mod progress;
pub mod run;
pub mod sandbox;
pub mod signals;
pub mod snapshot;
pub mod validate;
pub mod vmm;
