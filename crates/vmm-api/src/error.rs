//! What a request is answered when it fails: one list of stable codes, one error type, and its two forms on the wire.

use crate::config::{Fault, FaultKind};
use serde::{Deserialize, Serialize};
use std::fmt;
use vmm_state::{Reason, Refusal};

/// Why a request failed, as a word clients may compare. The words and their HTTP status are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    /// There is no VM.
    NoVm,
    /// There is a VM already.
    VmExists,
    /// The VM's phase does not allow it.
    WrongPhase,
    /// The VM has no device of this id.
    NoDevice,
    /// The VM has a device of this id already, or the only one of its kind.
    DeviceExists,
    /// The device is a fixed part of the machine.
    FixedDevice,
    /// There is no such path.
    UnknownRoute,
    /// The path exists, with another method.
    MethodNotAllowed,
    /// The request is not HTTP as this server reads it.
    MalformedRequest,
    /// The body is not JSON, or not of the types the request has.
    MalformedBody,
    /// The body has a name that the request does not have.
    UnknownField,
    /// The body is well formed, but what it says cannot be.
    InvalidConfig,
    /// The request did not arrive in time.
    RequestTimeout,
    /// The body has no stated length.
    LengthRequired,
    /// The body is larger than the server takes.
    BodyTooLarge,
    /// An `Expect` header other than `100-continue`.
    ExpectationFailed,
    /// Request line and headers are larger than the server takes.
    HeadTooLarge,
    /// More file descriptors came with the request than the server takes.
    TooManyDescriptors,
    /// The guest has not finished an earlier request of this kind.
    GuestBusy,
    /// As many streams are open as the server has at one time.
    TooManyStreams,
    /// As many requests of this kind wait, or are worked on, as the VMM takes at one time.
    TooManyRequests,
    /// The contract has it; this build does not have it yet.
    NotBuilt,
    /// A transfer coding this server does not have.
    UnsupportedCoding,
    /// A version of HTTP this server does not speak.
    UnsupportedVersion,
    /// The VM could not be brought up.
    BootFailed,
    /// The snapshot could not be written.
    SnapshotFailed,
    /// There is no snapshot at that place.
    NoSnapshot,
    /// The snapshot could not be restored.
    RestoreFailed,
    /// The VM did not get from one VMM to the other.
    MigrationFailed,
    /// It was cancelled.
    Cancelled,
    /// Anything else that failed in the VMM.
    Internal,
}

impl Code {
    /// Every code.
    pub const ALL: [Self; 31] = [
        Self::NoVm,
        Self::VmExists,
        Self::WrongPhase,
        Self::NoDevice,
        Self::DeviceExists,
        Self::FixedDevice,
        Self::UnknownRoute,
        Self::MethodNotAllowed,
        Self::MalformedRequest,
        Self::MalformedBody,
        Self::UnknownField,
        Self::InvalidConfig,
        Self::RequestTimeout,
        Self::LengthRequired,
        Self::BodyTooLarge,
        Self::ExpectationFailed,
        Self::HeadTooLarge,
        Self::TooManyDescriptors,
        Self::GuestBusy,
        Self::TooManyStreams,
        Self::TooManyRequests,
        Self::NotBuilt,
        Self::UnsupportedCoding,
        Self::UnsupportedVersion,
        Self::BootFailed,
        Self::SnapshotFailed,
        Self::NoSnapshot,
        Self::RestoreFailed,
        Self::MigrationFailed,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The word on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoVm => "no_vm",
            Self::VmExists => "vm_exists",
            Self::WrongPhase => "wrong_phase",
            Self::NoDevice => "no_device",
            Self::DeviceExists => "device_exists",
            Self::FixedDevice => "fixed_device",
            Self::UnknownRoute => "unknown_route",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::MalformedRequest => "malformed_request",
            Self::MalformedBody => "malformed_body",
            Self::UnknownField => "unknown_field",
            Self::InvalidConfig => "invalid_config",
            Self::RequestTimeout => "request_timeout",
            Self::LengthRequired => "length_required",
            Self::BodyTooLarge => "body_too_large",
            Self::ExpectationFailed => "expectation_failed",
            Self::HeadTooLarge => "head_too_large",
            Self::TooManyDescriptors => "too_many_descriptors",
            Self::GuestBusy => "guest_busy",
            Self::TooManyStreams => "too_many_streams",
            Self::TooManyRequests => "too_many_requests",
            Self::NotBuilt => "not_built",
            Self::UnsupportedCoding => "unsupported_coding",
            Self::UnsupportedVersion => "unsupported_version",
            Self::BootFailed => "boot_failed",
            Self::SnapshotFailed => "snapshot_failed",
            Self::NoSnapshot => "no_snapshot",
            Self::RestoreFailed => "restore_failed",
            Self::MigrationFailed => "migration_failed",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }

