//! From a request line to what is to be done.

use crate::command::{Endpoint, Method};
use crate::commands::later::LATER;
use crate::error::{ApiError, Code};
use crate::http::parser::Verb;
use crate::http::stream::StreamRoute;

/// The path every route is below.
pub const ROOT: &str = "/api/v1/";

/// A request that leads nowhere: the error, and the method to name in `Allow` where only the method was wrong.
#[derive(Debug, PartialEq, Eq)]
pub struct Misrouted {
    /// The answer.
    pub error: ApiError,
    /// The method that is allowed.
    pub allow: Option<Method>,
}

/// The endpoint of `table` for `verb` and `path`.
///
/// # Errors
/// There is no such path, it has another method, or its command is not built yet.
pub fn route<H: 'static>(
    table: &'static [Endpoint<H>],
    verb: Verb,
    path: &str,
) -> Result<&'static Endpoint<H>, Box<Misrouted>> {
    let unknown =
        || misrouted(ApiError::new(Code::UnknownRoute, format!("there is no {}", shortened(path))), None);
    let name = path.strip_prefix(ROOT).ok_or_else(unknown)?;
    if let Some(endpoint) = table.iter().find(|endpoint| endpoint.name() == name) {
        check_method(endpoint.method(), verb, name)?;
        return Ok(endpoint);
    }
    let later = LATER.iter().find(|later| later.name == name).ok_or_else(unknown)?;
    check_method(later.method, verb, name)?;
    Err(misrouted(ApiError::new(Code::NotBuilt, format!("{name} is not supported by this build yet")), None))
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
    check_method(Method::Get, verb, route.name())?;
    Ok(Some(&**route))
}

fn check_method(wanted: Method, verb: Verb, name: &str) -> Result<(), Box<Misrouted>> {
    if verb.is(wanted) {
        return Ok(());
    }
    let error = ApiError::new(Code::MethodNotAllowed, format!("{name} takes {} only", wanted.name()));
    Err(misrouted(error, Some(wanted)))
}

fn misrouted(error: ApiError, allow: Option<Method>) -> Box<Misrouted> {
    Box::new(Misrouted { error, allow })
}

/// A path as it may be shown: an answer is not a mirror for 16 KiB.
fn shortened(path: &str) -> String {
    path.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Handle, Host, Replier};
    use crate::commands::vmm;
    use crate::info::PingReply;

    struct Toy;

    impl Host for Toy {
        fn phase(&self) -> vmm_state::Phase {
            vmm_state::Phase::Empty
        }
    }

    impl Handle<vmm::Ping> for Toy {
        fn handle(&mut self, _: (), _: Replier<PingReply>) {}
    }

    static TABLE: [Endpoint<Toy>; 1] = [Endpoint::of::<vmm::Ping>()];

    fn code(verb: Verb, path: &str) -> (Code, Option<Method>) {
        let misrouted = route(&TABLE, verb, path).unwrap_err();
        (misrouted.error.code, misrouted.allow)
    }

    #[test]
    fn paths_and_methods_are_told_apart() {
        assert_eq!(route(&TABLE, Verb::Get, "/api/v1/vmm.ping").unwrap().name(), "vmm.ping");
        assert_eq!(code(Verb::Put, "/api/v1/vmm.ping"), (Code::MethodNotAllowed, Some(Method::Get)));
        assert_eq!(code(Verb::Other, "/api/v1/vm.nmi"), (Code::MethodNotAllowed, Some(Method::Put)));
        assert_eq!(code(Verb::Put, "/api/v1/vm.nmi"), (Code::NotBuilt, None));
        for path in ["/", "/api/v1/", "/api/v1", "/api/v1/vm.", "/api/v1/vmm.ping/", "/api/v2/vmm.ping", "*"]
        {
            assert_eq!(code(Verb::Get, path), (Code::UnknownRoute, None), "{path}");
        }
    }
}
