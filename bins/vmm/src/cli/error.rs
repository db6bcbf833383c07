//! What is wrong with a command line.

use std::fmt;

use vmm_api::config::Fault;

/// The command line cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub enum UsageError {
    /// It does not consist of known flags with their values; the text says where and what would be right.
    Arguments(String),
    /// These flags have values that cannot be used.
    Faults(Vec<Fault>),
    /// It names neither a VM nor an API socket.
    NothingToDo,
}

/// The shortest command line that runs a VM, and the one that waits for commands.
const NOTHING_TO_DO: &str = "\
there is neither a VM to run nor an API socket to take commands from

  To run a VM:           vmm --kernel vmlinux --cmdline console=hvc0
  To wait for commands:  vmm --api-socket path=/tmp/vmm.sock

`vmm -h` explains the flags, `vmm doctor` checks this machine.";

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arguments(text) => f.write_str(text),
            Self::Faults(faults) => match faults.as_slice() {
                [fault] => fault.fmt(f),
                faults => {
                    write!(f, "{} faults on the command line:", faults.len())?;
                    faults.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
                }
            },
            Self::NothingToDo => f.write_str(NOTHING_TO_DO),
        }
    }
}

impl std::error::Error for UsageError {}
