//! What the process uses of the host, by the names that exporters have agreed on. It is read from /proc at each scrape;
//! what a sandbox keeps from being read is left out.

use std::fs;

use vmm_api::metrics::{Exposition, Family, Kind, Number, Value};

static CPU: Family = Family::of(
    Kind::Counter,
    "process_cpu_seconds",
    "seconds",
    "CPU time of the process, user and system, all vCPUs among it.",
);
static RESIDENT: Family = Family::of(
    Kind::Gauge,
    "process_resident_memory_bytes",
    "bytes",
    "Resident memory of the process, what the guest touched of its own among it.",
);
static VIRTUAL: Family =
    Family::of(Kind::Gauge, "process_virtual_memory_bytes", "bytes", "Address space of the process.");
static THREADS: Family = Family::of(Kind::Gauge, "process_threads", "", "Threads of the process.");
static START: Family = Family::of(
    Kind::Gauge,
    "process_start_time_seconds",
    "seconds",
    "When the process started, in seconds since 1970-01-01 UTC.",
);
static OPEN_FDS: Family = Family::of(Kind::Gauge, "process_open_fds", "", "Open file descriptors.");
static MAX_FDS: Family =
    Family::of(Kind::Gauge, "process_max_fds", "", "File descriptors that may be open (soft limit).");

/// Ticks a second in /proc, whatever the kernel's own clock is (USER_HZ on x86-64).
const TICKS: f64 = 100.0;
/// Bytes of a page on x86-64.
const PAGE: u64 = 4096;

/// Adds all that can be read.
pub(super) fn measure(page: &mut Exposition) {
    let read = |path| fs::read_to_string(path).ok();
    if let Some(stat) = read("/proc/self/stat").as_deref().and_then(Stat::parse) {
        let float = |number| Value::Gauge(Number::Float(number));
        page.sample(&CPU, &[], Value::Counter(Number::Float(stat.cpu_ticks as f64 / TICKS)));
        page.sample(&RESIDENT, &[], Value::gauge(stat.resident_pages.saturating_mul(PAGE)));
        page.sample(&VIRTUAL, &[], Value::gauge(stat.virtual_bytes));
        page.sample(&THREADS, &[], Value::gauge(stat.threads));
        if let Some(boot) = read("/proc/stat").as_deref().and_then(boot_time) {
            page.sample(&START, &[], float(boot as f64 + stat.start_ticks as f64 / TICKS));
        }
    }
    if let Ok(folder) = fs::read_dir("/proc/self/fd") {
        // The folder's own descriptor is one of them.
        page.sample(&OPEN_FDS, &[], Value::gauge((folder.count() as u64).saturating_sub(1)));
    }
    if let Some(limit) = read("/proc/self/limits").as_deref().and_then(open_files) {
        page.sample(&MAX_FDS, &[], Value::Gauge(limit));
    }
}

/// Parts of /proc/self/stat (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    threads: u64,
    /// Since the host's boot.
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The program's name, in parentheses, may hold anything; the third field comes after the last one.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: field(14)?.saturating_add(field(15)?),
            threads: field(20)?,
            start_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

/// When the host was booted, in seconds since 1970, of /proc/stat.
fn boot_time(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// The soft limit of open files of /proc/self/limits.
fn open_files(text: &str) -> Option<Number> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(Number::Float(f64::INFINITY)),
        number => number.parse().ok().map(Number::Int),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn fields_are_counted_from_the_last_parenthesis() {
        let rest =
            "R 515 515 1237 0 -1 4194304 99 0 0 0 30 12 5 6 20 0 9 0 193381 3133440 383 18446744073709551615";
        let expected = Stat {
            cpu_ticks: 42,
            threads: 9,
            start_ticks: 193_381,
            virtual_bytes: 3_133_440,
            resident_pages: 383,
        };
        for name in ["vmm", "a) R 1 (b", ""] {
            assert_eq!(Stat::parse(&format!("554 ({name}) {rest}\n")).as_ref(), Some(&expected), "{name}");
        }
        for text in ["", "554 vmm R", "554 (vmm) R 1 2 3", "554 (vmm) R x 1"] {
            assert_eq!(Stat::parse(text), None, "{text}");
        }
    }

    #[test]
    fn boot_time_and_limit_are_found() {
        assert_eq!(boot_time("cpu 1 2\nintr 5\nbtime 1795705694\nprocesses 3\n"), Some(1_795_705_694));
        assert_eq!(boot_time("xbtime 1\n"), None);
        let limits = "Limit Soft Limit Hard Limit Units\nMax open files            1024       4096  files\n";
        assert_eq!(open_files(limits), Some(Number::Int(1024)));
        let none = limits.replace("1024", "unlimited");
        assert_eq!(open_files(&none), Some(Number::Float(f64::INFINITY)));
        assert_eq!(open_files(""), None);
    }

    #[test]
    fn this_process_is_plausible() {
        let _kept: Vec<_> = (0..20).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let mut page = Exposition::new();
        measure(&mut page);
        let text = page.text().unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
        };
        assert!(value("process_open_fds") >= 23.0 && value("process_open_fds") < value("process_max_fds"));
        assert!(value("process_resident_memory_bytes") > 1e5);
        assert!(value("process_virtual_memory_bytes") > value("process_resident_memory_bytes"));
        assert!(value("process_threads") >= 1.0);
        assert!(value("process_cpu_seconds_total") >= 0.0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - value("process_start_time_seconds");
        assert!((-2.0..86_400.0).contains(&age), "started {age} s ago");
    }
}
