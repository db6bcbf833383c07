//! Boots. A machine is built on a thread of its own, so that clients are served meanwhile; where there are no clients
//! the control thread builds it.

use std::sync::Arc;

use vmm_api::command::{ApiRequest, Replier};
use vmm_api::error::{ApiError, Code};
use vmm_api::events::{Event, RebootCause};
use vmm_device_model::thread::ThreadHook;
use vmm_platform_devices::vm_generation::GenerationId;
use vmm_state::Phase;

use super::apart::{BootThread, Left, Made};
use super::receiving::Held;
use super::restore::{self, Origin, Restore};
use super::teardown::Teardown;
use super::{Vmm, VmmError, told};
use crate::console::{Console, Consoles};
use crate::exit::ExitCode;
use crate::lost_memory;
use crate::machine::ahead::Ahead;
use crate::machine::stages::{Stage, Stages};
use crate::machine::{EventPost, Locks, Machine, MachineError, Plan, Ports};
use crate::sandbox::Sandbox;
use crate::sandbox::paths::Beginning;

/// Requests that wait for the end of a boot or snapshot, at most: they hold places of the server's, and memory.
const MOST_WAITING: usize = 64;

/// A boot under way, and who waits for its end.
#[derive(Debug, Default)]
pub(super) struct Boot {
    /// Machines built so far, or tried.
    pub(super) machines: u64,
    /// The end of the machine before.
    pub(super) before: Teardown,
    pub(super) job: Option<Job>,
    /// In the order in which they came; also those that wait for a snapshot.
    pub(super) waiting: Vec<ApiRequest<Vmm>>,
    /// What is restored, if that is what the boot does.
    pub(super) restore: Option<Restore>,
    /// Number of the machine that the boot is to replace, for a reboot.
    replaces: Option<u64>,
    /// The VM of the command line does not boot.
    failed: Option<VmmError>,
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) asker: Asker,
    /// The consoles were opened for this boot.
    pub(super) fresh: bool,
    pub(super) thread: BootThread,
}

/// Who wants the boot, and is told how it ended.
#[derive(Debug)]
pub(super) enum Asker {
    /// A client.
    Client(Replier<()>),
    /// The guest, by a reset.
    Guest,
    /// Who started the process.
    CommandLine,
    /// The driver of a migration.
    Migration,
}

impl Vmm {
    /// Boots the VM of the command line. If that fails the VMM ends, and [`take_failure`](Self::take_failure) says why.
    pub fn boot_at_start(&mut self) {
        self.boot_for(Asker::CommandLine);
    }

    /// Why the VM of the command line does not boot, once.
    pub fn take_failure(&mut self) -> Option<VmmError> {
        self.boot.failed.take()
    }

    /// Begins to boot; `asker` is told of the end.
    pub(super) fn boot_for(&mut self, asker: Asker) {
        self.build_for(asker, None);
    }

    /// Builds a machine, of a snapshot if there is an `origin`, on a thread of its own; where there are no clients, on this
    /// one. Where that fails the VM is as it was.
    pub(super) fn build_for(&mut self, asker: Asker, origin: Option<Origin>) {
        let restores = origin.is_some();
        let begun = self.prepare(origin).and_then(|(build, fresh)| {
            if !restores {
                self.slot.begin_boot().map_err(|_| VmmError::NoVm)?;
            }
            if !self.policy.serves_clients {
                let (result, stages) = build.run();
                return self.settle_boot(result, stages, fresh).map(|()| None);
            }
            let post = build.post.clone();
            let work = move || Made::Built(Box::new(build.run()));
            match BootThread::start(post, work) {
                Ok(thread) => Ok(Some((thread, fresh))),
                Err(source) => {
                    let _ = self.slot.fail_boot();
                    self.close_consoles(fresh);
                    self.boot_ended(&Stages::default(), Err(VmmError::Thread(source)))
                }
            }
        });
        match begun {
            Ok(Some((thread, fresh))) => self.boot.job = Some(Job { asker, fresh, thread }),
            Ok(None) => self.tell(asker, Ok(())),
            Err(error) => self.tell(asker, Err(error)),
        }
    }

