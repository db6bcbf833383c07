//! How often which request was answered how.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::metrics::{Exposition, Family, Kind, Value};

/// Stands for the command where the path names none.
pub const UNKNOWN: &str = "unknown";
/// Stands for the command where the request could not be read that far.
pub const UNREADABLE: &str = "unreadable";

/// Requests answered since the server was made.
pub const REQUESTS: Family = Family::of(
    Kind::Counter,
    "vmm_api_requests",
    "",
    "Requests answered, by command and HTTP status; \"unknown\" is no command, \"unreadable\" no request.",
);

/// Answers of a server by command and HTTP status. It is bounded: names are the program's own, never a client's.
///
/// The lock is held for an addition or a copy; nobody waits for a client or for the host.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<(&'static str, u16), u64>>);

impl Counts {
    /// An answer with `status` to `command`, or to [`UNKNOWN`] or [`UNREADABLE`].
    pub fn count(&self, command: &'static str, status: u16) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry((command, status)).or_default();
        *count = count.wrapping_add(1);
    }

    /// What was counted so far: command, status, answers.
    #[must_use]
    pub fn get(&self) -> Vec<(&'static str, u16, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|((command, status), count)| (*command, *status, *count)).collect()
    }

    /// Adds it to `page`, as [`REQUESTS`].
    pub fn measure(&self, page: &mut Exposition) {
        page.family(&REQUESTS);
        for (command, status, count) in self.get() {
            let labels = [("command", command), ("status", &status.to_string())];
            page.sample(&REQUESTS, &labels, Value::count(count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_by_command_and_status() {
        let counts = Counts::default();
        for (command, status) in [("vm.info", 200), ("vm.boot", 204), ("vm.info", 404), ("vm.info", 200)] {
            counts.count(command, status);
        }
        assert_eq!(counts.get(), [("vm.boot", 204, 1), ("vm.info", 200, 2), ("vm.info", 404, 1)]);
        let mut page = Exposition::new();
        counts.measure(&mut page);
        let text = page.text().unwrap();
        assert!(text.contains("\nvmm_api_requests_total{command=\"vm.info\",status=\"200\"} 2\n"), "{text}");
    }
}
