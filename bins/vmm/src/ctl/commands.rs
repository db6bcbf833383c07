//! Each command of the API as a subcommand: its arguments, its request, its reply.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, value_parser};
use vmm_api::command::Command;
use vmm_api::commands::device::{self, Added};
use vmm_api::commands::{vm, vmm};
use vmm_api::config::{
    Bytes, Fault, FaultKind, LogLevel, LogLevelConfig, NetConfig, ReceiveMigrationData, RestoreConfig,
    SendMigrationData, VmCoredumpData, VmRemoveDevice, VmResize, VmResizeDisk, VmResizeZone,
    VmSnapshotConfig,
};
use vmm_api::info::{CountersReply, JsonText, OpenMetrics, PingReply, ValidateReply, VmInfo};
use vmm_api::options::FromOptions;
use vmm_api::progress::MigrationProgressReply;

use super::rows::{Ask, Shown, Subcommand};
use super::show;
use super::words::{file_url, is_url, size};
use crate::cli;

type Asked<C> = Result<Ask<<C as Command>::Request>, Vec<Fault>>;

/// Subcommands without arguments, by what shows their reply.
macro_rules! plain {
    ($($command:ty: $word:literal => $show:path;)*) => {$(
        impl Subcommand for $command {
            const WORD: &'static str = $word;

            fn arguments() -> Vec<Arg> {
                Vec::new()
            }

            fn applies(_given: &ArgMatches) -> bool {
                true
            }

            fn request(_given: &ArgMatches) -> Asked<Self> {
                Ok(Ask::Made((), Vec::new()))
            }

            fn show(reply: Self::Reply) -> Shown {
                $show(&reply)
            }
        }
    )*};
}

plain! {
    vmm::Ping: "ping" => ping;
    vmm::Shutdown: "shutdown-vmm" => done;
    vmm::OpenApi: "openapi" => document;
    vmm::Metrics: "metrics" => metrics;
    vm::Boot: "boot" => done;
    vm::Info: "info" => info;
    vm::Counters: "counters" => counters;
    vm::BootTrace: "boot-trace" => document;
    vm::MigrationProgress: "migration-progress" => migration;
    vm::MigrationKeep: "migration-keep" => done;
    vm::MigrationYield: "migration-yield" => done;
    vm::Pause: "pause" => done;
    vm::Resume: "resume" => done;
    vm::Cancel: "cancel" => done;
    vm::Shutdown: "shutdown" => done;
    vm::Reboot: "reboot" => done;
    vm::Delete: "delete" => done;
    vm::PowerButton: "power-button" => done;
    vm::Nmi: "nmi" => done;
}

/// Subcommands whose request is made of their arguments, and whose reply says nothing.
macro_rules! with_arguments {
    ($($command:ty: $word:literal, $arguments:path => $request:path;)*) => {$(
        impl Subcommand for $command {
            const WORD: &'static str = $word;

            fn arguments() -> Vec<Arg> {
                $arguments().into()
            }

            fn applies(_given: &ArgMatches) -> bool {
                true
            }

            fn request(given: &ArgMatches) -> Asked<Self> {
                Ok(Ask::Made($request(given), Vec::new()))
            }

            fn show(reply: Self::Reply) -> Shown {
                done(&reply)
            }
        }
    )*};
}

with_arguments! {
    vm::ResizeDisk: "resize-disk", resize_disk_arguments => resize_disk;
    vm::ResizeZone: "resize-zone", resize_zone_arguments => resize_zone;
    vm::Snapshot: "snapshot", snapshot_arguments => snapshot;
    vm::Coredump: "coredump", coredump_arguments => coredump;
    device::RemoveDevice: "remove-device", remove_arguments => remove;
}

fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

fn positional(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).value_name(value).required(true).help(help)
}

fn text(given: &ArgMatches, name: &str) -> String {
    given.get_one::<String>(name).cloned().unwrap_or_default()
}

fn bytes(given: &ArgMatches, name: &str) -> Option<Bytes> {
    given.get_one::<u64>(name).copied().map(Bytes)
}

impl Subcommand for vm::Resize {
    const WORD: &'static str = "resize";

    fn arguments() -> Vec<Arg> {
        vec![
            option("cpus", "NUMBER", "vCPUs").value_parser(value_parser!(u32)),
            option("memory", "SIZE", "Guest memory").value_parser(size),
            option("balloon", "SIZE", "Size of the balloon").value_parser(size),
        ]
    }

