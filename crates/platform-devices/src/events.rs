//! What a guest asks of its machine (reset, power-off), and what it says of itself (panic).

use std::fmt;

/// Takes the guest's requests and reports to the thread that owns the VM. Called by vCPU threads under a device's
/// lock: it posts, and never blocks.
pub trait SystemEvents: Send + Sync + fmt::Debug {
    /// Posts a request. One that repeats another still waiting may be merged with it.
    fn request(&self, event: SystemEvent);
}

/// A guest's request or report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SystemEvent {
    /// Start again from power-on.
    Reset(Cause),
    /// Power off.
    Shutdown(Cause),
    /// Its kernel panicked and does nothing about it. It runs on, to halt or to reset itself.
    Panicked,
    /// Its kernel panicked and a crash kernel takes over: to be told, and nothing else.
    CrashLoaded,
}

/// Through which device the guest asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// Command 0xfe of the keyboard controller.
    I8042,
    /// The ACPI reset register.
    AcpiReset,
    /// The ACPI sleep control register, sleep type S5.
    AcpiSleep,
    /// The event register of pvpanic.
    PvPanic,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I8042 => "keyboard controller",
            Self::AcpiReset => "ACPI reset register",
            Self::AcpiSleep => "ACPI sleep control register",
            Self::PvPanic => "pvpanic device",
        })
    }
}

impl fmt::Display for SystemEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(cause) => write!(f, "reset by the {cause}"),
            Self::Shutdown(cause) => write!(f, "shutdown by the {cause}"),
            Self::Panicked => f.write_str("kernel panic"),
            Self::CrashLoaded => f.write_str("kernel panic, which a crash kernel handles"),
        }
    }
}
