//! Giving the VM away: what a migration's driver asks of the control thread, which owns the VM and serves clients all the while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vmm_api::command::Replier;
use vmm_api::config::{Compression, SendMigrationData, TimeoutStrategy as Wanted};
use vmm_api::error::{ApiError, Code};
use vmm_api::events::{Event, JobOutcome};
use vmm_api::progress::{MigrationRole, MigrationStatus};
use vmm_api::spec::SendSpec;
use vmm_device_model::thread;
use vmm_migration_protocol::{
    Fault, Features, Goals, Hello, Limits, MemoryLayout, Output, Purpose, Reason, Region, SessionId,
    SourceInput, SourceSetup, SourceStep, SourceUndo, TimeoutStrategy, Versions,
};
use vmm_snapshot::directory::Place;
use vmm_snapshot::{Record, minicbor};
use vmm_state::{Guest, GuestEvent, Phase, Reaction};

use super::waiting::{Clients, Verdict};
use super::{Configured, Vmm, VmmError, boot, told};
use crate::exit::{ExitCode, chain};
use crate::machine::{EventPost, Machine, MachineEvent};
use crate::migration::inputs::{Answers, inputs};
use crate::migration::outgoing::{DONE, Outgoing};
use crate::migration::{self, Aside, SendError, SendStep, Slowing, THREAD};

/// The kind of the job, in events.
const KIND: &str = "migration";

/// A VM on its way out, and who waits for its end.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) clients: Clients,
    /// It only asks.
    check: bool,
    /// The VMM stays.
    pub(super) preserve: bool,
    guest: Pace,
    pub(super) doubt: Doubt,
    /// The VM is the destination's, and does without so many bytes of memory that are here.
    pub(super) owes: Option<u64>,
    /// In post-copy: bytes of memory that had changed when that was last asked, which are what the destination does without at first.
    late: Option<u64>,
    /// The hand-over is under way, or behind.
    given: bool,
    slowing: Option<Slowing>,
    inputs: Answers,
    aside: Arc<Aside>,
    gone: Arc<AtomicBool>,
}

/// What only the other end, or an operator, can decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    None,
    /// Where the VM is; that has been said.
    Place,
    /// Whether the destination will get the memory that is here.
    Memory,
}

/// What the guest does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// It was paused before.
    Paused,
    Runs,
    /// It stands still for the migration, since then.
    Still(Instant),
}

impl Pace {
    const fn guest(self) -> Guest {
        match self {
            Self::Runs => Guest::Runs,
            Self::Paused | Self::Still(_) => Guest::Rests,
        }
    }
}

impl Job {
    /// How many bytes are here that a guest elsewhere may lack, if it may: what it has said last, or what it was given without.
    pub(super) fn may_owe(&self) -> Option<u64> {
        self.owes.or(self.late.filter(|_| self.given))
    }
}

type StepResult = Result<Output, Box<dyn std::error::Error + Send + Sync>>;

impl Vmm {
    /// Begins to give the VM away; `asker` is told of the end.
    pub(super) fn send_for(&mut self, request: &SendMigrationData, asker: Replier<()>) {
        let checked = SendSpec::check(request)
            .and_then(|spec| migration::check_tls(spec.tls_dir.as_deref()).map(|()| spec))
            .and_then(|spec| migration::check_compression(spec.compression).map(|()| spec));
        let spec = match checked {
            Ok(spec) => spec,
            Err(faults) => return asker.reply(Err(faults.into())),
        };
        self.jobs.saving.jobs += 1;
        let number = self.jobs.saving.jobs;
        self.note(&Event::JobStarted { job: number, kind: KIND.into() });
        self.jobs.moving.begin(MigrationRole::Source, number, spec.check);
        match self.begin_send(&spec) {
            Ok(mut job) => {
                // There is a machine.
                let _ = self.slot.begin_migrate();
                if spec.detach {
                    asker.reply(Ok(()));
                } else {
                    job.clients.asker = Some(asker);
                }
                self.jobs.send = Some(job);
            }
            Err(error) => asker.reply(Err(self.send_failed(number, error))),
        }
    }