    fn applies(_given: &ArgMatches) -> bool {
        true
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        let request = VmResize {
            desired_vcpus: given.get_one("cpus").copied(),
            desired_ram: bytes(given, "memory"),
            desired_balloon: bytes(given, "balloon"),
        };
        if request == VmResize::default() {
            let message = "there is nothing to change: give --cpus, --memory or --balloon";
            return Err(vec![Fault::new(Self::WORD, FaultKind::Invalid, message)]);
        }
        Ok(Ask::Made(request, Vec::new()))
    }

    fn show(reply: Self::Reply) -> Shown {
        done(&reply)
    }
}

fn resize_disk_arguments() -> [Arg; 2] {
    [
        option("disk", "ID", "The disk").visible_alias("id").required(true),
        option("size", "SIZE", "Its new size").value_parser(size).required(true),
    ]
}

fn resize_disk(given: &ArgMatches) -> VmResizeDisk {
    VmResizeDisk { id: text(given, "disk"), desired_size: bytes(given, "size").unwrap_or_default() }
}

fn resize_zone_arguments() -> [Arg; 2] {
    [
        option("id", "ID", "The memory zone").required(true),
        option("size", "SIZE", "Its new size").value_parser(size).required(true),
    ]
}

fn resize_zone(given: &ArgMatches) -> VmResizeZone {
    VmResizeZone { id: text(given, "id"), desired_ram: bytes(given, "size").unwrap_or_default() }
}

fn snapshot_arguments() -> [Arg; 4] {
    let switch = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
    };
    [
        positional("url", "URL", "The folder, file:///FOLDER or /FOLDER"),
        switch("live", "Let the guest run on meanwhile"),
        switch("incremental", "Write only what changed since the snapshot that is kept track of"),
        switch("track", "Keep track of what changes from now on, for an incremental snapshot"),
    ]
}

fn snapshot(given: &ArgMatches) -> VmSnapshotConfig {
    VmSnapshotConfig {
        destination_url: file_url(&text(given, "url")),
        live: given.get_flag("live"),
        incremental: given.get_flag("incremental"),
        track: given.get_flag("track"),
    }
}

fn coredump_arguments() -> [Arg; 1] {
    [positional("url", "URL", "The file, file:///FILE or /FILE")]
}

fn coredump(given: &ArgMatches) -> VmCoredumpData {
    VmCoredumpData { destination_url: file_url(&text(given, "url")) }
}

fn remove_arguments() -> [Arg; 1] {
    [positional("id", "ID", "The device, as `info` names it")]
}

fn remove(given: &ArgMatches) -> VmRemoveDevice {
    VmRemoveDevice { id: text(given, "id") }
}

/// Subcommands that add a device by its option string.
macro_rules! add {
    ($($command:ty: $word:literal, $fds:path;)*) => {$(
        impl Subcommand for $command {
            const WORD: &'static str = $word;

            fn arguments() -> Vec<Arg> {
                vec![options::<<Self as Command>::Request>()]
            }

            fn applies(_given: &ArgMatches) -> bool {
                true
            }

            fn request(given: &ArgMatches) -> Asked<Self> {
                let mut device = FromOptions::from_options(Self::WORD, &text(given, OPTIONS))?;
                let fds = $fds(&mut device);
                Ok(Ask::Made(device, fds))
            }

            fn show(reply: Self::Reply) -> Shown {
                added(reply)
            }
        }
    )*};
}

add! {
    device::AddDevice: "add-device", no_descriptors;
    device::AddUserDevice: "add-user-device", no_descriptors;
    device::AddFs: "add-fs", no_descriptors;
    device::AddGenericVhostUser: "add-generic-vhost-user", no_descriptors;
    device::AddPmem: "add-pmem", no_descriptors;
    device::AddNet: "add-net", net_descriptors;
    device::AddVdpa: "add-vdpa", no_descriptors;
    device::AddVsock: "add-vsock", no_descriptors;
    device::AddDisk: "add-disk", no_descriptors;
}

const OPTIONS: &str = "options";
const KEYS: &str = "KEY=VALUE,...";

fn options<T: FromOptions>() -> Arg {
    let keys = format!("The device, key=value,key=value:\n\n{}", T::option_help());
    positional(OPTIONS, KEYS, "The device, key=value,key=value").long_help(keys)
}

fn no_descriptors<T>(_device: &mut T) -> Vec<i32> {
    Vec::new()
}

/// Numbers mean nothing to another process: the descriptors themselves are sent.
fn net_descriptors(net: &mut NetConfig) -> Vec<i32> {
    net.fds.take().unwrap_or_default()
}