    /// The HTTP status that goes with it.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::MalformedRequest | Self::MalformedBody | Self::UnknownField | Self::TooManyDescriptors => {
                400
            }
            Self::NoVm | Self::NoDevice | Self::NoSnapshot | Self::UnknownRoute => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::VmExists | Self::WrongPhase | Self::DeviceExists | Self::Cancelled => 409,
            Self::LengthRequired => 411,
            Self::BodyTooLarge => 413,
            Self::ExpectationFailed => 417,
            Self::InvalidConfig | Self::FixedDevice => 422,
            Self::GuestBusy => 429,
            Self::HeadTooLarge => 431,
            Self::BootFailed
            | Self::SnapshotFailed
            | Self::RestoreFailed
            | Self::MigrationFailed
            | Self::Internal => 500,
            Self::NotBuilt | Self::UnsupportedCoding => 501,
            Self::TooManyStreams | Self::TooManyRequests => 503,
            Self::UnsupportedVersion => 505,
        }
    }

    /// The code of a refusal by the VM's phase.
    #[must_use]
    pub const fn of(reason: Reason) -> Self {
        match reason {
            Reason::NoVm => Self::NoVm,
            Reason::AlreadyCreated => Self::VmExists,
            Reason::NotBuilt => Self::NotBuilt,
            Reason::NotBooted
            | Reason::AlreadyRunning
            | Reason::AlreadyPaused
            | Reason::NotPaused
            | Reason::NoJob
            | Reason::Migrating
            | Reason::NotMigrating => Self::WrongPhase,
        }
    }

    /// The code of this name, for clients.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.name() == name)
    }
}

/// The standard phrase of an HTTP status this crate uses.
#[must_use]
pub const fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

/// One thing that is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Where: a JSON path such as `disks[1].path`.
    pub path: String,
    /// The class of the fault, a word of [`FaultKind::code`].
    #[serde(default)]
    pub kind: String,
    /// What.
    pub message: String,
}

impl From<Fault> for FaultReport {
    fn from(fault: Fault) -> Self {
        Self { path: fault.path, kind: fault.kind.code().to_owned(), message: fault.message }
    }
}

/// A request's failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The stable word, which also decides the status.
    pub code: Code,
    /// What failed, then what that came from; outermost first, never empty.
    pub causes: Vec<String>,
    /// All that is wrong with the document that was sent.
    pub faults: Vec<FaultReport>,
    /// The refusal, where a phase was the reason.
    pub refusal: Option<Refusal>,
}

impl ApiError {
    /// An error with one cause.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, causes: vec![detail.into()], faults: Vec::new(), refusal: None }
    }

    /// An error with the causes of `error`'s chain.
    #[must_use]
    pub fn from_error(code: Code, error: &dyn std::error::Error) -> Self {
        let mut causes = vec![error.to_string()];
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        Self { code, causes, faults: Vec::new(), refusal: None }
    }

    /// This error, wrapped in what was attempted.
    #[must_use]
    pub fn context(mut self, detail: impl Into<String>) -> Self {
        self.causes.insert(0, detail.into());
        self
    }

    /// This error, with the list of what is wrong with the document.
    #[must_use]
    pub fn with_faults(mut self, faults: Vec<FaultReport>) -> Self {
        self.faults = faults;
        self
    }

    /// What failed, without its causes.
    #[must_use]
    pub fn detail(&self) -> &str {
        self.causes.first().map_or("unknown error", String::as_str)
    }

    /// The body in `form`.
    #[must_use]
    pub fn body(&self, form: ErrorForm) -> Vec<u8> {
        let body = match form {
            ErrorForm::Causes => serde_json::to_vec(&self.cause_strings()),
            ErrorForm::Problem => serde_json::to_vec(&Problem::from(self)),
        };
        // Strings, numbers and lists of them: the encoder has nothing to refuse.
        body.unwrap_or_default()
    }

    fn cause_strings(&self) -> Vec<String> {
        let faults = self.faults.iter().map(|fault| format!("{}: {}", fault.path, fault.message));
        self.causes.iter().cloned().chain(faults).collect()
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause_strings().join(": "))
    }
}

impl std::error::Error for ApiError {}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let mut error = Self::new(Code::of(refusal.reason), refusal.to_string());
        error.refusal = Some(refusal);
        error
    }
}

/// The faults of a document. What it looks like comes before what it says, and that before what is not built.
impl From<Vec<Fault>> for ApiError {
    fn from(faults: Vec<Fault>) -> Self {
        let any = |kinds: &[FaultKind]| faults.iter().any(|fault| kinds.contains(&fault.kind));
        let code = if any(&[FaultKind::Syntax, FaultKind::Type]) {
            Code::MalformedBody
        } else if any(&[FaultKind::Unknown]) {
            Code::UnknownField
        } else if any(&[FaultKind::Invalid, FaultKind::Retired]) {
            Code::InvalidConfig
        } else {
            Code::NotBuilt
        };
        let error = Self::new(code, "the configuration is refused");
        error.with_faults(faults.into_iter().map(FaultReport::from).collect())
    }
}