    fn begin_send(&mut self, spec: &SendSpec) -> Result<Job, SendError> {
        let paused = self.slot.phase() == Phase::Paused;
        let refused = |text: &str| SendError::Refused(text.into());
        let ends = |event: &&GuestEvent| self.policy.reactions.to(**event) != Reaction::Report;
        if let Some(event) = self.deferred.iter().find(ends) {
            return Err(refused(&format!("its guest has ended: {event}")));
        }
        let (configured, machine) = self.slot.parts_mut().ok_or_else(|| refused("there is no machine"))?;
        let memory = machine.memory().source().map_err(|error| SendError::Refused(error.into()))?;
        let places = machine.memory().places();
        let shared = match spec.local {
            true => Some(machine.memory().share().map_err(|error| SendError::Refused(error.into()))?),
            false => None,
        };
        let mut setup = setup(configured, machine, &places, (spec, paused))?;
        if let Some(shared) = &shared {
            (setup.hello.features, setup.hello.required) = (Features::LOCAL_MEMORY, Features::LOCAL_MEMORY);
            setup.descriptors =
                migration::ranges(&shared.pieces).map_err(|error| SendError::Refused(error.into()))?;
        }
        self.jobs.moving.memory(setup.hello.memory.bytes());
        let (aside, gone) = (Arc::new(Aside::of(places)), Arc::new(AtomicBool::new(false)));
        let (inputs, queue) = inputs();
        let post = EventPost::new(machine.number(), self.means.post.clone());
        let outgoing = Outgoing {
            address: spec.address.clone(),
            max_bandwidth: spec.max_bandwidth,
            tls_dir: spec.tls_dir.clone(),
            setup,
            memory,
            files: shared.map_or_else(Vec::new, |shared| shared.files),
            aside: Arc::clone(&aside),
            desk: Box::new(move |step| post.post(MachineEvent::Send(Box::new(step)))),
            threads: Arc::clone(self.means.sandbox.threads()),
            inputs: (inputs.clone(), queue),
            gone: Arc::clone(&gone),
        };
        thread::spawn(self.means.sandbox.threads(), THREAD, THREAD.0, move || outgoing.run())
            .map_err(SendError::Thread)?;
        Ok(Job {
            number: self.jobs.saving.jobs,
            clients: Clients::default(),
            check: spec.check,
            preserve: spec.preserve,
            guest: if paused { Pace::Paused } else { Pace::Runs },
            doubt: Doubt::None,
            owes: None,
            late: spec.postcopy.then_some(0),
            given: false,
            slowing: None,
            inputs,
            aside,
            gone,
        })
    }

    /// The driver asks or tells something.
    pub(super) fn send_says(&mut self, step: SendStep) {
        let answer = match step {
            SendStep::Run(step) => self.send_step(step),
            SendStep::Undo(undo) => self.send_undo(undo).map(|()| Output::Nothing),
            SendStep::Progress(progress) => {
                let events = self.jobs.moving.source_goes_on(&progress);
                return events.iter().for_each(|event| self.note(event));
            }
            SendStep::Given => return self.given(),
            SendStep::Supply(step) => return self.supply_says(step),
            SendStep::InDoubt(failure) => return self.in_doubt(&SendError::InDoubt(failure)),
            SendStep::Over(result) => return self.sent(result),
        };
        let Some(job) = &self.jobs.send else { return };
        let input = match answer {
            Ok(Output::Nothing) => DONE,
            Ok(output) => SourceInput::Done(output),
            Err(error) => SourceInput::Failed(Fault::new(Reason::Failed, &chain(&*error))),
        };
        // A driver that is over has told, or will.
        let _ = job.inputs.send(input);
    }

    fn send_step(&mut self, step: SourceStep) -> StepResult {
        let (Some(job), Some(machine)) = (&mut self.jobs.send, self.slot.machine_mut()) else {
            return Err("there is no machine".into());
        };
        match step {
            SourceStep::StartDirtyLog => self.jobs.saving.tracks.begin_live(machine.memory_mut())?,
            SourceStep::TakeDirty => {
                let bytes = job.aside.put(self.jobs.saving.tracks.live(machine.memory())?);
                job.late = job.late.map(|_| bytes);
                return Ok(Output::Bytes(bytes));
            }
            SourceStep::Pause => {
                machine.pause()?;
                job.guest = Pace::Still(Instant::now());
            }
            SourceStep::SaveState => {
                return Ok(Output::State(minicbor::to_vec(Record::of(&machine.save()?))?));
            }
            SourceStep::ReleaseLocks => machine.release_disks()?,
            SourceStep::GiveAway => {
                // What the guest did before it was paused has been told by now.
                let ends = |event: &&GuestEvent| self.policy.reactions.to(**event) != Reaction::Report;
                if let Some(event) = self.deferred.iter().find(ends) {
                    return Err(format!("the guest has ended: {event}").into());
                }
                job.given = true;
            }
            SourceStep::Throttle { percent } => {
                let slowing = match job.slowing.take() {
                    Some(slowing) => slowing,
                    None => Slowing::start(self.means.sandbox.threads(), machine.brake())?,
                };
                slowing.set(percent);
                job.slowing = Some(slowing);
            }
            SourceStep::Connect { .. } | SourceStep::SendMemory { .. } | SourceStep::Ask => {
                return Err("that is not the control thread's".into());
            }
        }
        Ok(Output::Nothing)
    }

