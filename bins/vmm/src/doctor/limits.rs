//! Resource limits: reading and judging them.

use super::Check;
use super::facts::Limit;
use super::judge::{ok, size, warn};

/// Open files of a VM with a handful of devices, each with several queues.
const ENOUGH_FILES: u64 = 1024;
/// Rings of io_uring on kernels that count them as locked memory (before Linux 5.12).
const ENOUGH_LOCKED: u64 = 64 << 10;

/// The limit called `name` in the text of /proc/PID/limits (proc(5)): name, soft, hard, unit, in columns.
pub(super) fn parse(text: &str, name: &str) -> Option<Limit> {
    let mut columns = text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace();
    let mut column = || match columns.next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    Some(Limit { soft: column()?, hard: column()? })
}

pub(super) fn open_files(limit: Option<Limit>) -> Check {
    let name = "open files";
    let Some(limit) = limit else {
        return ok(name, "limit unknown");
    };
    let found = format!("at most {}", limit.soft.map_or("as many as wanted".into(), |soft| soft.to_string()));
    if limit.soft.is_none_or(|soft| soft >= ENOUGH_FILES) {
        return ok(name, found);
    }
    let hard_is_enough = limit.hard.is_none_or(|hard| hard >= ENOUGH_FILES);
    let how = if hard_is_enough { "`ulimit -n 4096`" } else { "raise it in /etc/security/limits.conf" };
    warn(name, found, format!("a VM with many devices and queues needs more: {how}"))
}

pub(super) fn locked_memory(limit: Option<Limit>) -> Check {
    let name = "locked memory";
    match limit {
        None => ok(name, "limit unknown"),
        Some(Limit { soft: None, .. }) => ok(name, "no limit"),
        Some(Limit { soft: Some(bytes), .. }) if bytes >= ENOUGH_LOCKED => {
            ok(name, format!("at most {}", size(bytes)))
        }
        Some(Limit { soft: Some(bytes), .. }) => warn(
            name,
            format!("at most {}", size(bytes)),
            "kernels before 5.12 count io_uring's rings: raise it (`ulimit -l`, /etc/security/limits.conf)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    const TEXT: &str = "\
Limit                     Soft Limit           Hard Limit           Units
Max processes             96365                96365                processes
Max open files            256                  4096                 files
Max locked memory         unlimited            unlimited            bytes
Max file locks            torn
";

    #[test]
    fn reads_the_kernels_table() {
        assert_eq!(parse(TEXT, "Max open files"), Some(Limit { soft: Some(256), hard: Some(4096) }));
        assert_eq!(parse(TEXT, "Max locked memory"), Some(Limit { soft: None, hard: None }));
        assert_eq!(parse(TEXT, "Max file locks"), None);
        assert_eq!(parse(TEXT, "Max msgqueue size"), None);
    }

    #[test]
    fn few_open_files_are_a_warning_with_a_way_out() {
        let of = |soft, hard| open_files(Some(Limit { soft, hard }));
        assert_eq!(of(Some(1024), Some(1024)).verdict, Verdict::Ok);
        assert_eq!(of(None, None).verdict, Verdict::Ok);
        assert!(of(Some(256), Some(4096)).advice.unwrap().contains("ulimit -n"));
        assert!(of(Some(256), Some(256)).advice.unwrap().contains("limits.conf"));
        assert_eq!(open_files(None).verdict, Verdict::Ok);
    }

    #[test]
    fn little_locked_memory_is_a_warning() {
        let of = |soft| locked_memory(Some(Limit { soft, hard: soft }));
        assert_eq!(of(Some(65535)).verdict, Verdict::Warn);
        assert_eq!(of(Some(65536)).found, "at most 64 KiB");
        assert_eq!(of(None).found, "no limit");
    }
}
