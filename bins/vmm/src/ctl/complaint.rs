//! What went wrong, for people.

use std::fmt::Write as _;

use vmm_api::client::ClientError;
use vmm_api::error::Problem;

use super::CtlError;
use super::show::plain;
use crate::exit::report;

/// The error with its causes, one a line; of a refusal also its code, the faults, and when it would do.
pub(super) fn text(error: &CtlError) -> String {
    match error {
        CtlError::Client(ClientError::Refused(problem)) => refusal(problem),
        error => report(error),
    }
}

fn refusal(problem: &Problem) -> String {
    let mut causes = problem.causes.iter().map(|cause| plain(cause));
    let mut text = format!("error: {}", causes.next().unwrap_or_default());
    // Writing to a String cannot fail. Other VMMs give no code.
    let _ = match problem.code.as_str() {
        "" => write!(text, " [{}]", problem.status),
        code => write!(text, " [{}]", plain(code)),
    };
    for cause in causes {
        let _ = write!(text, "\n  caused by: {cause}");
    }
    for fault in &problem.faults {
        let _ = write!(text, "\n  {}: {}", plain(&fault.path), plain(&fault.message));
    }
    if !problem.allowed_phases.is_empty() {
        let phases = plain(&problem.allowed_phases.join(", "));
        let now = problem.phase.as_deref().map(|phase| format!("; it is {}", plain(phase)));
        let _ = write!(text, "\n  possible while the VM is {phases}{}", now.unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_api::error::{ApiError, Code, FaultReport};
    use vmm_state::{Action, Admission, Phase, admit};

    fn of(error: &ApiError) -> String {
        text(&CtlError::Client(ClientError::Refused(Box::new(error.into()))))
    }

    #[test]
    fn a_refusal_says_all_that_the_vmm_said() {
        let error = ApiError::new(Code::BootFailed, "no such \u{1b}file").context("cannot boot");
        assert_eq!(of(&error), "error: cannot boot [boot_failed]\n  caused by: no such \\u{1b}file");
        let fault =
            FaultReport { path: "disks[1].path".into(), kind: String::new(), message: "missing".into() };
        let error = ApiError::new(Code::InvalidConfig, "refused").with_faults(vec![fault]);
        assert_eq!(of(&error), "error: refused [invalid_config]\n  disks[1].path: missing");
        let Admission::Refused(refusal) = admit(Phase::Created, Action::Pause) else { panic!() };
        let expected = "error: vm.pause is not possible: the VM is not booted [wrong_phase]\n  \
                        possible while the VM is Running; it is Created";
        assert_eq!(of(&refusal.into()), expected);
    }

    #[test]
    fn another_vmms_refusal_has_a_status_instead_of_a_code() {
        let problem = Problem { status: 500, causes: vec!["a".into(), "b".into()], ..Problem::default() };
        assert_eq!(refusal(&problem), "error: a [500]\n  caused by: b");
    }
}