    /// Switches the machine off and boots again. The consoles go from one machine to the next.
    pub(super) fn reboot_for(&mut self, asker: Asker) {
        let cause = match &asker {
            Asker::Client(_) => RebootCause::Client,
            Asker::Guest | Asker::CommandLine | Asker::Migration => RebootCause::Guest,
        };
        self.note(&Event::Rebooting { cause });
        self.boot.replaces = self.slot.machine().map(Machine::number);
        self.drop_machine(|| ());
        self.boot_for(asker);
    }

    /// The same for a guest's reset.
    pub(super) fn restart(&mut self) {
        self.reboot_for(Asker::Guest);
    }

    /// A boot thread is done. What was given up is not waited for any more.
    pub(super) fn made(&mut self, number: u64) {
        if number != self.boot.machines {
            return;
        }
        let Some(made) = self.boot.job.as_ref().and_then(|job| job.thread.take()) else { return };
        let Some(Job { asker, fresh, thread }) = self.boot.job.take() else { return };
        // What it leaves is gone before anybody is told.
        thread.join();
        match made {
            Made::Loaded(result) => self.take_over(*result, asker),
            Made::Built(built) => {
                let (result, stages) = *built;
                let result = self.settle_boot(result, stages, fresh);
                self.tell(asker, result);
            }
        }
        self.go_on();
    }

    /// A boot or snapshot is over: those who waited for it are served. What has to wait again does.
    pub(super) fn go_on(&mut self) {
        for request in std::mem::take(&mut self.boot.waiting) {
            request.dispatch(self);
        }
    }

    /// Keeps a request until the boot or snapshot has ended.
    pub(super) fn wait_for_job(&mut self, request: ApiRequest<Self>) {
        if self.boot.waiting.len() < MOST_WAITING {
            return self.boot.waiting.push(request);
        }
        let text = format!("{MOST_WAITING} requests wait for the end of what is under way");
        request.refuse(ApiError::new(Code::TooManyRequests, text));
    }

    /// Nobody waits for the boot or restore any more: the VM is as it was before, and what is still made will be dropped. What is
    /// left of it comes back, if one was under way.
    pub(super) fn give_up_boot(&mut self, why: VmmError) -> Option<Left> {
        let Job { asker, fresh, thread } = self.boot.job.take()?;
        if let Some(restore) = &self.boot.restore {
            restore.cancel();
        }
        if matches!(asker, Asker::Migration) {
            // Its driver tells.
            self.boot.restore = None;
        } else {
            let result = self.boot_failed(&Stages::default(), fresh, why);
            self.tell(asker, result);
        }
        Some(thread.leave())
    }

    /// A machine that is made of what arrives is not wanted any more. Its driver is answered when nothing is left of it that can be
    /// waited for.
    pub(super) fn give_up_arrival(&mut self) {
        let Some(Job { fresh, thread, .. }) =
            self.boot.job.take_if(|job| matches!(job.asker, Asker::Migration))
        else {
            return;
        };
        if let Some(restore) = &self.boot.restore {
            restore.cancel();
        }
        let result = self.boot_failed(&Stages::default(), fresh, VmmError::Cancelled);
        let answer = self.receiver_answer(result);
        self.boot.before.outlast(thread.leave(), answer);
    }

    /// Cancels the boot or restore under way; `asker` is told when nothing is left of it that can be waited for. Gives the client
    /// back where there is none.
    pub(super) fn cancel_boot(&mut self, asker: Replier<()>) -> Option<Replier<()>> {
        if self.slot.phase() != Phase::Booting {
            return Some(asker);
        }
        let Some(left) = self.give_up_boot(VmmError::Cancelled) else { return Some(asker) };
        self.boot.before.outlast(left, move || asker.reply(Ok(())));
        self.go_on();
        None
    }

