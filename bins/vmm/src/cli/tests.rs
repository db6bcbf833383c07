use std::os::unix::ffi::OsStringExt;

use log::LevelFilter;
use vmm_api::config::FaultKind;
use vmm_api::options::{Arity, Flag};
use vmm_api::spec::{Bytes, PayloadSpec, Sink};

use super::command::{LATER, SHOWN};
use super::*;
use crate::logger::LogFormat;

fn parsed(args: &[&str]) -> Result<Invocation, UsageError> {
    parse(["vmm"].iter().chain(args).map(OsString::from))
}

#[track_caller]
fn run(args: &[&str]) -> RunOptions {
    match parsed(args) {
        Ok(Invocation::Run(options)) => *options,
        other => panic!("{args:?}: {other:?}"),
    }
}

/// What a VM becomes with a kernel and these flags.
#[track_caller]
fn spec(args: &[&str]) -> MachineSpec {
    run(&[&["--kernel", "k"], args].concat()).config.unwrap().spec
}

#[track_caller]
fn text(args: &[&str]) -> String {
    match parsed(args) {
        Ok(Invocation::Print(text)) => text,
        other => panic!("{args:?}: {other:?}"),
    }
}

#[track_caller]
fn error(args: &[&str]) -> String {
    parsed(args).map(|invocation| panic!("{args:?}: {invocation:?}")).unwrap_err().to_string()
}

#[track_caller]
fn faults(args: &[&str]) -> Vec<Fault> {
    match parsed(args) {
        Err(UsageError::Faults(faults)) => faults,
        other => panic!("{args:?}: {other:?}"),
    }
}

#[test]
fn each_flag_of_the_vm_arrives() {
    let payload = |args: &[&str]| run(args).config.unwrap().spec.payload;
    assert_eq!(payload(&["--firmware", "f"]), PayloadSpec::Firmware("f".into()));
    let kernel = PayloadSpec::Kernel {
        kernel: "k".into(),
        initramfs: Some("i".into()),
        cmdline: "console=hvc0 root=/dev/vda,x=[1".into(),
    };
    let flags = ["--kernel", "k", "--initramfs", "i", "--cmdline", "console=hvc0 root=/dev/vda,x=[1"];
    assert_eq!(payload(&flags), kernel);

    let cpus = spec(&["--cpus", "boot=2,max=4,affinity=[0@[1,3-4]]"]).cpus;
    assert_eq!((cpus.boot, cpus.max), (2, 4));
    assert_eq!(cpus.affinity[&0].iter().copied().collect::<Vec<_>>(), [1, 3, 4]);
    assert_eq!(spec(&["--memory", "size=1G,shared=on"]).memory.total(), Bytes(1 << 30));
    let zones = spec(&["--memory-zone", "id=a,size=1G", "id=b,size=512M", "--memory", "size=0"]).memory;
    assert_eq!((zones.zones.len(), zones.total()), (2, Bytes(3 << 29)));
    assert_eq!(spec(&["--rng", "src=/dev/random"]).rng.source, PathBuf::from("/dev/random"));
    assert_eq!(spec(&["--serial", "tty", "--console", "off"]).serial, Some(Sink::Tty));
    assert_eq!(spec(&["--console", "off"]).console, None);
}

#[test]
fn disks_are_given_together_or_apart() {
    let paths = |args: &[&str]| {
        spec(args).disks.into_iter().map(|disk| disk.image.path.display().to_string()).collect::<Vec<_>>()
    };
    let expected = ["a", "b", "c"];
    assert_eq!(paths(&["--disk", "path=a", "path=b", "--disk", "path=c"]), expected);
    assert_eq!(
        paths(&["--disk", "path=a", "--cpus", "boot=1", "--disk=path=b", "--disk", "path=c"]),
        expected
    );
}

#[test]
fn a_vm_without_flags_of_its_devices_has_the_contracts_defaults() {
    let options = run(&["--kernel", "k"]);
    let Checked { config, spec } = options.config.unwrap();
    assert_eq!((spec.cpus.boot, spec.cpus.max, spec.memory.total()), (1, 1, Bytes::mib(512)));
    assert_eq!((spec.serial, spec.console.unwrap().sink), (Some(Sink::Null), Sink::Tty));
    assert_eq!(spec.rng.source, PathBuf::from("/dev/urandom"));
    assert!(config.rng.id.is_some(), "automatic ids are filled in");
    assert_eq!(options.api_socket, None);
    assert_eq!(options.log, LogOptions::default());
    assert_eq!((options.seccomp, options.unknown_fields), (SeccompMode::Enforce, UnknownFields::Refuse));
}

#[test]
fn warnings_name_flags() {
    let warnings = spec(&["--disk", "path=a"]).warnings;
    assert!(warnings.iter().any(|warning| warning.path.starts_with("--disk image_type")), "{warnings:?}");
}

