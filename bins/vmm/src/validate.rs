//! `vmm validate`: a configuration against this build and this host.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use vmm_api::command::{Decode, Incoming};
use vmm_api::commands::vm::ValidateRequest;
use vmm_api::config::MAX_DOCUMENT;
use vmm_api::info::ValidateReply;
use vmm_hypervisor::Hypervisor;
use vmm_hypervisor::kvm::Kvm;

use crate::exit::{ExitCode, report};
use crate::preflight;

/// Checks the file, or standard input, and prints what stands against its boot.
pub fn run(file: Option<&Path>, json: bool) -> ExitCode {
    match check(file) {
        Ok(reply) => {
            let text = if json { as_json(&reply) } else { as_text(&reply) };
            // Nobody may be listening any more.
            let _ = io::stdout().write_all(text.as_bytes());
            if reply.valid { ExitCode::Success } else { ExitCode::VmmError }
        }
        Err(text) => {
            let _ = writeln!(io::stderr(), "{text}");
            ExitCode::VmmError
        }
    }
}

fn check(file: Option<&Path>) -> Result<ValidateReply, String> {
    let name = file.map_or("standard input".to_owned(), |file| file.display().to_string());
    let unreadable = |error: io::Error| format!("error: cannot read {name}\n  caused by: {error}");
    let body = document(file).map_err(unreadable)?;
    let request = ValidateRequest::decode(Incoming { body, ..Incoming::default() });
    let request = request.map_err(|error| format!("error: {name}: {error}"))?;
    // Without KVM there is no limit to hold against the document; `vmm doctor` tells of KVM.
    let most_vcpus = Kvm::open().map_or(u32::MAX, |kvm| kvm.max_vcpus());
    Ok(preflight::report(request, most_vcpus))
}

/// The content of a file, or of standard input; of one that is too long for a document, a byte more than may be.
pub(crate) fn document(file: Option<&Path>) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    let most = MAX_DOCUMENT as u64 + 1;
    match file {
        Some(file) => File::open(file)?.take(most).read_to_end(&mut body)?,
        None => io::stdin().lock().take(most).read_to_end(&mut body)?,
    };
    Ok(body)
}

fn as_json(reply: &ValidateReply) -> String {
    match serde_json::to_string_pretty(reply) {
        Ok(text) => text + "\n",
        Err(error) => report(&error),
    }
}

/// What stands against the boot, one a line.
pub(crate) fn as_text(reply: &ValidateReply) -> String {
    let lines = |word: &str, list: &[vmm_api::error::FaultReport]| -> String {
        list.iter().map(|fault| format!("{word}: {}: {}\n", fault.path, fault.message)).collect()
    };
    let end = if reply.valid { "valid\n" } else { "" };
    lines("error", &reply.faults) + &lines("warning", &reply.warnings) + end
}