    /// What a machine is built from, with its consoles open; and whether they were opened now.
    fn prepare(&mut self, origin: Option<Origin>) -> Result<(Build, bool), VmmError> {
        let configured = self.slot.config_mut().ok_or(VmmError::NoVm)?;
        if origin.is_none() {
            self.boot.machines += 1;
            self.events.tell(self.boot.machines, &Event::Booting);
        }
        let mut stages = told::stages(&self.events, self.boot.machines);
        let beginning = origin.as_ref().map_or(Beginning::Boot, |origin| Beginning::Saved(origin.folders()));
        self.means.sandbox.confine_paths(&configured.spec, &beginning);
        let hypervisor = Ahead::ask(&self.means.hypervisor);
        let fresh = configured.consoles.is_none();
        let opened = stages.time(Stage::Console, || match configured.consoles.take() {
            Some(consoles) => Ok(consoles),
            None => Consoles::open(&configured.spec, self.means.sandbox.threads()),
        });
        let consoles = match opened {
            Ok(consoles) => consoles,
            Err(error) => {
                // Only a restore has begun already.
                let _ = self.slot.fail_boot();
                return self.boot_ended(&stages, Err(error.into()));
            }
        };
        let end = |console: &Option<Console>| console.as_ref().map(Console::end);
        let ports = Ports {
            serial: end(&consoles.serial),
            console: end(&consoles.console),
            debug: end(&consoles.debug),
        };
        configured.consoles = Some(consoles);
        let build = Build {
            hypervisor,
            spec: Arc::clone(&configured.spec),
            ports,
            post: EventPost::new(self.boot.machines, self.means.post.clone()),
            stages,
            threads: Arc::clone(self.means.sandbox.threads()),
            before: self.boot.before.take(),
            origin,
            generation: configured.generation,
        };
        Ok((build, fresh))
    }

    /// Runs the machine, or brings everything back to where the boot began.
    fn settle_boot(
        &mut self,
        result: Result<Machine, MachineError>,
        stages: Stages,
        fresh: bool,
    ) -> Result<(), VmmError> {
        // Without one of its paths the machine was not built, which said more of the reason.
        let confined = self.means.sandbox.confined();
        let built = result.map_err(VmmError::from).and_then(|machine| Ok(confined.map(|()| machine)?));
        let built = built.and_then(|machine| {
            machine.memory().settle().map_err(MachineError::NotFilled)?;
            Ok(machine)
        });
        let machine = match built {
            Ok(machine) => machine,
            Err(error) => return self.boot_failed(&stages, fresh, error),
        };
        match self.hold(Held { machine, stages, fresh }) {
            Some(held) => self.show(held),
            None => Ok(()),
        }
    }

    /// The machine is this VMM's.
    pub(super) fn show(&mut self, Held { mut machine, stages, .. }: Held) -> Result<(), VmmError> {
        let stages = &stages;
        lost_memory::watch(machine.memory().mapped_files());
        if let Some(configured) = self.slot.config_mut() {
            configured.boots += 1;
            configured.generation = Some(machine.generation());
            if let Some(consoles) = &mut configured.consoles {
                consoles.attach();
                self.inputs.want(consoles);
            }
        }
        let Some(restore) = &self.boot.restore else {
            machine.start();
            self.slot.start(machine).map_err(|_| VmmError::NoVm)?;
            log::info!("the VM runs");
            return self.boot_ended(stages, Ok(()));
        };
        let resumes = restore.resumes();
        if let Err(error) = restore.track(&mut self.jobs.saving.tracks, &mut machine) {
            // It only cannot be built on.
            log::warn!("what changes is not tracked: {}", crate::exit::chain(&error));
        }
        self.slot.restored(machine).map_err(|_| VmmError::NoVm)?;
        log::info!("the VM is restored");
        self.boot_ended(stages, Ok(()))?;
        if resumes && let Err(error) = self.resume() {
            // It was to run, or not to be.
            self.remove();
            return Err(VmmError::Restore { source: Box::new(error) });
        }
        Ok(())
    }

