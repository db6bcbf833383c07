//! Snapshots. A thread of its own writes one; the machine stays here, and clients are served meanwhile. The guest is paused, or
//! runs on while its memory is written and stands still only for what is left in the end.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use vmm_api::command::Replier;
use vmm_api::config::{Fault, FaultKind, VmSnapshotConfig};
use vmm_api::error::{ApiError, Code};
use vmm_api::events::{Event, JobOutcome};
use vmm_api::spec::SnapshotSpec;
use vmm_device_model::thread;
use vmm_memory_manager::freeze::{FreezeError, Frozen};
use vmm_snapshot::directory::Hash;
use vmm_state::{Action, Admission, Guest, GuestEvent, Phase, PhaseSet, Reaction, Reason, Refusal, admit};

use super::apart::PATIENCE;
use super::tracks::{TrackError, Tracks};
use super::writer::{self, Answer, Memory, SaveError, SaveStep, Still, Watch, Writer};
use super::{Vmm, VmmError, boot, freezing, told};
use crate::exit::chain;
use crate::machine::{EventPost, Machine, MachineError};

/// The kind of the job, in events.
const KIND: &str = "snapshot";

/// A snapshot under way, and what the next one may build on.
#[derive(Debug, Default)]
pub(super) struct Saving {
    job: Option<Job>,
    /// Of the machine that is there.
    pub(super) tracks: Tracks,
    /// Long pieces of work begun so far.
    pub(super) jobs: u64,
}

/// A snapshot that is being written, and who waits for its end.
#[derive(Debug)]
struct Job {
    number: u64,
    asker: Replier<()>,
    /// Who cancelled it.
    cancels: Vec<Replier<()>>,
    spec: SnapshotSpec,
    start: Instant,
    pace: Pace,
    /// Why memory is written in passes, if it is.
    passes: Option<FreezeError>,
    thread: Thread,
    /// Why the control thread wants its end.
    failure: Option<SaveError>,
}

/// The thread, and the ways to it.
#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    /// Says nothing, and ends with it.
    ended: Receiver<Infallible>,
    answers: Option<Sender<Answer>>,
    cancelled: Arc<AtomicBool>,
    /// The snapshot is there.
    committed: Arc<AtomicBool>,
    /// The guest may wait for it to read this.
    frozen: Option<Arc<Frozen>>,
}

/// What the guest does meanwhile.
#[derive(Debug)]
pub(super) enum Pace {
    /// It is paused, and stays so.
    Paused,
    /// It runs on.
    Live,
    /// It stands still since then, and is to run on.
    Blackout(Instant),
    /// It stood still for so long, and runs.
    Over(Duration),
    /// It stands still for so long already, because it cannot run on.
    Stuck(Duration, MachineError),
}

impl Vmm {
    /// Begins a snapshot; `asker` is told of the end.
    pub(super) fn save_for(&mut self, request: &VmSnapshotConfig, asker: Replier<()>) {
        let spec = match SnapshotSpec::check(request) {
            Ok(spec) => spec,
            Err(faults) => return asker.reply(Err(faults.into())),
        };
        let mut pace = if self.slot.phase() == Phase::Running { Pace::Live } else { Pace::Paused };
        if matches!(pace, Pace::Live) && !spec.live {
            return asker.reply(Err(not_paused().into()));
        }
        self.jobs.saving.jobs += 1;
        let (number, start) = (self.jobs.saving.jobs, Instant::now());
        self.note(&Event::Snapshotting);
        self.note(&Event::JobStarted { job: number, kind: KIND.into() });
        match self.begin_save(&spec, &mut pace) {
            Ok((thread, passes)) => {
                // There is a machine.
                let _ = self.slot.begin_save();
                let (cancels, failure) = (Vec::new(), None);
                self.jobs.saving.job =
                    Some(Job { number, asker, cancels, spec, start, pace, passes, thread, failure });
            }
            Err(error) => {
                self.give_tracks_back(&pace);
                let error = match pace {
                    Pace::Stuck(_, resume) => error.stuck(resume),
                    _ => error,
                };
                if matches!(error, SaveError::Stuck { .. }) {
                    // There is a machine.
                    let _ = self.slot.pause();
                    self.note(&Event::Paused);
                }
                let reply = self.save_failed(number, error);
                asker.reply(Err(reply));
            }
        }
    }

