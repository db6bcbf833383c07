//! What each error code means, and the page that lists them.

use crate::error::{Code, reason_phrase};
use std::fmt::Write as _;

impl Code {
    /// When a request is answered so, as a sentence.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::NoVm => "There is no VM.",
            Self::VmExists => "There is a VM already.",
            Self::WrongPhase => "The VM's phase does not allow the request.",
            Self::NoDevice => "The VM has no device of this id.",
            Self::DeviceExists => "The VM has a device of this id already, or the only one of its kind.",
            Self::FixedDevice => "The device is a fixed part of the machine.",
            Self::UnknownRoute => "There is no such path.",
            Self::MethodNotAllowed => "The path takes another method.",
            Self::MalformedRequest => "The request is not HTTP as this server reads it.",
            Self::MalformedBody => "The body is not JSON, or not of the types that the request has.",
            Self::UnknownField => "The body has a name that the request does not have.",
            Self::InvalidConfig => "The body is well formed, but what it says cannot be.",
            Self::RequestTimeout => "The request did not arrive in time.",
            Self::LengthRequired => "The request is chunked.",
            Self::BodyTooLarge => "The body is larger than 1 MiB.",
            Self::ExpectationFailed => "The header `Expect` asks for something else than `100-continue`.",
            Self::HeadTooLarge => {
                "The request line and headers are larger than 16 KiB, or more than 64 headers."
            }
            Self::TooManyDescriptors => "More than 64 file descriptors came with the request.",
            Self::GuestBusy => "The guest has not finished an earlier request of this kind.",
            Self::TooManyRequests => {
                "As many requests of this kind wait, or are worked on, as the VMM takes at one time."
            }
            Self::TooManyStreams => "As many streams are open as the server has at one time.",
            Self::NotBuilt => "The contract has it; this build does not have it yet.",
            Self::UnsupportedCoding => "The request has a transfer coding that this server does not have.",
            Self::UnsupportedVersion => "The request is of another version of HTTP than 1.0 or 1.1.",
            Self::BootFailed => {
                "The VM could not be brought up: a file, a socket, memory or the hypervisor refused."
            }
            Self::SnapshotFailed => {
                "The snapshot could not be written: a file, a device or the hypervisor refused."
            }
            Self::NoSnapshot => "There is no snapshot at that place, or it was not finished.",
            Self::RestoreFailed => {
                "The snapshot could not be restored: it is damaged or not for this host, or a file, a socket, memory or the \
                 hypervisor refused."
            }
            Self::MigrationFailed => {
                "The VM did not get from one VMM to the other: one of them refused, or the link was lost."
            }
            Self::Cancelled => "It was cancelled by another request, or by the end of its guest.",
            Self::Internal => "Something failed in the VMM.",
        }
    }

    /// What a client can do about it, as a sentence.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::NoVm => "Create one first.",
            Self::VmExists => "Delete it first, or go on with it.",
            Self::WrongPhase => {
                "Bring the VM into one of `allowed_phases`; if it is there already, nothing needs to be done."
            }
            Self::NoDevice => "Take an id from `vm.info`.",
            Self::DeviceExists => "Choose another id, or remove that device first.",
            Self::FixedDevice => "Leave it; it cannot be removed.",
            Self::UnknownRoute => "Compare the path with the document at `vmm.openapi`.",
            Self::MethodNotAllowed => "Use the method in the header `Allow`.",
            Self::MalformedRequest => "Correct the client; the connection was closed.",
            Self::MalformedBody => "Correct what `faults` lists; nothing was done.",
            Self::UnknownField => "Correct the name, or start the VMM with `--unknown-fields=warn`.",
            Self::InvalidConfig => "Correct what `faults` lists; nothing was done.",
            Self::RequestTimeout => "Send it again on a new connection, as a whole.",
            Self::LengthRequired => "Send it with `Content-Length`.",
            Self::BodyTooLarge => "Send less.",
            Self::ExpectationFailed => "Leave the header out.",
            Self::HeadTooLarge => "Send fewer headers.",
            Self::TooManyDescriptors => "Send fewer; those sent were closed.",
            Self::GuestBusy => "Wait, then send the request again.",
            Self::TooManyRequests => "Ask again when some of them are answered.",
            Self::TooManyStreams => "Close another stream, then ask again.",
            Self::NotBuilt => {
                "Do without, or use a build that has it; `faults` lists the fields where a field is the reason."
            }
            Self::UnsupportedCoding => "Send it plain.",
            Self::UnsupportedVersion => "Use HTTP/1.1.",
            Self::BootFailed => "Read `causes`, put it right, and boot again; the VM is as it was before.",
            Self::SnapshotFailed => {
                "Read `causes`, put it right, and try again; the VM is as it was before, and nothing is left of the snapshot."
            }
            Self::NoSnapshot => "Look for the directory that has a `manifest.json`.",
            Self::RestoreFailed => "Read `causes`, put it right, and try again; there is no VM.",
            Self::MigrationFailed => {
                "Read `causes` on both sides, put it right, and try again; the VM is where and as it was before, unless they say that this is in doubt."
            }
            Self::Cancelled => {
                "Nothing: the VM is as it was before, and nothing is left of what was begun, but a thread where a file does not answer."
            }
            Self::Internal => "Read `causes` and the VMM's log; report it if they do not help.",
        }
    }

    /// Whether nothing in this build answers with it yet.
    #[must_use]
    pub const fn is_reserved(self) -> bool {
        matches!(self, Self::GuestBusy)
    }
}

/// All codes as a page. `docs/errors.md` is this text.
#[must_use]
pub fn errors_markdown() -> String {
    let mut page = String::from(
        "# Error codes\n\nGenerated from `error::Code` in `vmm-api`; do not edit. The words and their statuses are stable; new words may \
         come.\n\nA client that accepts `application/json` or `application/problem+json` by name gets problem details \
         (RFC 9457) with the member `code`; others get an array of strings, outermost cause first.\n\n\
         | code | status | when | what a client can do |\n|---|---|---|---|\n",
    );
    for code in Code::ALL {
        let reserved = if code.is_reserved() { " Reserved: this build does not answer it." } else { "" };
        let (name, status) = (code.name(), code.status());
        // Writing to a String cannot fail.
        let _ = writeln!(
            page,
            "| `{name}` | {status} {} | {}{reserved} | {} |",
            reason_phrase(status),
            code.meaning(),
            code.remedy()
        );
    }
    page
}
