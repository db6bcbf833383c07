//! Getting a VM: what a migration's driver asks of the control thread. What arrives is shown to nobody before it is this
//! VMM's.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use vmm_api::command::Replier;
use vmm_api::config::ReceiveMigrationData;
use vmm_api::error::{ApiError, Code};
use vmm_api::events::{Event, JobOutcome};
use vmm_api::progress::{MigrationRole, MigrationStatus};
use vmm_api::spec::ReceiveSpec;
use vmm_migration_protocol::{DestinationInput, DestinationOutcome, Fault, Output, Reason};
use vmm_state::Guest;

use super::apart::Apart;
use super::boot::Asker;
use super::filling::Filling;
use super::restore::{Origin, Restore};
use super::{Configured, Vmm, VmmError, boot, told};
use crate::exit::chain;
use crate::machine::stages::Stages;
use crate::machine::{EventPost, Machine, MachineEvent};
use crate::migration::incoming::{Heard, Incoming, Past};
use crate::migration::{self, Arrival, Host, ReceiveError, ReceiveStep, THREAD};

/// The kind of the job, in events.
const KIND: &str = "receive";

/// VMs that come from elsewhere.
#[derive(Debug, Default)]
pub(super) struct Receiving {
    job: Option<Job>,
    /// The last receiver: after its end it answers sources that lost the link.
    thread: Option<Thread>,
    /// What the receivers so far answer.
    past: Past,
    /// A guest whose memory is to come.
    pub(super) filling: Option<Filling>,
}

impl Receiving {
    /// The last receiver goes on until the process ends.
    pub(super) fn forget(&mut self) {
        self.thread.take().into_iter().for_each(std::mem::forget);
    }

    /// Who is told something by the last receiver's name.
    pub(super) fn driver(&self) -> Option<&Sender<Heard>> {
        self.thread.as_ref().map(|thread| &thread.to)
    }
}

/// A VM that is waited for, and who waits.
#[derive(Debug)]
struct Job {
    /// Of its machine.
    machine: u64,
    number: u64,
    /// Absent once it has been answered.
    asker: Option<Replier<()>>,
    /// It is answered when a source can come.
    detach: bool,
    cancels: Vec<Replier<()>>,
    start: Instant,
    to: Sender<Heard>,
    held: Option<Held>,
}

/// A machine that is not this VMM's yet.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) machine: Machine,
    pub(super) stages: Stages,
    /// Its consoles were opened for it.
    pub(super) fresh: bool,
}

/// Dropped, it is at its end.
#[derive(Debug)]
struct Thread {
    to: Sender<Heard>,
    apart: Option<Apart>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _ = self.to.send(Heard::Gone);
        if let Some(apart) = self.apart.take() {
            // It waits for nobody that it knows of.
            apart.leave("a receiver");
        }
    }
}

impl Vmm {
    /// Waits for a VM; `asker` is told when it is here.
    pub(super) fn receive_for(&mut self, request: &ReceiveMigrationData, asker: Replier<()>) {
        let checked = ReceiveSpec::check(request)
            .and_then(|spec| migration::check_tls(spec.tls_dir.as_deref()).map(|()| spec));
        let spec = match checked {
            Ok(spec) => spec,
            Err(faults) => return asker.reply(Err(faults.into())),
        };
        // The address may be the same.
        self.jobs.receive.thread = None;
        self.boot.machines += 1;
        self.jobs.saving.jobs += 1;
        let (machine, number) = (self.boot.machines, self.jobs.saving.jobs);
        self.events.tell(machine, &Event::JobStarted { job: number, kind: KIND.into() });
        self.jobs.moving.begin(MigrationRole::Destination, number, false);
        let detach = spec.detach;
        let cpuid = self.means.hypervisor.supported_cpuid();
        let cpuid = cpuid.inspect_err(|error| log::warn!("CPUs are not compared: {}", chain(error))).ok();
        let (to, heard) = channel();
        let post = EventPost::new(machine, self.means.post.clone());
        let incoming = Incoming {
            spec,
            host: Host { most_vcpus: self.means.hypervisor.max_vcpus(), cpuid },
            desk: Box::new(move |step| post.post(MachineEvent::Receive(Box::new(step)))),
            threads: Arc::clone(self.means.sandbox.threads()),
            heard: (to.clone(), heard),
            past: self.jobs.receive.past.clone(),
        };
        let (cancels, start, held) = (Vec::new(), Instant::now(), None);
        let job = Job { machine, number, asker: Some(asker), detach, cancels, start, to, held };
        match Apart::start(self.means.sandbox.threads(), THREAD, move || incoming.run()) {
            Ok(apart) => {
                // Admission keeps this from failing.
                let _ = self.slot.begin_receive();
                self.jobs.receive.thread = Some(Thread { to: job.to.clone(), apart: Some(apart) });
                self.jobs.receive.job = Some(job);
            }
            Err(error) => self.not_received(job, ReceiveError::Thread(error)),
        }
    }