#[test]
fn each_flag_of_the_process_arrives() {
    let socket = |value: &str| run(&["--api-socket", value]).api_socket.unwrap();
    assert_eq!(socket("path=/a,b"), ApiSocketArg::Path("/a,b".into()));
    assert_eq!(socket("/a=b"), ApiSocketArg::Path("/a=b".into()));
    assert_eq!(socket("fd=3"), ApiSocketArg::Fd(3));
    assert!(run(&["--api-socket", "s"]).config.is_none());

    let with = |args: &[&str]| run(&[&["--api-socket", "s"], args].concat());
    let monitor = |args: &[&str]| with(args).event_monitor;
    assert_eq!(monitor(&[]), None);
    let path = MonitorTarget::Path("/a=b".into());
    assert_eq!(monitor(&["--event-monitor", "path=/a=b"]), Some(path));
    assert_eq!(monitor(&["--event-monitor", "fd=3"]), Some(MonitorTarget::Fd(3)));
    let level = |args: &[&str]| with(args).log.level;
    let levels = [level(&["-v"]), level(&["-vv"]), level(&["-v", "-v", "-v"]), level(&["-vvvvv"])];
    assert_eq!(levels, [LevelFilter::Info, LevelFilter::Debug, LevelFilter::Trace, LevelFilter::Trace]);
    let log = with(&["--log-file", "l", "--log-format", "json", "--log-filter", "vmm_pci=debug"]).log;
    assert_eq!((log.file, log.format), (Some("l".into()), LogFormat::Json));
    assert_eq!(log.filter, "vmm_pci=debug".parse().unwrap());
    assert_eq!(with(&["--log-format", "text"]).log, LogOptions::default());
    assert_eq!(with(&["--boot-trace", "t"]).boot_trace, Some("t".into()));
    assert_eq!(with(&[]).boot_trace, None);
    let seccomp = |word| with(&["--seccomp", word]).seccomp;
    let modes = [seccomp("true"), seccomp("log"), seccomp("false"), seccomp("errno")];
    assert_eq!(modes, [SeccompMode::Enforce, SeccompMode::Log, SeccompMode::Off, SeccompMode::Errno]);
    assert!(with(&["--no-landlock"]).no_landlock && !with(&[]).no_landlock);
    assert!(with(&["--verify-state"]).verify_state && !with(&[]).verify_state);
    assert_eq!(with(&["--unknown-fields=warn"]).unknown_fields, UnknownFields::Warn);
    assert_eq!(with(&["--unknown-fields=refuse"]).unknown_fields, UnknownFields::Refuse);
}

#[test]
fn bad_values_of_process_flags_are_named() {
    let table: [(&[&str], &str); 12] = [
        (&["--api-socket", ""], "--api-socket: expected path=<path>, fd=<number> or a path, found nothing"),
        (
            &["--api-socket", "path="],
            "--api-socket: expected path=<path>, fd=<number> or a path, found nothing",
        ),
        (&["--api-socket", "fd=x"], "--api-socket fd: expected a file descriptor's number, found \"x\""),
        (
            &["--api-socket", "fd=2"],
            "--api-socket fd: 2 is not the number of an inherited socket: it must be above 2",
        ),
        (
            &["--api-socket", "s", "--event-monitor", "path="],
            "--event-monitor: expected path=<path> or fd=<number>, found \"path=\"",
        ),
        (
            &["--api-socket", "s", "--event-monitor", "/events"],
            "--event-monitor: expected path=<path> or fd=<number>, found \"/events\"",
        ),
        (
            &["--api-socket", "s", "--event-monitor", "fd=x"],
            "--event-monitor fd: expected a file descriptor's number, found \"x\"",
        ),
        (
            &["--api-socket", "s", "--event-monitor", "fd=1"],
            "--event-monitor fd: 1 is not the number of an inherited descriptor: it must be above 2",
        ),
        (
            &["--api-socket", "s", "--seccomp", "on"],
            "--seccomp: expected true, false, log or errno, found \"on\"",
        ),
        (&["--api-socket", "s", "--log-format", "xml"], "--log-format: expected text or json, found \"xml\""),
        (
            &["--api-socket", "s", "--log-filter", "vmm_pci"],
            "--log-filter: expected MODULE=LEVEL with a level of off, error, warn, info, debug or trace, found \"vmm_pci\"",
        ),
        (
            &["--api-socket", "s", "--unknown-fields", ""],
            "--unknown-fields: expected refuse or warn, found \"\"",
        ),
    ];
    for (args, expected) in table {
        assert_eq!(error(args), expected);
    }
}