impl Subcommand for vm::Create {
    const WORD: &'static str = "create";

    fn arguments() -> Vec<Arg> {
        let file = Arg::new("file").value_name("FILE").value_parser(ValueParser::path_buf());
        let file = file.help("The configuration as JSON; - or nothing is standard input");
        [file].into_iter().chain(cli::vm_arguments()).collect()
    }

    fn applies(_given: &ArgMatches) -> bool {
        true
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        let mut faults = Vec::new();
        let Some(checked) = cli::vm_of(given, &mut faults) else {
            return if faults.is_empty() { Ok(Ask::Document(file(given))) } else { Err(faults) };
        };
        if given.contains_id("file") {
            let message = "contradicts the flags: a VM comes of one or the other";
            return Err(vec![Fault::new("FILE", FaultKind::Invalid, message)]);
        }
        let request = vm::CreateRequest { config: checked.config, spec: checked.spec, fds: Vec::new() };
        Ok(Ask::Made(request, Vec::new()))
    }

    fn show(reply: Self::Reply) -> Shown {
        done(&reply)
    }
}

impl Subcommand for vm::Validate {
    const WORD: &'static str = "validate";

    fn arguments() -> Vec<Arg> {
        let file = Arg::new("file").value_name("FILE").value_parser(ValueParser::path_buf());
        vec![file.help("The configuration as JSON; - or nothing is standard input")]
    }

    fn applies(_given: &ArgMatches) -> bool {
        true
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        Ok(Ask::Document(file(given)))
    }

    fn show(reply: ValidateReply) -> Shown {
        Shown { text: crate::validate::as_text(&reply), success: reply.valid }
    }
}

/// The file that is named; `None` is standard input.
fn file(given: &ArgMatches) -> Option<PathBuf> {
    given.get_one::<PathBuf>("file").filter(|file| file.as_os_str() != "-").cloned()
}

impl Subcommand for vm::Restore {
    const WORD: &'static str = "restore";

    fn arguments() -> Vec<Arg> {
        let mut arguments =
            vec![url_or_options::<RestoreConfig>("The snapshot's folder, file:///FOLDER or /FOLDER")];
        let helps = [
            ("id=ID,path=PATH", "Another image of a disk"),
            ("MODE", "Where the serial port goes"),
            ("MODE", "Where virtio-console goes"),
            ("MODE", "Where the debug console goes"),
        ];
        let flags = cli::OVERRIDES.into_iter().zip(helps);
        arguments
            .extend(flags.map(|(name, (value, help))| option(name, value, help).action(ArgAction::Append)));
        arguments
    }

    fn applies(_given: &ArgMatches) -> bool {
        true
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        let of_url = |source_url| RestoreConfig { source_url, ..RestoreConfig::default() };
        let (mut request, mut faults) = (made::<RestoreConfig>(Self::WORD, given, of_url)?, Vec::new());
        cli::overrides(given, &mut request, &mut faults);
        if !faults.is_empty() {
            return Err(faults);
        }
        let mut fds = Vec::new();
        for net in request.net_fds.iter_mut().flatten() {
            let of_device = net.fds.take().unwrap_or_default();
            net.num_fds = u32::try_from(of_device.len()).unwrap_or(u32::MAX);
            fds.extend(of_device);
        }
        Ok(Ask::Made(request, fds))
    }

    fn show(reply: Self::Reply) -> Shown {
        done(&reply)
    }
}

impl Subcommand for vm::SendMigration {
    const WORD: &'static str = "send-migration";

    fn arguments() -> Vec<Arg> {
        let local = Arg::new("local").long("local").action(ArgAction::SetTrue);
        vec![
            url_or_options::<SendMigrationData>("Where to, unix:/PATH or tcp:HOST:PORT"),
            local.help("Pass memory by descriptors to a VMM on this host"),
            flag("check", "Only ask whether the destination would take the VM"),
            flag("detach", "Answer at once; migration-progress and events tell how it ends"),
            flag("preserve-source", "The VMM stays, without a VM, when the VM is elsewhere"),
            flag("auto-converge", "Slow vCPUs down while memory changes faster than the link carries it"),
        ]
    }

    fn applies(_given: &ArgMatches) -> bool {
        true
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        let of_url = |destination_url| SendMigrationData { destination_url, ..SendMigrationData::default() };
        let mut request = made::<SendMigrationData>(Self::WORD, given, of_url)?;
        request.local |= given.get_flag("local");
        request.check |= given.get_flag("check");
        request.detach |= given.get_flag("detach");
        request.preserve_source |= given.get_flag("preserve-source");
        request.auto_converge |= given.get_flag("auto-converge");
        Ok(Ask::Made(request, Vec::new()))
    }