    /// The driver asks or tells something.
    pub(super) fn receive_says(&mut self, machine: u64, step: ReceiveStep) {
        if let ReceiveStep::Fill(step) = step {
            return self.fill_says(machine, step);
        }
        let Some(number) =
            self.jobs.receive.job.as_ref().filter(|job| job.machine == machine).map(|job| job.number)
        else {
            return;
        };
        match step {
            ReceiveStep::Listening => self.listens(),
            ReceiveStep::Restore(arrival) => self.make_arrived(*arrival),
            ReceiveStep::GiveUp => self.give_up_arrival(),
            ReceiveStep::TakeLocks => {
                let held = self.jobs.receive.job.as_mut().and_then(|job| job.held.as_mut());
                let taken = held.map_or(Ok(()), |held| held.machine.take_disks());
                self.answer_receiver(taken.map_err(VmmError::from));
            }
            ReceiveStep::ReleaseLocks => {
                let held = self.jobs.receive.job.as_mut().and_then(|job| job.held.as_mut());
                let released = held.map_or(Ok(()), |held| held.machine.release_disks());
                self.answer_receiver(released.map_err(VmmError::from));
            }
            ReceiveStep::Run(to_come) => {
                let result = self.adopt().and_then(|()| self.resume());
                if let Some(bytes) = to_come {
                    let guest = if result.is_ok() { Guest::Runs } else { Guest::Rests };
                    self.begin_filling(number, bytes, guest);
                }
                self.answer_receiver(result);
            }
            ReceiveStep::Fill(_) => {}
            ReceiveStep::Discard => self.discard(),
            ReceiveStep::Progress(state, memory, progress) => {
                self.jobs.moving.memory(memory);
                self.jobs.moving.goes_on(format!("{state:?}"), progress);
            }
            ReceiveStep::Over(result) => self.received(result),
        }
    }

    fn listens(&mut self) {
        let asker = self.jobs.receive.job.as_mut().filter(|job| job.detach).and_then(|job| job.asker.take());
        if let Some(asker) = asker {
            asker.reply(Ok(()));
        }
    }

    fn answer_receiver(&self, result: Result<(), VmmError>) {
        self.receiver_answer(result)();
    }

    /// What answers its driver.
    pub(super) fn receiver_answer(&self, result: Result<(), VmmError>) -> impl FnOnce() + Send + use<> {
        let to = self.jobs.receive.job.as_ref().map(|job| job.to.clone());
        let input = match result {
            Ok(()) => DestinationInput::Done(Output::Nothing),
            Err(error) => DestinationInput::Failed(Fault::new(Reason::Failed, &chain(&error))),
        };
        // A driver that is over has told, or will.
        move || drop(to.map(|to| to.send(Heard::Answer(input))))
    }

    /// Makes a machine of what arrived, as a restore does.
    fn make_arrived(&mut self, Arrival { checked, records, memory }: Arrival) {
        let Some(job) = &self.jobs.receive.job else { return };
        self.boot.restore = Some(Restore::arrival(job.start));
        super::warn(&checked.spec);
        let _ = self.slot.load(Configured::new(checked));
        self.build_for(Asker::Migration, Some(Origin::Arrived { records, memory }));
    }

    /// The end of that.
    pub(super) fn arrived(&self, result: Result<(), VmmError>) {
        self.answer_receiver(result);
    }

    /// Keeps a machine until it is known whose it is; gives it back where nothing is to arrive.
    pub(super) fn hold(&mut self, held: Held) -> Option<Held> {
        match &mut self.jobs.receive.job {
            Some(job) => {
                job.held = Some(held);
                None
            }
            None => Some(held),
        }
    }

    /// The machine is this VMM's; its guest is paused.
    fn adopt(&mut self) -> Result<(), VmmError> {
        let held = self.jobs.receive.job.as_mut().and_then(|job| job.held.take()).ok_or(VmmError::NoVm)?;
        self.show(held)
    }

