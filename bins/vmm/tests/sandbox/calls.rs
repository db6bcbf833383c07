//! Calls that filters allow and forbid, made by a child of this program.

use std::os::unix::process::ExitStatusExt;
use std::process::Output;

use vmm::sandbox::filters::Filter;

use crate::Case;
use crate::child::{Deed, run};

pub(crate) const ALL: &[Case] = &[
    ("a_forbidden_call_is_named_and_ends_the_process", a_forbidden_call_is_named_and_ends_the_process),
    ("arguments_are_looked_at", arguments_are_looked_at),
    ("what_strangers_may_not_do_fails_and_ends_nothing", what_strangers_may_not_do_fails_and_ends_nothing),
    ("log_mode_lets_calls_pass", log_mode_lets_calls_pass),
    ("errno_mode_refuses_calls", errno_mode_refuses_calls),
    ("without_filters_calls_pass", without_filters_calls_pass),
    ("a_panic_is_told_under_each_filter", a_panic_is_told_under_each_filter),
    ("a_thread_lives_and_ends_under_each_filter", a_thread_lives_and_ends_under_each_filter),
];

fn kinds() -> impl Iterator<Item = &'static str> {
    Filter::all().iter().map(|filter| filter.kind)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What ended the child is that it called `call`, from the thread `kind`.
fn assert_caught(kind: &str, call: &str, output: &Output) {
    assert_eq!(output.status.code(), Some(12), "{kind}: {output:?}");
    let text = text(output);
    // A thread's name is cut after 15 bytes.
    let thread = kind.get(..15).unwrap_or(kind);
    let expected = format!("<{thread}> ERROR:vmm::sandbox::violation -- forbidden system call {call}");
    assert!(text.contains(&expected) && text.ends_with('\n'), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

fn a_forbidden_call_is_named_and_ends_the_process() {
    for kind in kinds() {
        assert_caught(kind, "getppid (110)", &run("true", kind, Deed::GetPpid));
    }
}

fn arguments_are_looked_at() {
    for kind in kinds() {
        assert_caught(kind, "mmap (9)", &run("true", kind, Deed::MapCode));
        assert_caught(kind, "ioctl (16)", &run("true", kind, Deed::Ioctl));
    }
}

fn what_strangers_may_not_do_fails_and_ends_nothing() {
    let refused = format!("came back: Some({})\nrefused: true\n", libc::EPERM);
    for kind in kinds() {
        let output = run("true", kind, Deed::Stranger);
        assert_eq!(output.status.code(), Some(12), "{kind}: {output:?}");
        let rest = text(&output);
        let rest = rest.strip_prefix(&refused.repeat(3)).unwrap_or_else(|| panic!("{kind}: {rest}"));
        let (allowed, rest) = rest.split_once('\n').unwrap();
        assert!(allowed.starts_with("alive after"), "{kind}: {allowed}");
        let rest = rest.strip_prefix("refused: false\n").unwrap_or_else(|| panic!("{kind}: {rest}"));
        assert!(rest.contains("forbidden system call getppid (110)"), "{kind}: {rest}");
    }
}

fn log_mode_lets_calls_pass() {
    for kind in kinds() {
        for deed in [Deed::GetPpid, Deed::MapCode] {
            let output = run("log", kind, deed);
            assert_eq!((output.status.code(), text(&output).as_str()), (Some(0), "came back: None\n"));
        }
    }
}

fn errno_mode_refuses_calls() {
    for kind in kinds() {
        for deed in [Deed::GetPpid, Deed::MapCode, Deed::Ioctl] {
            let output = run("errno", kind, deed);
            let expected = format!("came back: Some({})\n", libc::EPERM);
            assert_eq!((output.status.code(), text(&output)), (Some(0), expected), "{kind}: {deed:?}");
        }
    }
}

fn without_filters_calls_pass() {
    let output = run("false", "vcpu", Deed::MapCode);
    assert_eq!((output.status.code(), text(&output).as_str()), (Some(0), "came back: None\n"));
}

fn a_panic_is_told_under_each_filter() {
    for kind in kinds() {
        let output = run("true", kind, Deed::Panic);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{kind}: {output:?}");
        assert!(text(&output).contains("told to panic"), "{kind}: {output:?}");
    }
}

fn a_thread_lives_and_ends_under_each_filter() {
    for kind in kinds() {
        let output = run("true", kind, Deed::Live);
        assert!(output.status.success() && text(&output).starts_with("alive after"), "{kind}: {output:?}");
    }
}
