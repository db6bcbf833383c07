//! From a request line to what is to be done.

use crate::command::{Endpoint, Method};
use crate::error::{ApiError, Code};
use crate::http::parser::Verb;
use crate::http::stream::StreamRoute;

/// The path every route is below.
pub const ROOT: &str = "/api/v1/";

/// A request that leads nowhere: the error, and the methods to name in `Allow` where only the method was wrong.
#[derive(Debug, PartialEq, Eq)]
pub struct Misrouted {
    /// The answer.
    pub error: ApiError,
    /// The methods that are allowed.
    pub allow: Vec<Method>,
}

/// The endpoint of `table` for `verb` and `path`.
///
/// # Errors
/// There is no such path, or it has other methods.
pub fn route<H: 'static>(
    table: &'static [Endpoint<H>],
    verb: Verb,
    path: &str,
) -> Result<&'static Endpoint<H>, Box<Misrouted>> {
    let name = path.strip_prefix(ROOT).unwrap_or_default();
    let mut allow = Vec::new();
    for endpoint in table.iter().filter(|endpoint| endpoint.name() == name) {
        if verb.is(endpoint.method()) {
            return Ok(endpoint);
        }
        allow.push(endpoint.method());
    }
    let error = if allow.is_empty() {
        ApiError::new(Code::UnknownRoute, format!("there is no {}", shortened(path)))
    } else {
        let names: Vec<_> = allow.iter().map(|method| method.name()).collect();
        ApiError::new(Code::MethodNotAllowed, format!("{name} takes {} only", names.join(" and ")))
    };
    Err(Box::new(Misrouted { error, allow }))
}

/// The stream of `routes` for `verb` and `path`; `None` if there is none of that path.
///
/// # Errors
/// It has another method.
pub fn stream_route<'a>(
    routes: &'a [Box<dyn StreamRoute>],
    verb: Verb,
    path: &str,
) -> Result<Option<&'a dyn StreamRoute>, Box<Misrouted>> {
    let name = path.strip_prefix(ROOT);
    let Some(route) = routes.iter().find(|route| Some(route.name()) == name) else { return Ok(None) };
    if verb.is(Method::Get) {
        return Ok(Some(&**route));
    }
    let error = ApiError::new(Code::MethodNotAllowed, format!("{} takes GET only", route.name()));
    Err(Box::new(Misrouted { error, allow: vec![Method::Get] }))
}

/// A path as it may be shown: an answer is not a mirror for 16 KiB.
fn shortened(path: &str) -> String {
    path.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{ApiRequest, Handle, Host, Replier};
    use crate::commands::{vm, vmm};
    use crate::info::PingReply;

    struct Toy;

    impl Host for Toy {
        fn phase(&self) -> vmm_state::Phase {
            vmm_state::Phase::Empty
        }

        fn park(&mut self, _: ApiRequest<Self>) {}

        fn publish(&mut self) {}
    }

    impl Handle<vmm::Ping> for Toy {
        fn handle(&mut self, _: (), _: Replier<PingReply>) {}
    }

    static TABLE: [Endpoint<Toy>; 4] = [
        Endpoint::of::<vmm::Ping>(),
        Endpoint::later::<vm::Nmi>(),
        Endpoint::later::<vmm::LogLevel>(),
        Endpoint::later::<vmm::SetLogLevel>(),
    ];

    fn code(verb: Verb, path: &str) -> (Code, Vec<Method>) {
        let misrouted = route(&TABLE, verb, path).unwrap_err();
        (misrouted.error.code, misrouted.allow)
    }

    #[test]
    fn paths_and_methods_are_told_apart() {
        assert_eq!(route(&TABLE, Verb::Get, "/api/v1/vmm.ping").unwrap().name(), "vmm.ping");
        assert_eq!(route(&TABLE, Verb::Put, "/api/v1/vmm.log-level").unwrap().method(), Method::Put);
        assert_eq!(route(&TABLE, Verb::Get, "/api/v1/vmm.log-level").unwrap().method(), Method::Get);
        let wrong_method = |methods: &[Method]| (Code::MethodNotAllowed, methods.to_vec());
        assert_eq!(code(Verb::Put, "/api/v1/vmm.ping"), wrong_method(&[Method::Get]));
        assert_eq!(code(Verb::Other, "/api/v1/vm.nmi"), wrong_method(&[Method::Put]));
        assert_eq!(code(Verb::Other, "/api/v1/vmm.log-level"), wrong_method(&[Method::Get, Method::Put]));
        for path in ["/", "/api/v1/", "/api/v1", "/api/v1/vm.", "/api/v1/vmm.ping/", "/api/v2/vmm.ping", "*"]
        {
            assert_eq!(code(Verb::Get, path), (Code::UnknownRoute, Vec::new()), "{path}");
        }
    }
}