    fn show(reply: Self::Reply) -> Shown {
        done(&reply)
    }
}

impl Subcommand for vm::ReceiveMigration {
    const WORD: &'static str = "receive-migration";

    fn arguments() -> Vec<Arg> {
        vec![
            url_or_options::<ReceiveMigrationData>("Where to listen, unix:/PATH or tcp:HOST:PORT"),
            flag(
                "detach",
                "Answer as soon as a source can come; migration-progress and events tell how it ends",
            ),
        ]
    }

    fn applies(_given: &ArgMatches) -> bool {
        true
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        let of_url = |receiver_url| ReceiveMigrationData { receiver_url, ..ReceiveMigrationData::default() };
        let mut request = made::<ReceiveMigrationData>(Self::WORD, given, of_url)?;
        request.detach |= given.get_flag("detach");
        Ok(Ask::Made(request, Vec::new()))
    }

    fn show(reply: Self::Reply) -> Shown {
        done(&reply)
    }
}

fn url_or_options<T: FromOptions>(help: &str) -> Arg {
    let keys = format!("{help}; or key=value,key=value:\n\n{}", T::option_help());
    Arg::new(OPTIONS).value_name("URL|KEY=VALUE,...").required(true).help(help.to_owned()).long_help(keys)
}

/// The object of a URL alone, or of an option string.
fn made<T: FromOptions>(
    word: &str,
    given: &ArgMatches,
    of_url: impl FnOnce(String) -> T,
) -> Result<T, Vec<Fault>> {
    let text = text(given, OPTIONS);
    if is_url(&text) { Ok(of_url(file_url(&text))) } else { T::from_options(word, &text) }
}

/// Without a level it asks, with one it sets.
impl Subcommand for vmm::LogLevel {
    const WORD: &'static str = "log-level";

    fn arguments() -> Vec<Arg> {
        let words = LogLevel::WORDS.iter().map(|word| word.json);
        let level = Arg::new("level").value_name("LEVEL").value_parser(PossibleValuesParser::new(words));
        vec![level.ignore_case(true).help("The least important messages that are logged from now on")]
    }

    fn applies(given: &ArgMatches) -> bool {
        !given.contains_id("level")
    }

    fn request(_given: &ArgMatches) -> Asked<Self> {
        Ok(Ask::Made((), Vec::new()))
    }

    fn show(reply: LogLevelConfig) -> Shown {
        Shown::text(format!("{}\n", reply.level.word()))
    }
}

impl Subcommand for vmm::SetLogLevel {
    const WORD: &'static str = vmm::LogLevel::WORD;

    fn arguments() -> Vec<Arg> {
        vmm::LogLevel::arguments()
    }

    fn applies(given: &ArgMatches) -> bool {
        !vmm::LogLevel::applies(given)
    }

    fn request(given: &ArgMatches) -> Asked<Self> {
        let options = format!("level={}", text(given, "level"));
        Ok(Ask::Made(FromOptions::from_options(Self::WORD, &options)?, Vec::new()))
    }

    fn show(_before: LogLevelConfig) -> Shown {
        Shown::text(String::new())
    }
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

fn migration(reply: &MigrationProgressReply) -> Shown {
    Shown::text(show::migration(reply))
}

fn done((): &()) -> Shown {
    Shown::text(String::new())
}

fn added(reply: Added) -> Shown {
    Shown::text(match reply {
        Added::Cold => String::new(),
        Added::Hot(device) => format!("{} {}\n", show::plain(&device.id), show::plain(&device.bdf)),
    })
}

fn document(reply: &JsonText) -> Shown {
    Shown::text(reply.0.clone())
}

fn metrics(reply: &OpenMetrics) -> Shown {
    Shown::text(reply.0.clone())
}

fn ping(reply: &PingReply) -> Shown {
    let PingReply { version, build_version, pid, features } = reply;
    let mut text = show::plain(if build_version.is_empty() { version } else { build_version });
    // Writing to a String cannot fail; older VMMs do not say who they are.
    if *pid != 0 {
        let _ = write!(text, ", process {pid}");
    }
    if !features.is_empty() {
        let _ = write!(text, ", with {}", show::plain(&features.join(", ")));
    }
    Shown::text(text + "\n")
}

fn info(reply: &VmInfo) -> Shown {
    Shown::text(show::info(reply))
}

fn counters(reply: &CountersReply) -> Shown {
    Shown::text(show::counters(reply))
}