/// The form of an error's body, by what the client accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorForm {
    /// A JSON array of strings, outermost cause first, which the contract's existing clients print.
    #[default]
    Causes,
    /// RFC 9457 `application/problem+json`.
    Problem,
}

impl ErrorForm {
    /// The body's media type.
    #[must_use]
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Causes => "application/json",
            Self::Problem => "application/problem+json",
        }
    }
}

/// The RFC 9457 body of an error. `type` is left out, which means `about:blank`: the title is the status phrase.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// The phrase of the status.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The stable word of [`Code`]; empty in what other VMMs answer.
    pub code: String,
    /// What failed.
    pub detail: String,
    /// What failed, then what that came from.
    pub causes: Vec<String>,
    /// What is wrong with the document that was sent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<FaultReport>,
    /// The phase the VM is in, where that was the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The phases in which the request would be accepted, where that was the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allowed_phases: Vec<String>,
}

impl From<&ApiError> for Problem {
    fn from(error: &ApiError) -> Self {
        let status = error.code.status();
        let allowed =
            error.refusal.map(|refusal| refusal.allowed.iter().map(|phase| phase.to_string()).collect());
        Self {
            title: reason_phrase(status).to_owned(),
            status,
            code: error.code.name().to_owned(),
            detail: error.detail().to_owned(),
            causes: error.causes.clone(),
            faults: error.faults.clone(),
            phase: error.refusal.map(|refusal| refusal.phase.to_string()),
            allowed_phases: allowed.unwrap_or_default(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.causes.join(": "))?;
        self.faults.iter().try_for_each(|fault| write!(f, "; {}: {}", fault.path, fault.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use vmm_state::{Action, Admission, Phase, admit};

    #[test]
    fn codes_are_distinct_words_with_a_known_status() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_ne!(reason_phrase(code.status()), "Error", "{code:?}");
            assert_eq!(Code::from_name(code.name()), Some(code));
        }
    }

    #[test]
    fn a_refusal_becomes_404_or_409_and_says_where_it_would_do() {
        let refused = |phase, action| match admit(phase, action) {
            Admission::Refused(refusal) => ApiError::from(refusal),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(Phase::Empty, Action::Pause).code.status(), 404);
        assert_eq!(refused(Phase::Running, Action::Create).code, Code::VmExists);
        let error = refused(Phase::Created, Action::Shutdown);
        let problem: Problem = serde_json::from_slice(&error.body(ErrorForm::Problem)).unwrap();
        assert_eq!((problem.status, problem.code.as_str()), (409, "wrong_phase"));
        assert_eq!(problem.phase.as_deref(), Some("Created"));
        assert_eq!(problem.allowed_phases, ["Running", "Paused"]);
        assert_eq!(
            error.body(ErrorForm::Causes),
            br#"["vm.shutdown is not possible: the VM is not booted"]"#
        );
    }

    #[test]
    fn the_gravest_kind_of_fault_decides() {
        let code = |kinds: &[FaultKind]| {
            let faults: Vec<_> = kinds.iter().map(|kind| Fault::new("x", *kind, "y")).collect();
            ApiError::from(faults).code
        };
        use FaultKind::{Invalid, NotBuilt, Retired, Syntax, Type, Unknown};
        assert_eq!(code(&[Syntax]), Code::MalformedBody);
        assert_eq!(code(&[NotBuilt, Invalid, Unknown, Type]), Code::MalformedBody);
        assert_eq!(code(&[NotBuilt, Invalid, Unknown]), Code::UnknownField);
        assert_eq!(code(&[NotBuilt, Retired]), Code::InvalidConfig);
        assert_eq!(code(&[NotBuilt, NotBuilt]), Code::NotBuilt);
    }

    #[test]
    fn the_chain_of_causes_is_kept_in_order_and_faults_follow() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open disk")]
        struct Outer(#[source] std::io::Error);
        let inner = std::io::Error::other("no such file");
        let error = ApiError::from_error(Code::BootFailed, &Outer(inner)).context("cannot boot");
        assert_eq!(error.causes, ["cannot boot", "cannot open disk", "no such file"]);
        let fault = Fault::new("disks[0].path", FaultKind::Invalid, "is missing").into();
        let error = ApiError::new(Code::InvalidConfig, "cannot create").with_faults(vec![fault]);
        assert_eq!(error.body(ErrorForm::Causes), br#"["cannot create","disks[0].path: is missing"]"#);
    }
}
