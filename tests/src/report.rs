//! What a guest told on its console: the lines `VMM-TEST: key=value` of the images' scripts.

/// The mark of such a line. A console may show other text before it on the same line.
const MARK: &str = "VMM-TEST: ";

/// The facts that a guest told, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    facts: Vec<(String, String)>,
    complete: bool,
}

impl Report {
    /// Reads everything that a console printed; the text may hold several boots.
    #[must_use]
    pub fn parse(console: &str) -> Self {
        let mut report = Self::default();
        for line in console.lines() {
            let Some((_, fact)) = line.split_once(MARK) else { continue };
            let fact = fact.trim_end();
            match fact.split_once('=') {
                Some((key, value)) => report.facts.push((key.to_owned(), value.to_owned())),
                None => report.complete = fact == "end",
            }
        }
        report
    }

    /// The last value told for `key`: `kernel`, `cpus`, `mem-kib`, `uptime`, `epoch`, `multi-user`, `run-status`, `action` and so on.
    #[must_use]
    pub fn last(&self, key: &str) -> Option<&str> {
        self.all(key).last()
    }

    /// Every value told for `key`: `disk`, `pci`, `dmesg` (a line of the kernel log that tells of trouble), `failed-unit`.
    pub fn all<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a str> {
        let key = key.to_owned();
        self.facts.iter().filter(move |(name, _)| *name == key).map(|(_, value)| value.as_str())
    }

    /// Whether the last report came to its end.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_found_among_other_text() {
        let console = "[ 1.0] Linux\r\nroot# VMM-TEST: begin\r\nVMM-TEST: cpus=2\r\nVMM-TEST: disk=vda serial=a=b\r\n\
                       VMM-TEST: disk=vdb\r\nVMM-TEST: end\r\nVMM-TEST: run-status=0\r\nbye";
        let report = Report::parse(console);
        assert!(report.is_complete());
        assert_eq!(report.last("cpus"), Some("2"));
        assert_eq!(report.all("disk").collect::<Vec<_>>(), ["vda serial=a=b", "vdb"]);
        assert_eq!(report.last("run-status"), Some("0"));
        assert_eq!(report.last("dmesg"), None);
    }

    #[test]
    fn a_second_boot_counts_and_a_cut_report_is_not_complete() {
        let report = Report::parse(
            "VMM-TEST: begin\nVMM-TEST: cpus=1\nVMM-TEST: end\nVMM-TEST: begin\nVMM-TEST: cpus=2\n",
        );
        assert!(!report.is_complete());
        assert_eq!(report.last("cpus"), Some("2"));
        assert_eq!(Report::parse(""), Report::default());
    }
}