    fn send_undo(&mut self, undo: SourceUndo) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let (Some(job), Some(machine)) = (&mut self.jobs.send, self.slot.machine_mut()) else {
            return Err("there is no machine".into());
        };
        match undo {
            SourceUndo::StopDirtyLog => self.jobs.saving.tracks.end_live(machine.memory_mut())?,
            SourceUndo::Resume => {
                let resumed = machine.resume();
                told::changes(&self.events, machine);
                resumed?;
                job.guest = Pace::Runs;
            }
            SourceUndo::TakeLocks => machine.take_disks()?,
            // Who is given away is paused, and nobody is let at it before the end.
            SourceUndo::TakeBack => job.given = false,
            SourceUndo::Unthrottle => job.slowing = None,
        }
        Ok(())
    }

    /// The destination has taken it.
    fn given(&mut self) {
        let Some(job) = &self.jobs.send else { return };
        let still = if let Pace::Still(since) = job.guest { Some(since) } else { None };
        self.jobs.moving.arrived(still);
    }

    fn in_doubt(&mut self, error: &SendError) {
        let Some(job) = &mut self.jobs.send else { return };
        log::error!("{}", chain(error));
        let number = job.number;
        let reply = ApiError::from_error(Code::MigrationFailed, error);
        job.doubt = Doubt::Place;
        job.clients.doubt(&reply);
        self.jobs.moving.doubt(&reply);
        self.note(&Event::MigrationInDoubt { job: number });
    }

    /// The end: the VM is elsewhere, or as it was.
    fn sent(&mut self, result: Result<(), SendError>) {
        let Some(job) = self.jobs.send.take() else { return };
        let result = match result {
            Err(error @ SendError::Lost(_)) => return self.lost_elsewhere(job, error),
            result => result,
        };
        let Job { number, clients, check, preserve, guest, .. } = job;
        let error = match result {
            Ok(()) if !check => return self.given_away(number, clients, preserve),
            Ok(()) => None,
            Err(error) => Some(error),
        };
        let _ = self.slot.end_migrate(guest.guest());
        match error {
            Some(error) => {
                let stuck = matches!(&error, SendError::Failed { stuck, .. } if !stuck.is_empty());
                let reply = self.send_failed(number, error);
                self.post_info();
                clients.stays(&reply, stuck);
            }
            None => {
                self.note(&Event::JobFinished { job: number, outcome: JobOutcome::Done });
                self.jobs.moving.end(MigrationStatus::Completed, None);
                log::info!("the destination would take the VM");
                self.post_info();
                clients.sent(self.slot.phase());
            }
        }
        if guest == Pace::Runs {
            self.catch_up();
        }
        self.go_on();
    }

    fn given_away(&mut self, number: u64, clients: Clients, preserve: bool) {
        let done = self.jobs.moving.done();
        self.jobs.moving.end(MigrationStatus::Completed, None);
        self.note(&Event::JobFinished { job: number, outcome: JobOutcome::Done });
        self.note(&done);
        log::info!("the VM is given away, in {} us", self.jobs.moving.reply().elapsed_us);
        if preserve {
            self.remove();
            self.post_info();
            clients.sent(self.slot.phase());
            return self.go_on();
        }
        clients.sent(self.slot.phase());
        self.end(ExitCode::Success);
    }

    /// Tells of a migration that is not, and gives the reply.
    pub(super) fn send_failed(&mut self, job: u64, error: SendError) -> ApiError {
        let cancelled = error.is_cancelled();
        self.note(&told::job_end(job, cancelled));
        // Its causes may hold paths, which are not for events.
        self.note(&Event::MigrationFailed { reason: error.to_string().as_str().into() });
        let error = boot::explain(&self.means.sandbox, VmmError::Send(Box::new(error)));
        log::warn!("{}", chain(&error));
        let reply = ApiError::from_error(told::code(cancelled), &error);
        self.jobs.moving.end(told::status(cancelled), Some(&reply));
        reply
    }

    /// Cancels it, as far as that is possible; in doubt, asks again. Gives the client back where there is none.
    pub(super) fn cancel_send(&mut self, asker: Replier<()>) -> Option<Replier<()>> {
        let Some(job) = &mut self.jobs.send else { return Some(asker) };
        if job.owes.is_some() && job.doubt == Doubt::None {
            asker.reply(Err(super::filling::is_elsewhere()));
            return None;
        }
        job.clients.cancels.push(asker);
        let input = if job.doubt != Doubt::None {
            SourceInput::Ask
        } else {
            SourceInput::Cancel("by this end's operator".to_owned())
        };
        let _ = job.inputs.send(input);
        None
    }

    /// In doubt where the VM is, the operator says it.
    pub(super) fn decide_send(&mut self, verdict: Verdict, asker: Replier<()>) {
        let Some(job) = self.jobs.send.as_mut().filter(|job| job.doubt != Doubt::None) else {
            return asker.reply(Err(ApiError::new(Code::WrongPhase, "it is not in doubt where the VM is")));
        };
        if (job.doubt, verdict) == (Doubt::Memory, Verdict::Here) {
            return asker.reply(Err(super::filling::is_elsewhere()));
        }
        log::warn!("the operator says that the VM is {}", verdict.place());
        job.clients.deciders.push((verdict, asker));
        let _ = job.inputs.send(match verdict {
            Verdict::Here => SourceInput::Keep,
            Verdict::Elsewhere => SourceInput::Yield,
        });
    }

    /// The guest did something that ends it: there is nothing to go on with elsewhere.
    pub(super) fn ends_send(&self, event: GuestEvent) {
        if let Some(job) = &self.jobs.send
            && self.policy.reactions.to(event) != Reaction::Report
        {
            let _ = job.inputs.send(SourceInput::Cancel(format!("the guest has ended: {event}")));
        }
    }

    /// The machine goes: nobody waits for the migration any more.
    pub(super) fn give_up_send(&mut self) {
        let Some(job) = self.jobs.send.take() else { return };
        job.gone.store(true, Ordering::SeqCst);
        self.jobs.moving.end(MigrationStatus::Cancelled, None);
        job.clients.gone();
    }
}