    /// Hands a thread all that it needs. Why memory is written in passes comes out, too, if it is.
    fn begin_save(
        &mut self,
        spec: &SnapshotSpec,
        pace: &mut Pace,
    ) -> Result<(Thread, Option<FreezeError>), SaveError> {
        let Some((configured, machine)) = self.slot.parts_mut() else { return Err(SaveError::NoMachine) };
        // A restored VM would not know of it.
        let ends = |event: &&GuestEvent| ends(self.policy.reactions.to(**event));
        if let Some(event) = self.deferred.iter().find(ends) {
            return Err(SaveError::Ended(*event));
        }
        let config = serde_json::value::to_raw_value(&*configured.wire).map_err(SaveError::Config)?;
        let (tracks, hook) = (&mut self.jobs.saving.tracks, self.means.sandbox.threads());
        let mut passes = None;
        let (memory, since, still) = match pace {
            Pace::Live => match freezing::freeze(machine, tracks, spec, hook)? {
                Ok(mut moment) => {
                    told::changes(&self.events, machine);
                    *pace = moment.pace();
                    (Memory::Frozen(moment.memory), moment.since, Some(moment.still))
                }
                Err(why) => {
                    passes = Some(why);
                    let since = tracks.begin_passes(machine.memory_mut(), spec)?;
                    (as_is(machine)?, since, None)
                }
            },
            _ => {
                let since = tracks.at_rest(machine.memory_mut(), spec)?;
                (as_is(machine)?, since, Some(still(machine)?))
            }
        };
        let frozen = memory.frozen();
        let (cancelled, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let number = machine.number();
        let (job, events) = (self.jobs.saving.jobs, self.events.clone());
        let (answers, asked) = channel();
        let writer = Writer {
            folder: spec.folder.clone(),
            memory,
            config,
            since,
            still,
            threads: writer::threads(),
            watch: Watch { job, machine: number, events, cancelled: Arc::clone(&cancelled) },
            post: EventPost::new(number, self.means.post.clone()),
            answers: asked,
            committed: Arc::clone(&committed),
        };
        let (alive, ended) = channel();
        let work = move || {
            let _alive = alive;
            writer.run();
        };
        let handle = thread::spawn(self.means.sandbox.threads(), writer::THREAD, writer::THREAD.0, work);
        let handle = handle.map_err(SaveError::Thread)?;
        Ok((Thread { handle, ended, answers: Some(answers), cancelled, committed, frozen }, passes))
    }

    /// The snapshot's thread tells or asks something of the machine that is there.
    pub(super) fn save_says(&mut self, step: SaveStep) {
        let done = match step {
            SaveStep::Changed => self.changed(),
            SaveStep::Still => self.stand_still(),
            SaveStep::Written => {
                self.run_on();
                Ok(())
            }
            SaveStep::Over(result) => return self.saved(result),
        };
        if let Err(error) = done {
            self.fail_save(error);
        }
    }

    fn changed(&mut self) -> Result<(), SaveError> {
        let machine = self.slot.machine().ok_or(SaveError::NoMachine)?;
        let changed = self.jobs.saving.tracks.live(machine.memory())?;
        self.answer(Answer::Changed(changed));
        Ok(())
    }

    /// The blackout begins.
    fn stand_still(&mut self) -> Result<(), SaveError> {
        let Some(job) = &mut self.jobs.saving.job else { return Ok(()) };
        let machine = self.slot.machine_mut().ok_or(SaveError::NoMachine)?;
        if job.failure.is_some() {
            return Ok(());
        }
        machine.pause().map_err(SaveError::Guest)?;
        job.pace = Pace::Blackout(Instant::now());
        let still = still(machine)?;
        let changed = self.jobs.saving.tracks.live(machine.memory())?;
        if job.spec.track {
            self.jobs.saving.tracks.begin(machine.memory_mut())?;
        }
        self.answer(Answer::Still(still, changed));
        Ok(())
    }

    /// The blackout is over, if there is one.
    fn run_on(&mut self) {
        let (Some(job), Some(machine)) = (&mut self.jobs.saving.job, self.slot.machine_mut()) else { return };
        let Pace::Blackout(since) = job.pace else { return };
        let stuck = machine.resume().err();
        let blackout = since.elapsed();
        told::changes(&self.events, machine);
        if let Some(error) = &stuck {
            log::error!("the guest does not run on after its snapshot: {}", chain(error));
        }
        job.pace = Pace::after(blackout, stuck);
    }

    fn answer(&self, answer: Answer) {
        if let Some(answers) = self.jobs.saving.job.as_ref().and_then(|job| job.thread.answers.as_ref()) {
            // A thread that is over has told, or will.
            let _ = answers.send(answer);
        }
    }

    /// The thread is to end, for this reason.
    fn fail_save(&mut self, error: SaveError) {
        let Some(job) = &mut self.jobs.saving.job else { return };
        job.failure.get_or_insert(error);
        job.thread.cancelled.store(true, Ordering::SeqCst);
        job.thread.answers = None;
        // Whatever it does just now, the guest goes on: nothing of this snapshot will be kept.
        if let Some(frozen) = &job.thread.frozen {
            frozen.thaw();
        }
        self.run_on();
    }

    /// The guest did something that ends it, or may: there is nothing to go on with from a snapshot of that moment.
    pub(super) fn ends_save(&mut self, event: GuestEvent) {
        if ends(self.policy.reactions.to(event)) {
            self.fail_save(SaveError::Ended(event));
        }
    }

    /// The end of a snapshot: the VM is where it was before, and who waited is served.
    fn saved(&mut self, result: Result<Hash, SaveError>) {
        self.run_on();
        let Some(job) = self.jobs.saving.job.take() else { return };
        let Job { number, asker, cancels, spec, start, pace, passes, thread, failure } = job;
        // It has nothing left to do but end.
        let _ = thread.handle.join();
        let result = match (result, failure) {
            (Err(_), Some(failure)) => Err(failure),
            (result, _) => result,
        };
        match &result {
            Ok(id) if spec.track => {
                self.jobs.saving.tracks.keep(&spec.folder, *id);
                self.end_live(&pace);
            }
            Ok(_) => self.end_live(&pace),
            Err(_) => self.give_tracks_back(&pace),
        }
        let guest = pace.guest();
        let _ = self.slot.end_save(guest);
        if matches!(pace, Pace::Stuck(..)) {
            self.note(&Event::Paused);
        }
        let result = match (result, pace) {
            (Ok(id), pace) => {
                self.tell_saved(number, id, start.elapsed(), pace.blackout(), passes.as_ref());
                Ok(())
            }
            (Err(error), Pace::Stuck(_, resume)) => Err(self.save_failed(number, error.stuck(resume))),
            (Err(error), _) => Err(self.save_failed(number, error)),
        };
        self.post_info();
        for cancel in cancels {
            cancel.reply(if result.is_ok() { Err(too_late(self.slot.phase())) } else { Ok(()) });
        }
        asker.reply(result);
        if guest == Guest::Runs {
            self.catch_up();
        }
        self.go_on();
    }

    fn tell_saved(
        &self,
        job: u64,
        id: Hash,
        took: Duration,
        blackout: Option<Duration>,
        passes: Option<&FreezeError>,
    ) {
        self.note(&Event::JobFinished { job, outcome: JobOutcome::Done });
        let (duration_us, blackout_us) = (told::micros(took), blackout.map(told::micros));
        let in_passes = passes.map(|why| chain(why).as_str().into());
        let id = id.to_string();
        self.note(&Event::Snapshotted { id: id.as_str().into(), duration_us, blackout_us, in_passes });
        match blackout_us {
            Some(still) => {
                log::info!("snapshot {id} took {duration_us} us, the guest stood still for {still} us");
            }
            None => log::info!("snapshot {id} took {duration_us} us"),
        }
    }

    /// Nothing is tracked for a live snapshot any more.
    fn end_live(&mut self, pace: &Pace) {
        let Some(machine) = self.slot.machine_mut().filter(|_| !matches!(pace, Pace::Paused)) else { return };
        if let Err(error) = self.jobs.saving.tracks.end_live(machine.memory_mut()) {
            log::debug!("the tracker of a live snapshot: {}", chain(&error));
        }
    }

    /// What was tracked before still is.
    fn give_tracks_back(&mut self, pace: &Pace) {
        self.end_live(pace);
        let Some(machine) = self.slot.machine_mut() else { return };
        if let Err(error) = self.jobs.saving.tracks.give_back(machine.memory_mut()) {
            log::warn!("what changed is not known any more: {}", chain(&error));
            self.jobs.saving.tracks = Tracks::default();
        }
    }

    /// Tells of a snapshot that is not, and gives the reply.
    fn save_failed(&mut self, job: u64, error: SaveError) -> ApiError {
        let cancelled = matches!(error, SaveError::Cancelled | SaveError::Ended(_));
        let outcome = if cancelled { JobOutcome::Cancelled } else { JobOutcome::Failed };
        self.note(&Event::JobFinished { job, outcome });
        // Its causes may hold paths, which are not for events.
        self.note(&Event::SnapshotFailed { reason: error.to_string().as_str().into() });
        if let SaveError::Changes(TrackError::NoBase) = &error {
            return vec![Fault::new("incremental", FaultKind::Invalid, TrackError::NoBase.to_string())]
                .into();
        }
        let error = boot::explain(&self.means.sandbox, VmmError::Snapshot(Box::new(error)));
        log::warn!("{}", chain(&error));
        ApiError::from_error(if cancelled { Code::Cancelled } else { Code::SnapshotFailed }, &error)
    }

    /// Cancels what is under way; `asker` is told when nothing is left of it.
    pub(super) fn cancel_job(&mut self, asker: Replier<()>) {
        let Some(asker) = self.cancel_boot(asker) else { return };
        let Some(asker) = self.cancel_send(asker) else { return };
        let Some(asker) = self.cancel_receive(asker) else { return };
        match &mut self.jobs.saving.job {
            Some(job) => {
                job.cancels.push(asker);
                self.fail_save(SaveError::Cancelled);
            }
            None => asker.reply(Err(too_late(self.slot.phase()))),
        }
    }

    /// The machine goes: nobody waits for its snapshot any more, and it is not waited for if a file of it does not answer.
    pub(super) fn give_up_save(&mut self) {
        self.fail_save(SaveError::Cancelled);
        let Some(Job { number, asker, cancels, thread, .. }) = self.jobs.saving.job.take() else { return };
        if thread.ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            log::warn!("a snapshot that was given up does not end yet: it is left to itself");
        }
        if thread.committed.load(Ordering::SeqCst) {
            self.note(&Event::JobFinished { job: number, outcome: JobOutcome::Done });
            asker.reply(Ok(()));
        } else {
            // What it wrote is gone, or will be removed by the next that is written there.
            let reply = self.save_failed(number, SaveError::Cancelled);
            asker.reply(Err(reply));
        }
        cancels.into_iter().for_each(|cancel| cancel.reply(Ok(())));
    }
}

