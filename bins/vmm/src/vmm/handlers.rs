//! The commands, carried out.

use std::sync::{Arc, LazyLock};

use log::LevelFilter;
use vmm_api::command::{ApiRequest, Command, Handle, Host, Replier};
use vmm_api::commands::device::{self, AddCommand, Added};
use vmm_api::commands::{operations, vm, vmm};
use vmm_api::config::{
    LogLevel, LogLevelConfig, ReceiveMigrationData, RestoreConfig, SendMigrationData, VmRemoveDevice,
    VmSnapshotConfig,
};
use vmm_api::error::{ApiError, Code};
use vmm_api::info::{CountersReply, JsonText, OpenMetrics, PingReply, ValidateReply, VmInfo};
use vmm_api::openapi::document;
use vmm_api::progress::MigrationProgressReply;
use vmm_api::spec::{Checked, with_device, without_device};
use vmm_state::Phase;

use super::boot::Asker;
use super::waiting::Verdict;
use super::{Vmm, VmmError};
use crate::exit::ExitCode;
use crate::{logger, metrics, preflight};

impl Host for Vmm {
    fn phase(&self) -> Phase {
        self.slot.phase()
    }

    fn park(&mut self, request: ApiRequest<Self>) {
        self.wait_for_job(request);
    }

    fn publish(&mut self) {
        self.post_info();
    }
}

/// A command whose work is one fallible step.
macro_rules! handle {
    ($command:ty, |$vmm:ident| $work:expr) => {
        impl Handle<$command> for Vmm {
            fn handle(&mut self, (): (), replier: Replier<()>) {
                let $vmm = self;
                let result: Result<(), VmmError> = $work;
                replier.reply(result.map_err(|error| ApiError::from_error(Code::Internal, &error)));
            }
        }
    };
}

handle!(vm::Pause, |vmm| vmm.pause());
handle!(vm::Resume, |vmm| vmm.resume());
handle!(vm::Nmi, |vmm| vmm.raise_nmi());
handle!(vm::PowerButton, |vmm| vmm.press_power_button());
handle!(vmm::Shutdown, |vmm| {
    vmm.end(ExitCode::Success);
    Ok(())
});

/// Answered when what the machine held is free again.
impl Handle<vm::Shutdown> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        self.stop_then(move || replier.reply(Ok(())));
    }
}

/// As above.
impl Handle<vm::Delete> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        self.remove_then(move || replier.reply(Ok(())));
    }
}

impl Handle<vm::Boot> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        if self.phase() == Phase::Paused {
            <Self as Handle<vm::Resume>>::handle(self, (), replier);
        } else {
            self.boot_for(Asker::Client(replier));
        }
    }
}

impl Handle<vm::Reboot> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        self.reboot_for(Asker::Client(replier));
    }
}

impl Handle<vm::Snapshot> for Vmm {
    fn handle(&mut self, request: VmSnapshotConfig, replier: Replier<()>) {
        self.save_for(&request, replier);
    }
}

impl Handle<vm::Cancel> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        self.cancel_job(replier);
    }
}

impl Handle<vm::SendMigration> for Vmm {
    fn handle(&mut self, request: SendMigrationData, replier: Replier<()>) {
        self.send_for(&request, replier);
    }
}

impl Handle<vm::ReceiveMigration> for Vmm {
    fn handle(&mut self, request: ReceiveMigrationData, replier: Replier<()>) {
        self.receive_for(&request, replier);
    }
}

impl Handle<vm::MigrationProgress> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<MigrationProgressReply>) {
        replier.reply(Ok(self.jobs.moving.reply()));
    }
}

impl Handle<vm::MigrationKeep> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        self.decide_send(Verdict::Here, replier);
    }
}

impl Handle<vm::MigrationYield> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<()>) {
        self.decide_send(Verdict::Elsewhere, replier);
    }
}

impl Handle<vm::Restore> for Vmm {
    fn handle(&mut self, request: RestoreConfig, replier: Replier<()>) {
        self.restore_for(&request, Asker::Client(replier));
    }
}

impl Handle<vmm::Ping> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<PingReply>) {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        replier.reply(Ok(PingReply {
            build_version: format!("v{version}"),
            version,
            pid: std::process::id().into(),
            features: Vec::new(),
        }));
    }
}

/// Making the document takes milliseconds, so that is done once.
impl Handle<vmm::OpenApi> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<JsonText>) {
        static DOCUMENT: LazyLock<String> = LazyLock::new(|| document(&operations()).to_string());
        replier.reply(Ok(JsonText(DOCUMENT.clone())));
    }
}

impl Handle<vm::Create> for Vmm {
    fn handle(&mut self, request: vm::CreateRequest, replier: Replier<()>) {
        self.create(Checked { config: request.config, spec: request.spec });
        replier.reply(Ok(()));
    }
}

