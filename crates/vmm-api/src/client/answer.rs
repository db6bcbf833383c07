//! Answers, and what a refusal says, whoever wrote it.

use super::ClientError;
use crate::error::{Problem, reason_phrase};
use serde_json::Value;

/// Most bytes of a refusal's text that are kept.
const MAX_TEXT: usize = 4096;

/// An answer as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawAnswer {
    /// HTTP status.
    pub status: u16,
    /// The body; empty if there was none.
    pub body: Vec<u8>,
}

impl RawAnswer {
    /// Tells success from refusal.
    ///
    /// # Errors
    /// [`ClientError::Refused`], unless the status is one of success.
    pub fn judge(self) -> Result<Self, ClientError> {
        match self.status {
            200..=299 => Ok(self),
            _ => Err(ClientError::Refused(Box::new(self.problem()))),
        }
    }

    /// The body as a report: this VMM's problem reports, the contract's arrays of causes, and any other text.
    fn problem(&self) -> Problem {
        let of = |causes| Problem { causes, ..Problem::default() };
        let mut problem = match serde_json::from_slice(&self.body) {
            Ok(report @ Value::Object(_)) => serde_json::from_value(report).unwrap_or_default(),
            Ok(Value::Array(causes)) => of(causes.iter().map(text).collect()),
            Ok(other @ Value::String(_)) => of(vec![text(&other)]),
            _ => of(vec![self.text()]),
        };
        problem.status = self.status;
        if problem.title.is_empty() {
            reason_phrase(self.status).clone_into(&mut problem.title);
        }
        problem.causes.retain(|cause| !cause.is_empty());
        if problem.causes.is_empty() {
            let said = if problem.detail.is_empty() { self.status_line() } else { problem.detail.clone() };
            problem.causes.push(said);
        }
        if let (true, Some(first)) = (problem.detail.is_empty(), problem.causes.first()) {
            problem.detail.clone_from(first);
        }
        problem
    }

    fn text(&self) -> String {
        let bytes = self.body.get(..self.body.len().min(MAX_TEXT)).unwrap_or_default();
        String::from_utf8_lossy(bytes).trim().to_owned()
    }

    fn status_line(&self) -> String {
        format!("the VMM answers {} {}", self.status, reason_phrase(self.status))
    }
}

/// A cause as text.
fn text(cause: &Value) -> String {
    cause.as_str().map_or_else(|| cause.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{ApiError, Code, ErrorForm};

    fn problem(status: u16, body: &[u8]) -> Problem {
        match (RawAnswer { status, body: body.to_vec() }).judge() {
            Err(ClientError::Refused(problem)) => *problem,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_form_of_a_refusal_is_read() {
        let error = ApiError::new(Code::BootFailed, "no such file").context("cannot boot");
        let ours = problem(500, &error.body(ErrorForm::Problem));
        assert_eq!(ours, Problem::from(&error));
        let older = problem(500, &error.body(ErrorForm::Causes));
        assert_eq!(older, Problem { code: String::new(), ..ours });

        for (body, text) in [
            (&b"\"VM is not created\""[..], "VM is not created"),
            (b" VM is not created\n", "VM is not created"),
            (b"{\"detail\": \"no\", \"type\": \"x\"}", "no"),
            (b"[1]", "1"),
            (b"", "the VMM answers 404 Not Found"),
            (b"[]", "the VMM answers 404 Not Found"),
            (b"{}", "the VMM answers 404 Not Found"),
            (b"{\"causes\": 3}", "the VMM answers 404 Not Found"),
        ] {
            let problem = problem(404, body);
            assert_eq!((problem.status, problem.title.as_str()), (404, "Not Found"));
            assert_eq!((problem.causes, problem.detail.as_str()), (vec![text.to_owned()], text));
        }
    }

    #[test]
    fn a_long_text_is_cut_and_success_is_none_of_it() {
        assert_eq!(problem(500, &[b'x'; 10_000]).detail.len(), MAX_TEXT);
        let done = RawAnswer { status: 204, body: Vec::new() };
        assert_eq!(done.clone().judge().ok(), Some(done));
    }
}