    /// Nothing of the VM stays.
    fn discard(&mut self) {
        let held = self.jobs.receive.job.as_mut().and_then(|job| job.held.take());
        let Some(job) = &self.jobs.receive.job else { return };
        let to = job.to.clone();
        let answer = move || drop(to.send(Heard::Answer(DestinationInput::Done(Output::Nothing))));
        let Some(Held { machine, stages, fresh }) = held else { return answer() };
        self.close_consoles(fresh);
        self.inputs.drop_all();
        let _ = self.slot.fail_boot();
        let _ = self.boot_ended::<()>(&stages, Err(VmmError::GivenUp));
        self.boot.before.begin(machine, answer);
    }

    fn received(&mut self, result: Result<DestinationOutcome, ReceiveError>) {
        let error = match result {
            Ok(DestinationOutcome::Received { running, trouble }) => {
                // A paused guest has not been shown yet.
                let shown = if running || trouble.is_some() { Ok(()) } else { self.adopt() };
                match (shown, trouble) {
                    (Ok(()), Some(fault)) => Some(ReceiveError::Trouble(fault)),
                    (Ok(()), None) => None,
                    (Err(error), _) => {
                        Some(ReceiveError::Trouble(Fault::new(Reason::Failed, &chain(&error))))
                    }
                }
            }
            Ok(DestinationOutcome::Failed { failure, stuck }) => {
                if !stuck.is_empty() {
                    log::error!("migration: this could not be undone: {stuck:?}");
                }
                Some(ReceiveError::Failed(failure))
            }
            // A check is no end.
            Ok(DestinationOutcome::Checked) => return,
            Err(error) => Some(error),
        };
        let Some(job) = self.jobs.receive.job.take() else { return };
        match error {
            Some(error) => self.not_received(job, error),
            None if self.jobs.receive.filling.is_some() => {
                log::info!(
                    "the guest runs here, in {} us; memory is to come",
                    told::micros(job.start.elapsed())
                );
                self.post_info();
                job.cancels.into_iter().for_each(|cancel| {
                    cancel.reply(Err(super::saving::too_late(self.slot.phase())));
                });
                answer(job.asker, Ok(()));
            }
            None => {
                let done = self.jobs.moving.done();
                self.jobs.moving.end(MigrationStatus::Completed, None);
                self.note(&Event::JobFinished { job: job.number, outcome: JobOutcome::Done });
                self.note(&done);
                log::info!("the VM is received, in {} us", told::micros(job.start.elapsed()));
                self.post_info();
                job.cancels.into_iter().for_each(|cancel| {
                    cancel.reply(Err(super::saving::too_late(self.slot.phase())));
                });
                answer(job.asker, Ok(()));
            }
        }
        self.go_on();
    }

    /// There is no VM, as before, or one that does not run.
    fn not_received(&mut self, job: Job, error: ReceiveError) {
        // One that does not run is there all the same.
        let _ = self.slot.end_receive();
        let cancelled = error.is_cancelled();
        self.events.tell(job.machine, &told::job_end(job.number, cancelled));
        let reason = error.to_string().as_str().into();
        self.events.tell(job.machine, &Event::MigrationFailed { reason });
        let error = boot::explain(&self.means.sandbox, VmmError::Receive(Box::new(error)));
        log::warn!("{}", chain(&error));
        self.post_info();
        let reply = ApiError::from_error(told::code(cancelled), &error);
        self.jobs.moving.end(told::status(cancelled), Some(&reply));
        job.cancels.into_iter().for_each(|cancel| cancel.reply(Ok(())));
        answer(job.asker, Err(reply));
    }

    /// Cancels it. Gives the client back where there is none.
    pub(super) fn cancel_receive(&mut self, asker: Replier<()>) -> Option<Replier<()>> {
        let Some(job) = &mut self.jobs.receive.job else { return Some(asker) };
        job.cancels.push(asker);
        let _ = job.to.send(Heard::Cancel);
        None
    }

    /// The VMM ends: no VM is waited for, and nobody is answered.
    pub(super) fn give_up_receive(&mut self) {
        self.jobs.receive.thread = None;
        let Some(job) = self.jobs.receive.job.take() else { return };
        let gone = || ApiError::new(Code::Cancelled, "the VMM ends");
        answer(job.asker, Err(gone()));
        job.cancels.into_iter().for_each(|cancel| cancel.reply(Ok(())));
    }
}

/// Answers a client that still waits.
fn answer(asker: Option<Replier<()>>, result: Result<(), ApiError>) {
    if let Some(asker) = asker {
        asker.reply(result);
    }
}
