//! Answers as bytes. Pure.

use crate::command::{Method, Outcome};
use crate::error::{ApiError, reason_phrase};
use crate::http::parser::{Manner, Verb};

/// The interim answer to `Expect: 100-continue`.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The HTTP status of the answer.
#[must_use]
pub fn status(outcome: &Outcome) -> u16 {
    match outcome {
        Ok(body) if body.bytes.is_empty() => 204,
        Ok(_) => 200,
        Err(error) => error.code.status(),
    }
}

/// The answer to a request that was carried out: 200 with a body, 204 without, or the error.
#[must_use]
pub fn answer(outcome: &Outcome, manner: Manner) -> Vec<u8> {
    match outcome {
        Ok(body) if body.bytes.is_empty() => Head { status: 204, manner, allow: &[] }.with_body("", &[]),
        Ok(body) => Head { status: 200, manner, allow: &[] }.with_body(body.media_type, &body.bytes),
        Err(error) => refusal(error, manner, &[]),
    }
}

/// The answer to a request that was not carried out.
#[must_use]
pub fn refusal(error: &ApiError, manner: Manner, allow: &[Method]) -> Vec<u8> {
    let head = Head { status: error.code.status(), manner, allow };
    head.with_body(manner.errors.media_type(), &error.body(manner.errors))
}

/// The head of an answer that goes on until the connection ends.
#[must_use]
pub fn stream_head(media_type: &str) -> Vec<u8> {
    let status = "HTTP/1.1 200 OK\r\nServer: Cloud Hypervisor API\r\nConnection: close";
    format!("{status}\r\nContent-Type: {media_type}\r\n\r\n").into_bytes()
}

struct Head<'a> {
    status: u16,
    manner: Manner,
    allow: &'a [Method],
}

impl Head<'_> {
    /// Existing clients look for these very spellings. An answer 204 has neither type nor length (RFC 9110).
    fn with_body(&self, media_type: &str, body: &[u8]) -> Vec<u8> {
        let connection = if self.manner.keep_alive { "keep-alive" } else { "close" };
        let (status, phrase) = (self.status, reason_phrase(self.status));
        let mut text = format!(
            "HTTP/1.1 {status} {phrase}\r\nServer: Cloud Hypervisor API\r\nConnection: {connection}\r\n"
        );
        if !self.allow.is_empty() {
            let methods: Vec<_> = self.allow.iter().map(|method| method.name()).collect();
            text.push_str(&format!("Allow: {}\r\n", methods.join(", ")));
        }
        if self.status != 204 {
            text.push_str(&format!("Content-Type: {media_type}\r\nContent-Length: {}\r\n", body.len()));
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        if self.manner.verb != Verb::Head {
            bytes.extend_from_slice(body);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Body, JSON};
    use crate::error::{Code, ErrorForm};

    const MANNER: Manner = Manner { verb: Verb::Get, keep_alive: true, errors: ErrorForm::Causes };

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn spelled_as_existing_clients_read_it() {
        assert_eq!(
            text(answer(&Ok(Body { media_type: JSON, bytes: b"{}".to_vec() }), MANNER)),
            "HTTP/1.1 200 OK\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        );
        let closing = Manner { keep_alive: false, ..MANNER };
        assert_eq!(
            text(answer(&Ok(Body::NONE), closing)),
            "HTTP/1.1 204 No Content\r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n\r\n"
        );
    }

    #[test]
    fn errors_come_in_the_form_asked_for() {
        let error = ApiError::new(Code::MethodNotAllowed, "vm.boot takes PUT only");
        let plain = text(refusal(&error, MANNER, &[Method::Put]));
        assert!(plain.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{plain}");
        assert!(plain.contains("\r\nAllow: PUT\r\nContent-Type: application/json\r\n"), "{plain}");
        assert!(plain.ends_with("\r\n\r\n[\"vm.boot takes PUT only\"]"), "{plain}");
        let problem = text(refusal(&error, Manner { errors: ErrorForm::Problem, ..MANNER }, &[]));
        assert!(problem.contains("Content-Type: application/problem+json\r\n"), "{problem}");
        assert!(problem.contains(r#""code":"method_not_allowed""#), "{problem}");
    }

    #[test]
    fn the_answer_to_head_has_a_length_and_no_body() {
        let error = ApiError::new(Code::UnknownRoute, "there is no /x");
        let answer = text(refusal(&error, Manner { verb: Verb::Head, ..MANNER }, &[]));
        assert!(answer.ends_with("Content-Length: 18\r\n\r\n"), "{answer}");
    }
}
