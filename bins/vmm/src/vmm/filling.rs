//! A guest that has gone on elsewhere before all of its memory was there (post-copy): what both ends ask of the control thread.

use vmm_api::error::{ApiError, Code};
use vmm_api::events::{Event, JobOutcome};
use vmm_api::progress::MigrationStatus;
use vmm_migration_protocol::{DestinationInput, Failure, Output};
use vmm_state::Guest;

use super::Vmm;
use super::sending::{Doubt, Job};
use crate::exit::{ExitCode, chain};
use crate::machine::Machine;
use crate::migration::incoming::Heard;
use crate::migration::{FillStep, SendError, SupplyStep};

/// A guest here whose memory is to come.
#[derive(Debug)]
pub(super) struct Filling {
    /// Its machine.
    machine: u64,
    number: u64,
    /// What it does when nothing stands against that.
    guest: Guest,
    /// The link is lost, and it is kept from running.
    held: bool,
}

impl Vmm {
    /// So many bytes of the guest's memory are to come. Until then what would disturb that is refused.
    pub(super) fn begin_filling(&mut self, number: u64, bytes: u64, guest: Guest) {
        let Some(machine) = self.slot.machine().map(Machine::number) else { return };
        // There is a machine.
        let _ = self.slot.begin_migrate();
        self.jobs.moving.owes(bytes, None);
        self.jobs.receive.filling = Some(Filling { machine, number, guest, held: false });
    }

    /// The driver asks or tells something of that.
    pub(super) fn fill_says(&mut self, machine: u64, step: FillStep) {
        let Some(filling) = self.jobs.receive.filling.as_mut().filter(|filling| filling.machine == machine)
        else {
            if matches!(step, FillStep::Hold | FillStep::Release) {
                self.fill_step_done();
            }
            return;
        };
        let (number, guest) = (filling.number, filling.guest);
        match step {
            FillStep::Hold => {
                filling.held = true;
                if let Some(machine) = self.slot.machine() {
                    machine.hold();
                }
                self.guest_is(Guest::Rests);
            }
            FillStep::Release => {
                filling.held = false;
                if let (Some(machine), Guest::Runs) = (self.slot.machine_mut(), guest) {
                    machine.let_go();
                }
                self.guest_is(guest);
            }
            FillStep::Lacks(bytes) => self.jobs.moving.owes(bytes, None),
            FillStep::Severed(failure) => self.severed(number, &failure),
            FillStep::Restored => self.rejoined(number),
            FillStep::Whole(trouble) => {
                if let Some(fault) = trouble {
                    log::error!("the guest was held, and does not go on: {fault}");
                }
                self.filled();
            }
        }
    }

    /// What its clients are shown that the guest does; the answer to who wanted it.
    fn guest_is(&mut self, guest: Guest) {
        let _ = self.slot.end_migrate(guest);
        let _ = self.slot.begin_migrate();
        self.fill_step_done();
    }

    fn fill_step_done(&self) {
        if let Some(to) = self.jobs.receive.driver() {
            let _ = to.send(Heard::Answer(DestinationInput::Done(Output::Nothing)));
        }
    }

    /// All of memory is there.
    fn filled(&mut self) {
        let Some(Filling { number, guest, .. }) = self.jobs.receive.filling.take() else { return };
        let _ = self.slot.end_migrate(guest);
        let done = self.jobs.moving.done();
        self.jobs.moving.end(MigrationStatus::Completed, None);
        self.note(&Event::JobFinished { job: number, outcome: JobOutcome::Done });
        self.note(&done);
        log::info!("all of the guest's memory is here");
        self.post_info();
        if guest == Guest::Runs {
            self.catch_up();
        }
        self.go_on();
    }

    /// The source's driver tells something of memory that it owes.
    pub(super) fn supply_says(&mut self, step: SupplyStep) {
        let Some(job) = &mut self.jobs.send else { return };
        let number = job.number;
        match step {
            SupplyStep::Owes(bytes, sent) => {
                if job.owes.replace(bytes).is_none() {
                    job.clients.elsewhere(&is_elsewhere());
                    // What is here of the guest stands still for good.
                    let _ = self.slot.end_migrate(Guest::Rests);
                    let _ = self.slot.begin_migrate();
                }
                self.jobs.moving.owes(bytes, Some(sent));
                self.note(&Event::JobProgress { job: number, done: sent, total: None });
            }
            SupplyStep::Severed(failure) => {
                job.doubt = Doubt::Memory;
                self.severed(number, &failure);
            }
            SupplyStep::Restored => {
                job.doubt = Doubt::None;
                job.clients.restored();
                self.rejoined(number);
            }
            SupplyStep::Stranded(failure) => {
                let error = SendError::Severed(failure);
                log::error!("{}", chain(&error));
                let reply = ApiError::from_error(Code::MigrationFailed, &error);
                job.clients.doubt(&reply);
                self.jobs.moving.sever(&reply);
            }
        }
    }

    fn severed(&mut self, job: u64, failure: &Failure) {
        let reason = failure.to_string();
        let error = SendError::Severed(failure.clone());
        log::error!("{}", chain(&error));
        self.jobs.moving.sever(&ApiError::from_error(Code::MigrationFailed, &error));
        self.note(&Event::MigrationSevered { job, reason: reason.as_str().into() });
    }

    fn rejoined(&mut self, job: u64) {
        log::info!("the link is there again, and the guest goes on");
        self.jobs.moving.restore();
        self.note(&Event::MigrationRestored { job });
    }

    /// The guest is elsewhere and will never have all of its memory: what is here of it is of no use.
    pub(super) fn lost_elsewhere(&mut self, job: Job, error: SendError) {
        log::error!("{}", chain(&error));
        let reply = self.send_failed(job.number, error);
        job.clients.lost(&reply);
        if job.preserve {
            self.remove();
            self.post_info();
            return self.go_on();
        }
        self.end(ExitCode::LostMemory);
    }

    /// The VMM is to end. A guest here that is held cannot be taken apart, for its threads may wait for memory: it is left
    /// as it is. Whether that is so. Of one that lacks memory otherwise the end is not waited for if the link is lost.
    pub(super) fn end_filling(&mut self) -> bool {
        let Some(filling) = &self.jobs.receive.filling else { return false };
        if !filling.held {
            if let Some(to) = self.jobs.receive.driver() {
                let _ = to.send(Heard::Ending);
            }
            return false;
        }
        let left = self.jobs.moving.reply().owed_bytes.unwrap_or(0);
        log::error!("the guest is lost: {left} bytes of its memory are at the source, and the link is lost");
        self.jobs.receive.forget();
        self.slot.stop().into_iter().for_each(std::mem::forget);
        true
    }

    /// Whether a guest elsewhere may lack memory, for it has not said that it has all: how many bytes are here still. Others may
    /// be on their way.
    pub(super) fn owes(&self) -> Option<u64> {
        self.jobs.send.as_ref().and_then(Job::may_owe)
    }
}

/// The reply to who decides what cannot be decided.
pub(super) fn is_elsewhere() -> ApiError {
    ApiError::new(Code::WrongPhase, "the guest is the destination's since the hand-over")
}