#[test]
fn all_faults_are_reported_at_once() {
    let text = error(&[
        "--seccomp",
        "maybe",
        "--gdb",
        "path=e",
        "--cpus",
        "bot=1",
        "--disk",
        "path=a",
        "path=b,num_queue=1",
    ]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "4 faults on the command line:");
    assert_eq!(lines[1], "  --gdb: not supported by this build yet: the GDB stub");
    assert_eq!(lines[2], "  --seccomp: expected true, false, log or errno, found \"maybe\"");
    assert_eq!(lines[3], "  --cpus bot: unknown key; did you mean \"boot\"?");
    assert_eq!(lines[4], "  --disk[1] num_queue: unknown key; did you mean \"num_queues\"?");
    assert_eq!(lines.len(), 5);
}

#[test]
fn what_flags_mean_together_is_checked() {
    assert_eq!(error(&["--cpus", "boot=2"]), "--kernel: is required, with a kernel or firmware");
    let found = faults(&["--kernel", "k", "--cpus", "boot=4,max=2"]);
    assert!(found.iter().all(|fault| fault.path.starts_with("--cpus ")), "{found:?}");
    let found = faults(&["--kernel", "k", "--disk", "path=a,id=x", "path=b,id=x"]);
    assert!(found.iter().any(|fault| fault.path.starts_with("--disk")), "{found:?}");
}

#[test]
fn what_may_be_given_once_is_not_overlooked_the_second_time() {
    assert_eq!(error(&["--kernel", "a", "--kernel", "b"]), "--kernel: given twice");
    assert!(error(&["--api-socket", "a", "--api-socket", "b"]).contains("'--api-socket"));
}

#[test]
fn nothing_to_do_shows_what_would_be_something() {
    assert_eq!(parsed(&[]).unwrap_err(), UsageError::NothingToDo);
    assert_eq!(parsed(&["-v", "--seccomp", "log"]).unwrap_err(), UsageError::NothingToDo);
    let text = error(&[]);
    for line in text.lines().filter(|line| line.contains(":  ")) {
        let args: Vec<&str> = line.split_whitespace().skip_while(|word| *word != "vmm").skip(1).collect();
        run(&args);
    }
    assert_eq!(text.matches(":  ").count(), 2, "{text}");
}

#[test]
fn what_is_no_flag_is_a_usage_error() {
    assert!(error(&["--kernl", "k"]).contains("'--kernel'"), "the nearest flag is named");
    assert!(error(&["--kernel"]).starts_with("a value is required for '--kernel <PATH>'"));
    assert!(error(&["k"]).contains("'k'"));
    assert!(error(&["doctor", "--kernel", "k"]).contains("'--kernel'"));
    let invalid = OsString::from_vec(b"k\xff".to_vec());
    let args = ["vmm".into(), "--kernel".into(), invalid];
    assert!(matches!(parse(args), Err(UsageError::Arguments(text)) if text.contains("UTF-8")));
    assert!(matches!(parse([]), Err(UsageError::NothingToDo)));
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for flag in FLAGS.iter().filter(|flag| !SHOWN.iter().any(|(_, names)| names.contains(&flag.name))) {
        let dashed = format!("--{}", flag.name);
        let mut args = vec!["--kernel", "k", &dashed];
        if flag.arity() != Arity::Switch {
            args.push(sample(flag.name));
        }
        let found = faults(&args);
        assert!(
            found.iter().any(|fault| fault.kind == FaultKind::NotBuilt && fault.path.starts_with(&dashed)),
            "{args:?}: {found:?}",
        );
    }
    for flag in LATER {
        let dashed = format!("--{}", flag.name);
        let found = faults(&["--kernel", "k", &dashed, "x=y"][..if flag.has_value { 4 } else { 3 }]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].kind, &found[0].path), (FaultKind::NotBuilt, &dashed));
    }
}

/// An option string with what the flag's object requires.
fn sample(flag: &str) -> &'static str {
    match flag {
        "rate-limit-group" => "id=g,bw_size=1,bw_refill_time=1",
        "net" => "tap=t",
        "balloon" => "size=1M",
        "fs" => "tag=t,socket=s",
        "generic-vhost-user" => "socket=s,virtio_id=1,queue_sizes=[1]",
        "pmem" => "file=f",
        "device" | "vdpa" => "path=p",
        "user-device" | "tpm" => "socket=s",
        "vsock" => "cid=3,socket=s",
        "numa" => "guest_numa_id=0",
        "rtc" => "",
        "pci-segment" => "pci_segment=1",
        "landlock-rules" => "path=/,access=rw",
        "ivshmem" => "path=p,size=1M",
        "fw-cfg-config" => "e820=off",
        _ => "x",
    }
}

