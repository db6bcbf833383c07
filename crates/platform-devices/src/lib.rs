#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod clock;
pub mod cmos;
pub mod debug_port;
pub mod events;
pub mod ged;
pub mod i8042;
pub mod ioapic;
pub mod output;
pub mod pm_timer;
pub mod pvpanic;
pub mod registers;
pub mod serial;
pub mod testing;
pub mod vm_generation;