/// What this end would use.
fn offered(spec: &SendSpec) -> Features {
    let packs = match spec.compression {
        Compression::None => Features::NONE,
        Compression::Lz4 => Features::LZ4,
    };
    // TLS sees to it that memory arrives as it was sent.
    let checks = if spec.tls_dir.is_some() { Features::UNCHECKED_MEMORY } else { Features::PAGE_SUMS };
    packs.and(checks)
}

/// What the protocol is told of the VM.
fn setup(
    configured: &Configured,
    machine: &Machine,
    places: &[Place],
    (spec, paused): (&SendSpec, bool),
) -> Result<SourceSetup, SendError> {
    let mut session = [0; 16];
    getrandom::fill(&mut session).map_err(|error| SendError::Refused(error.into()))?;
    let region = |place: &Place| Region { gpa: place.gpa, length: place.size, zone: place.zone.clone() };
    let memory = MemoryLayout::new(places.iter().map(region).collect());
    let cpu = migration::needs(configured.spec.cpus.boot, machine.phys_bits(), machine.cpuid());
    let required = if spec.postcopy { Features::POST_COPY } else { Features::NONE };
    let hello = Hello {
        versions: Versions::OURS,
        session: SessionId(session),
        purpose: if spec.check { Purpose::Check } else { Purpose::Migrate },
        features: offered(spec).and(required),
        required,
        connections: spec.connections,
        memory: memory.map_err(|error| SendError::Refused(error.into()))?,
        cpu,
        program: concat!("vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    let strategy = match spec.strategy {
        Wanted::Cancel => TimeoutStrategy::Cancel,
        Wanted::Ignore => TimeoutStrategy::Ignore,
    };
    let config = serde_json::to_vec(&*configured.wire).map_err(|error| SendError::Refused(error.into()))?;
    Ok(SourceSetup {
        hello,
        config,
        descriptors: Vec::new(),
        paused,
        goals: Goals {
            downtime: spec.downtime,
            timeout: spec.timeout,
            strategy,
            auto_converge: spec.auto_converge,
            ..Goals::default()
        },
        limits: Limits::default(),
    })
}