    /// Brings back what was before a boot or restore that failed, and tells.
    fn boot_failed(&mut self, stages: &Stages, fresh: bool, why: VmmError) -> Result<(), VmmError> {
        let _ = self.slot.fail_boot();
        lost_memory::watch(Vec::new());
        self.close_consoles(fresh);
        self.boot_ended(stages, Err(why))
    }

    /// Tells what became of a boot, and of the reboot that it was of.
    pub(super) fn boot_ended<T>(
        &mut self,
        stages: &Stages,
        result: Result<T, VmmError>,
    ) -> Result<T, VmmError> {
        let restore = self.boot.restore.take();
        let result = result.map_err(|error| explain(&self.means.sandbox, error));
        let event = match &restore {
            Some(restore) => told::restore_end(stages, restore.start(), result.as_ref().err()),
            None => told::boot_end(stages, result.as_ref().err()),
        };
        self.events.tell(self.boot.machines, &event);
        let result = match restore {
            Some(_) => result.map_err(VmmError::restoring),
            None => result,
        };
        if let Some(old) = self.boot.replaces.take() {
            match result {
                Ok(_) => self.events.tell(self.boot.machines, &Event::Rebooted),
                Err(_) => self.events.tell(old, &Event::Shutdown),
            }
        }
        result
    }

    /// After a failed boot: consoles that were opened for it are closed, others wait for the next.
    pub(super) fn close_consoles(&mut self, fresh: bool) {
        let Some(configured) = self.slot.config_mut() else { return };
        if let Some(consoles) = &mut configured.consoles {
            consoles.detach();
        }
        if fresh {
            configured.consoles = None;
        }
    }

    pub(super) fn tell(&mut self, asker: Asker, result: Result<(), VmmError>) {
        self.post_info();
        match (asker, result) {
            (Asker::Client(replier), result) => replier.reply(result.map_err(|error| match &error {
                VmmError::Load(_) | VmmError::Restore { .. } => restore::refusal(&error),
                VmmError::Cancelled => ApiError::from_error(Code::Cancelled, &error),
                _ => ApiError::from_error(Code::BootFailed, &error),
            })),
            (Asker::Migration, result) => self.arrived(result),
            (Asker::Guest | Asker::CommandLine, Ok(())) => {}
            (Asker::Guest | Asker::CommandLine, Err(error)) if error.is_wanted() => {}
            (Asker::Guest, Err(error)) => self.lost(&error),
            (Asker::CommandLine, Err(error)) => {
                self.boot.failed = Some(error);
                self.end(ExitCode::VmmError);
            }
        }
    }
}

/// Says so where Landlock may be the reason.
pub(super) fn explain(sandbox: &Sandbox, error: VmmError) -> VmmError {
    match sandbox.may_have_refused(&error) {
        true => VmmError::Refused { source: Box::new(error) },
        false => error,
    }
}

/// All that a machine is built from, to be carried to another thread.
struct Build {
    hypervisor: Ahead,
    spec: Arc<vmm_api::spec::MachineSpec>,
    ports: Ports,
    post: EventPost,
    threads: Arc<dyn ThreadHook>,
    stages: Stages,
    /// The machine before, whose memory and disks are needed.
    before: Teardown,
    /// What it is made of, if it is restored.
    origin: Option<Origin>,
    /// The VM's generation ID, if it was booted before.
    generation: Option<GenerationId>,
}

impl Build {
    fn run(mut self) -> (Result<Machine, MachineError>, Stages) {
        self.before.wait();
        let stages = &mut self.stages;
        let plan = Plan {
            hypervisor: &self.hypervisor,
            spec: &self.spec,
            ports: &self.ports,
            post: &self.post,
            threads: &self.threads,
            locks: self.origin.as_ref().map_or(Locks::Now, Origin::locks),
            generation: self.generation,
        };
        let result = match self.origin {
            Some(origin) => Machine::restore(&plan, origin.saved(&self.threads), stages),
            None => Machine::build(&plan, stages),
        };
        (result, self.stages)
    }
}