impl Pace {
    /// After it stood still for so long; why it does not run on, if it does not.
    pub(super) fn after(blackout: Duration, stuck: Option<MachineError>) -> Self {
        match stuck {
            None => Self::Over(blackout),
            Some(error) => Self::Stuck(blackout, error),
        }
    }

    /// What the guest does when it is over.
    const fn guest(&self) -> Guest {
        match self {
            Self::Live | Self::Over(_) => Guest::Runs,
            Self::Paused | Self::Blackout(_) | Self::Stuck(..) => Guest::Rests,
        }
    }

    /// How long the guest stood still because of the snapshot.
    const fn blackout(&self) -> Option<Duration> {
        match self {
            Self::Over(time) | Self::Stuck(time, _) => Some(*time),
            Self::Paused | Self::Live | Self::Blackout(_) => None,
        }
    }
}

/// The state of a machine whose guest stands still.
pub(super) fn still(machine: &Machine) -> Result<Still, SaveError> {
    Ok(Still { records: machine.save()?, at: SystemTime::now() })
}

/// Its memory.
fn as_is(machine: &Machine) -> Result<Memory, SaveError> {
    Ok(Memory::AsIs(machine.memory().source().map_err(SaveError::Memory)?))
}

/// Whether a guest is not the same afterwards.
fn ends(reaction: Reaction) -> bool {
    reaction != Reaction::Report
}

/// Of a VM that runs only a live snapshot can be taken.
fn not_paused() -> Refusal {
    let allowed = PhaseSet::EMPTY.with(Phase::Paused);
    Refusal { action: Action::Snapshot, phase: Phase::Running, reason: Reason::NotPaused, allowed }
}

/// There is nothing to cancel any more.
pub(super) fn too_late(phase: Phase) -> ApiError {
    match admit(phase, Action::Cancel) {
        Admission::Refused(refusal) => refusal.into(),
        // What can be cancelled is another job.
        _ => ApiError::new(Code::WrongPhase, Reason::NoJob.text()),
    }
}