#[test]
fn help_is_grouped_and_has_the_keys() {
    let (short, long) = (text(&["-h"]), text(&["--help"]));
    for page in [&short, &long] {
        for (heading, names) in SHOWN {
            assert!(page.contains(&format!("\n{heading}:\n")), "{heading}");
            for name in *names {
                let switch = Flag::by_name(name).unwrap().arity() == Arity::Switch;
                let end = if switch { "" } else { " <" };
                assert!(page.contains(&format!("  --{name}{end}")), "{name}");
            }
        }
        assert!(page.contains("\nExamples:\n") && page.contains("vmm doctor"));
        assert!(!page.contains("--net <"), "what is not built is no flag to a newcomer");
    }
    assert!(short.lines().count() < 75, "the short page is short:\n{short}");
    for key in
        ["boot=<number>", "size=<size>", "[default: 512M]", "path=<path>", "image_type=unknown", "src=<path>"]
    {
        assert!(long.contains(key), "{key}");
        assert!(!short.contains(key), "{key}");
    }
    assert!(long.contains("Not in this build yet, refused by name:\n  --"));
    assert!(long.contains(" --net ") && long.contains(" --gdb "));
    assert!(text(&["doctor", "--help"]).contains("--json"));
}

#[test]
fn the_examples_of_the_help_are_right() {
    let long = text(&["--help"]).replace("\\\n", " ");
    let examples = long.lines().skip_while(|line| *line != "Examples:").map(str::trim);
    let mut seen = 0;
    for example in examples.filter_map(|line| line.strip_prefix("vmm ")) {
        let pieces: Vec<&str> = example.split('"').collect();
        let args: Vec<&str> = pieces
            .iter()
            .enumerate()
            .flat_map(
                |(at, piece)| if at % 2 == 1 { vec![*piece] } else { piece.split_whitespace().collect() },
            )
            .collect();
        assert!(run(&args).config.is_some(), "{example}");
        seen += 1;
    }
    assert_eq!(seen, 3);
}

#[test]
fn the_version_is_the_contracts_under_the_contracts_name() {
    let printed = |name: &str| match parse([name, "--version"].map(OsString::from)) {
        Ok(Invocation::Print(text)) => text,
        other => panic!("{other:?}"),
    };
    for name in ["cloud-hypervisor", "/usr/bin/cloud-hypervisor", "./cloud-hypervisor"] {
        assert_eq!(printed(name), format!("cloud-hypervisor {CONTRACT_VERSION}\n"), "{name}");
    }
    let own = concat!("vmm v", env!("CARGO_PKG_VERSION"), "\n");
    for name in ["vmm", "/cloud-hypervisor/vmm", "cloud-hypervisor-static", "", "cloud-hypervisor/.."] {
        assert_eq!(printed(name), own, "{name}");
    }
    // As libvirt reads it: three numbers after an optional v.
    let numbers: Vec<u32> =
        CONTRACT_VERSION.trim_start_matches('v').split('.').map(|n| n.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 3);
}

#[test]
fn version_and_doctor() {
    for flag in ["-V", "--version"] {
        assert_eq!(text(&[flag]), concat!("vmm v", env!("CARGO_PKG_VERSION"), "\n"));
    }
    assert!(matches!(parsed(&["doctor"]), Ok(Invocation::Doctor { json: false })));
    assert!(matches!(parsed(&["doctor", "--json"]), Ok(Invocation::Doctor { json: true })));
    assert!(matches!(parsed(&["snapshot", "verify", "dir"]), Ok(Invocation::Snapshot(_))));
    assert!(
        text(&["snapshot", "merge", "-h"]).contains("\nUsage: vmm snapshot merge [OPTIONS] <DIR> <NEW>\n")
    );
}

#[test]
fn subcommands_are_made_only_when_they_are_asked_for() {
    assert_eq!(
        command::command(Help::Brief, "vmm".as_ref()).get_subcommands().count(),
        0,
        "each start would pay for them"
    );
    assert!(matches!(parsed(&["ctl", "--api-socket", "s", "info"]), Ok(Invocation::Ctl(_))));
    assert!(text(&["ctl", "-h"]).contains("\nUsage: vmm ctl [OPTIONS] <COMMAND>\n"));
    assert!(text(&["ctl", "resize", "-h"]).contains("\nUsage: vmm ctl resize [OPTIONS]\n"));
    assert!(text(&["completion", "bash"]).contains("add-generic-vhost-user"));
    // Their names are no values of other flags, and mistakes are helped.
    assert!(error(&["-v", "ctl", "info"]).contains("ctl"));
    assert!(error(&["doctr"]).contains("'doctor'"));
    let as_contract = |args: &[&str]| parse(["/usr/bin/ch-remote"].iter().chain(args).map(OsString::from));
    assert!(matches!(as_contract(&["--api-socket", "path=s", "info"]), Ok(Invocation::Ctl(_))));
    assert!(as_contract(&["doctor"]).is_err());
}