impl Handle<vm::Info> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<VmInfo>) {
        replier.reply(self.info());
    }
}

/// Configurations that are looked at at one time, at most.
const MOST_VALIDATING: usize = 4;

/// Files are looked at on a thread of its own: a kernel is loaded for trial.
impl Handle<vm::Validate> for Vmm {
    fn handle(&mut self, request: vm::ValidateRequest, replier: Replier<ValidateReply>) {
        let most_vcpus = self.means.hypervisor.max_vcpus();
        // Each may wait for a file that does not answer.
        if Arc::strong_count(&self.served.validating) > MOST_VALIDATING {
            let text = format!("{MOST_VALIDATING} configurations are looked at already");
            return replier.reply(Err(ApiError::new(Code::TooManyRequests, text)));
        }
        let one = Arc::clone(&self.served.validating);
        let work = move || {
            let report = preflight::report(request, most_vcpus);
            drop(one);
            replier.reply(Ok(report));
        };
        // A replier that is dropped answers with an error.
        if let Err(error) = std::thread::Builder::new().name("validate".to_owned()).spawn(work) {
            log::warn!("cannot start a thread to validate: {error}");
        }
    }
}

/// Commands that add a device to the configuration.
macro_rules! handle_add {
    ($($command:ident),+) => {$(
        impl Handle<device::$command> for Vmm {
            fn handle(&mut self, device: <device::$command as Command>::Request, replier: Replier<Added>) {
                replier.reply(self.add_device::<device::$command>(device));
            }
        }
    )+};
}

handle_add!(
    AddDevice,
    AddUserDevice,
    AddDisk,
    AddFs,
    AddGenericVhostUser,
    AddPmem,
    AddNet,
    AddVdpa,
    AddVsock
);

impl Handle<device::RemoveDevice> for Vmm {
    fn handle(&mut self, request: VmRemoveDevice, replier: Replier<()>) {
        replier.reply(self.edit(|config| without_device(config, &request.id)));
    }
}

impl Vmm {
    fn add_device<C: AddCommand>(&mut self, device: C::Request) -> Result<Added, ApiError> {
        self.edit(|config| with_device::<C>(config, device)).map(|()| Added::Cold)
    }

    /// Changes the configuration as a whole, or not at all.
    fn edit(
        &mut self,
        edit: impl FnOnce(&vmm_api::config::VmConfig) -> Result<Checked, ApiError>,
    ) -> Result<(), ApiError> {
        let configured = self.slot.config_mut().ok_or_else(super::no_vm)?;
        configured.edit(edit(&configured.wire)?);
        Ok(())
    }
}

impl Handle<vm::Counters> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<CountersReply>) {
        let machine = self.slot.machine().ok_or_else(super::no_vm);
        replier.reply(machine.map(|machine| CountersReply(machine.counters())));
    }
}

impl Handle<vm::BootTrace> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<JsonText>) {
        let machine = self.slot.machine().ok_or_else(super::no_vm);
        replier.reply(machine.map(|machine| JsonText(machine.boot_trace().json())));
    }
}

impl Handle<vmm::Metrics> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<OpenMetrics>) {
        let text = metrics::page(self.slot.machine(), self.served.answers.as_deref()).text();
        let failed = |error| ApiError::from_error(Code::Internal, &error);
        replier.reply(text.map(OpenMetrics).map_err(failed));
    }
}

impl Handle<vmm::LogLevel> for Vmm {
    fn handle(&mut self, (): (), replier: Replier<LogLevelConfig>) {
        replier.reply(Ok(LogLevelConfig { level: word_of(logger::level()) }));
    }
}

/// Answers the level before.
impl Handle<vmm::SetLogLevel> for Vmm {
    fn handle(&mut self, request: LogLevelConfig, replier: Replier<LogLevelConfig>) {
        let before = logger::set_level(filter_of(request.level));
        replier.reply(Ok(LogLevelConfig { level: word_of(before) }));
    }
}

const LEVELS: [(LogLevel, LevelFilter); 6] = [
    (LogLevel::Off, LevelFilter::Off),
    (LogLevel::Error, LevelFilter::Error),
    (LogLevel::Warn, LevelFilter::Warn),
    (LogLevel::Info, LevelFilter::Info),
    (LogLevel::Debug, LevelFilter::Debug),
    (LogLevel::Trace, LevelFilter::Trace),
];

fn word_of(filter: LevelFilter) -> LogLevel {
    LEVELS.iter().find(|(_, known)| *known == filter).map_or(LogLevel::Off, |(level, _)| *level)
}

fn filter_of(level: LogLevel) -> LevelFilter {
    LEVELS.iter().find(|(known, _)| *known == level).map_or(LevelFilter::Off, |(_, filter)| *filter)
}
