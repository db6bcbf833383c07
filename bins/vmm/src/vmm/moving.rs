//! How far a migration is, and how the last one ended: what clients are told of it.

use std::time::Instant;

use vmm_api::error::ApiError;
use vmm_api::events::Event;
use vmm_api::progress::{MigrationProgressReply, MigrationRole, MigrationStatus};
use vmm_migration_protocol::{Progress, SourceProgress};

use super::told;

/// The migration under way, or the last.
#[derive(Debug, Default)]
pub(super) struct Moving {
    reply: MigrationProgressReply,
    /// `None`: it is over, and `reply` says how long it took.
    since: Option<Instant>,
}

impl Moving {
    /// One begins.
    pub(super) fn begin(&mut self, role: MigrationRole, job: u64, check: bool) {
        let (role, status) = (Some(role), MigrationStatus::Active);
        self.reply = MigrationProgressReply { status, role, job, check, ..MigrationProgressReply::default() };
        self.since = Some(Instant::now());
    }

    /// So much memory is to move.
    pub(super) fn memory(&mut self, bytes: u64) {
        self.reply.memory_bytes = bytes;
    }

    /// What this end does, and what has been sent.
    pub(super) fn goes_on(&mut self, step: String, sent: Progress) {
        let Progress { bytes, pass, blackout_ms } = sent;
        self.reply.step = Some(step);
        self.reply.sent_bytes = bytes;
        self.reply.passes = if bytes > 0 { pass.saturating_add(1) } else { 0 };
        self.reply.expected_blackout_ms = (blackout_ms != u32::MAX).then(|| blackout_ms.into());
    }

    /// The same at the source, which knows more; gives the events.
    pub(super) fn source_goes_on(&mut self, progress: &SourceProgress) -> [Event; 2] {
        let SourceProgress { state, sent, bandwidth, dirty_rate, throttle } = *progress;
        self.goes_on(format!("{state:?}"), sent);
        let known = |rate: u64| (bandwidth > 0).then_some(rate);
        (self.reply.bandwidth, self.reply.dirty_rate) = (known(bandwidth), known(dirty_rate));
        self.reply.throttle = throttle;
        let reply = &self.reply;
        let job = reply.job;
        [
            Event::JobProgress { job, done: reply.sent_bytes, total: None },
            Event::MigrationProgress {
                job,
                passes: reply.passes.into(),
                sent_bytes: reply.sent_bytes,
                bandwidth: reply.bandwidth,
                dirty_rate: reply.dirty_rate,
                throttle: throttle.into(),
                expected_blackout_ms: reply.expected_blackout_ms,
            },
        ]
    }

    /// The guest has stood still since then, and runs elsewhere.
    pub(super) fn arrived(&mut self, still: Option<Instant>) {
        self.reply.blackout_us = still.map(|since| told::micros(since.elapsed()));
        self.reply.expected_blackout_ms = None;
    }

    /// The destination does without so many bytes; `sent` is how much has been on the link.
    pub(super) fn owes(&mut self, bytes: u64, sent: Option<u64>) {
        self.reply.owed_bytes = Some(bytes);
        self.reply.sent_bytes = sent.unwrap_or(self.reply.sent_bytes);
        self.reply.step = Some(if sent.is_some() { "Supplying" } else { "Filling" }.to_owned());
    }

    /// The link is lost, and the guest stands still.
    pub(super) fn sever(&mut self, error: &ApiError) {
        self.reply.status = MigrationStatus::Severed;
        self.reply.causes.clone_from(&error.causes);
    }

    /// It is there again.
    pub(super) fn restore(&mut self) {
        self.reply.status = MigrationStatus::Active;
        self.reply.causes.clear();
    }

    /// Nobody knows where the VM is.
    pub(super) fn doubt(&mut self, error: &ApiError) {
        self.reply.status = MigrationStatus::InDoubt;
        self.reply.causes.clone_from(&error.causes);
    }

    /// It is over.
    pub(super) fn end(&mut self, status: MigrationStatus, error: Option<&ApiError>) {
        self.reply = self.reply();
        self.since = None;
        self.reply.owed_bytes = None;
        self.reply.status = status;
        self.reply.causes = error.map(|error| error.causes.clone()).unwrap_or_default();
        if status != MigrationStatus::Completed {
            self.reply.expected_blackout_ms = None;
        }
    }

    /// What clients are told.
    pub(super) fn reply(&self) -> MigrationProgressReply {
        let mut reply = self.reply.clone();
        if let Some(since) = self.since {
            reply.elapsed_us = told::micros(since.elapsed());
        }
        reply
    }

    /// The event of a migration that is done.
    pub(super) fn done(&self) -> Event {
        let MigrationProgressReply { elapsed_us, blackout_us, sent_bytes, passes, .. } = self.reply();
        Event::Migrated { duration_us: elapsed_us, blackout_us, sent_bytes, passes: passes.into() }
    }
}

#[cfg(test)]
mod tests {
    use vmm_api::error::Code;
    use vmm_migration_protocol::SourceState;

    use super::*;

    #[test]
    fn what_is_not_known_is_absent_and_the_end_stays() {
        let mut moving = Moving::default();
        assert_eq!(moving.reply(), MigrationProgressReply::default());
        moving.begin(MigrationRole::Source, 3, false);
        let sent = Progress { bytes: 0, pass: 0, blackout_ms: u32::MAX };
        let progress =
            SourceProgress { state: SourceState::Copying, sent, bandwidth: 0, dirty_rate: 0, throttle: 0 };
        moving.source_goes_on(&progress);
        let reply = moving.reply();
        assert_eq!((reply.status, reply.job, reply.passes), (MigrationStatus::Active, 3, 0));
        assert_eq!((reply.bandwidth, reply.dirty_rate, reply.expected_blackout_ms), (None, None, None));
        let sent = Progress { bytes: 9, pass: 1, blackout_ms: 7 };
        moving.source_goes_on(&SourceProgress { sent, bandwidth: 5, throttle: 20, ..progress });
        let reply = moving.reply();
        assert_eq!((reply.passes, reply.bandwidth, reply.dirty_rate), (2, Some(5), Some(0)));
        assert_eq!((reply.throttle, reply.expected_blackout_ms), (20, Some(7)));
        assert_eq!(reply.step.as_deref(), Some("Copying"));

        let error = ApiError::new(Code::MigrationFailed, "why");
        moving.doubt(&error);
        assert_eq!((moving.reply().status, moving.reply().causes.len()), (MigrationStatus::InDoubt, 1));
        moving.end(MigrationStatus::Failed, Some(&error));
        let ended = moving.reply();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(moving.reply(), ended, "its time does not go on");
        assert_eq!((ended.sent_bytes, ended.expected_blackout_ms), (9, None));
        moving.begin(MigrationRole::Destination, 4, false);
        assert_eq!((moving.reply().sent_bytes, moving.reply().causes.len()), (0, 0));
    }
}
