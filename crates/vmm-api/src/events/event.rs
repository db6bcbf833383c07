//! Every event, as one list: its type, its names on the wire, its documentation.

use serde_json::Value;

/// A kind of event, for documents and tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Who tells.
    pub source: &'static str,
    /// What happened.
    pub event: &'static str,
    /// The same as a sentence.
    pub doc: &'static str,
    /// What an event of this kind says besides.
    pub properties: &'static [Property],
    /// `None`: in the stream only. Else also in the event monitor, with the properties of these names.
    pub monitor: Option<&'static [&'static str]>,
}

/// What an event says besides its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Property {
    /// Its key.
    pub name: &'static str,
    /// Its JSON form.
    pub form: &'static str,
    /// What it means.
    pub doc: &'static str,
}

/// What a property may be.
trait Told {
    const FORM: &'static str;
    /// `None`: the property is left out.
    fn told(&self) -> Option<Value>;
}

impl Told for u64 {
    const FORM: &'static str = "number";
    fn told(&self) -> Option<Value> {
        Some((*self).into())
    }
}

impl<T: Told> Told for Option<T> {
    const FORM: &'static str = T::FORM;
    fn told(&self) -> Option<Value> {
        self.as_ref().and_then(T::told)
    }
}

/// A name in an event: an id, a word. Never guest data, a command line or a path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text(String);

impl Text {
    /// Most bytes of it; what is longer is cut and ends in `...`.
    pub const MOST: usize = 256;
    const CUT: &'static str = "...";

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        if text.len() <= Self::MOST {
            return Self(text.to_owned());
        }
        let end = text.floor_char_boundary(Self::MOST - Self::CUT.len());
        Self(format!("{}{}", text.get(..end).unwrap_or_default(), Self::CUT))
    }
}

impl Told for Text {
    const FORM: &'static str = "text";
    fn told(&self) -> Option<Value> {
        Some(self.0.as_str().into())
    }
}

macro_rules! words {
    ($(#[doc = $doc:literal])+ $name:ident {
        $(#[doc = $first_doc:literal])+ $first:ident = $first_word:literal,
        $($(#[doc = $word_doc:literal])+ $variant:ident = $word:literal,)+
    }) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name {
            $(#[doc = $first_doc])+ $first,
            $($(#[doc = $word_doc])+ $variant,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[Self::$first, $(Self::$variant),+];

            /// The word on the wire.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    Self::$first => $first_word,
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl Told for $name {
            const FORM: &'static str = concat!("`", $first_word, "`" $(, ", `", $word, "`")+);
            fn told(&self) -> Option<Value> {
                Some(self.word().into())
            }
        }
    };
}

words! {
    /// Who had the VM rebooted.
    RebootCause {
        /// A client of the API.
        Client = "client",
        /// The guest.
        Guest = "guest",
    }
}

words! {
    /// How a guest ended.
    ExitCause {
        /// It powered off.
        Shutdown = "shutdown",
        /// It asked for a reset.
        Reset = "reset",
        /// A vCPU took a triple fault.
        TripleFault = "triple-fault",
        /// It said that its kernel panicked.
        Panic = "panic",
        /// A vCPU cannot go on.
        Crash = "crash",
    }
}

words! {
    /// By which device a guest asked for its end.
    ExitVia {
        /// The ACPI sleep control register.
        AcpiSleep = "acpi-sleep",
        /// The ACPI reset register.
        AcpiReset = "acpi-reset",
        /// The keyboard controller.
        I8042 = "i8042",
        /// The panic device.
        Pvpanic = "pvpanic",
    }
}

words! {
    /// Why a vCPU cannot go on.
    CrashReason {
        /// The hypervisor cannot emulate an instruction of the guest; the code is its suberror.
        InternalError = "internal-error",
        /// The processor refused to enter the guest; the code is its reason.
        FailedEntry = "failed-entry",
        /// The hypervisor reports a system event of the guest; the code is its number.
        SystemEvent = "system-event",
        /// The vCPU stopped for a reason that the VMM does not know.
        UnexpectedExit = "unexpected-exit",
        /// The hypervisor failed.
        HypervisorFailed = "hypervisor-failed",
    }
}

words! {
    /// What a guest told its panic device; the words are the contract's.
    PanicEvent {
        /// Its kernel panicked.
        Panic = "panic",
        /// Its kernel panicked and goes on in its crash kernel.
        CrashLoaded = "crash_loaded",
        /// Something else.
        Unknown = "unknown_event",
    }
}

words! {
    /// What became of a job.
    JobOutcome {
        /// It is done.
        Done = "done",
        /// It failed.
        Failed = "failed",
        /// It was called off.
        Cancelled = "cancelled",
    }
}

macro_rules! events {
    (@monitor) => { None };
    (@monitor [$($told:ident),*]) => { Some(&[$(stringify!($told)),*]) };
    (@kind $source:literal $event:literal ($($doc:literal)+)
        ($($field:ident, $type:ty, $field_doc:literal;)*) $($monitor:tt)?) => {
        Kind {
            source: $source,
            event: $event,
            doc: concat!($($doc),+).trim_ascii_start(),
            properties: &[$(Property {
                name: stringify!($field),
                form: <$type as Told>::FORM,
                doc: $field_doc.trim_ascii_start(),
            }),*],
            monitor: events!(@monitor $($monitor)?),
        }
    };
    ($(
        $(#[doc = $doc:literal])+
        $variant:ident $({ $(#[doc = $field_doc:literal] $field:ident: $type:ty,)+ })?
            = $source:literal $event:literal $(monitor $monitor:tt)?;
    )+) => {
        /// Something that happened.
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Event {
            $($(#[doc = $doc])+ $variant $({ $(#[doc = $field_doc] $field: $type,)+ })?,)+
        }

        impl Event {
            /// Every kind of event.
            pub const KINDS: &'static [Kind] = &[$(
                events!(@kind $source $event ($($doc)+) ($($($field, $type, $field_doc;)+)?) $($monitor)?),
            )+];

            /// The kind of this event.
            #[must_use]
            pub fn kind(&self) -> &'static Kind {
                match self {
                    $(Self::$variant { .. } => const {
                        &events!(@kind $source $event ($($doc)+) ($($($field, $type, $field_doc;)+)?) $($monitor)?)
                    },)+
                }
            }

            /// What it says besides, by key.
            pub fn properties(&self) -> impl Iterator<Item = (&'static str, Value)> {
                let told: Vec<(&'static str, Option<Value>)> = match self {
                    $(Self::$variant $({ $($field),+ })? => vec![
                        $($((stringify!($field), $field.told())),+)?
                    ],)+
                };
                told.into_iter().filter_map(|(name, value)| Some((name, value?)))
            }
        }
    };
}

events! {
    /// The VMM starts.
    VmmStarting {
        /// Its version.
        version: Text,
    } = "vmm" "starting" monitor [];
    /// The VMM is ready: it takes commands, where it has an API socket.
    VmmStarted = "vmm" "started";
    /// The VMM ends.
    VmmShutdown = "vmm" "shutdown" monitor [];
    /// In the event monitor only: before the next event, others were left out. The guest brought them about too fast, or the reader
    /// was too slow.
    LeftOut {
        /// How many.
        events: u64,
    } = "vmm" "left-out" monitor [events];
    /// The level of the log changed.
    LogLevelChanged {
        /// The least important level that is logged now.
        level: Text,
    } = "vmm" "log-level";
    /// A VM was configured.
    Created = "vm" "created";
    /// A boot begins.
    Booting = "vm" "booting" monitor [];
    /// A stage of a boot is over, whether it succeeded or not.
    BootStage {
        /// Which: `console`, `vm`, `memory`, `devices`, `kernel`, `vcpus`, in this order; a restore has `state`, no `kernel`.
        stage: Text,
        /// Microseconds that it took.
        duration_us: u64,
    } = "vm" "boot-stage";
    /// The guest runs for the first time.
    Booted {
        /// Microseconds since the boot began.
        duration_us: u64,
    } = "vm" "booted" monitor [];
    /// A boot failed. After a reboot the VM is off; else it is as it was.
    BootFailed {
        /// The stage that failed, as in `boot-stage`; absent if it was none of them.
        stage: Option<Text>,
        /// What failed, in short; the log and the reply to the client say more.
        reason: Text,
    } = "vm" "boot-failed";
    /// The VM is being paused.
    Pausing = "vm" "pausing" monitor [];
    /// The VM is paused.
    Paused = "vm" "paused" monitor [];
    /// The VM is being resumed.
    Resuming = "vm" "resuming" monitor [];
    /// The VM runs again.
    Resumed = "vm" "resumed" monitor [];
    /// The VM is being rebooted; `booting` follows.
    Rebooting {
        /// Who wants it.
        cause: RebootCause,
    } = "vm" "rebooting" monitor [];
    /// The VM was rebooted.
    Rebooted = "vm" "rebooted" monitor [];
    /// The VM is off: by its guest, by a client, or because a reboot failed.
    Shutdown = "vm" "shutdown" monitor [];
    /// The VM and its configuration are gone.
    Deleted = "vm" "deleted" monitor [];
    /// A snapshot is being taken.
    Snapshotting = "vm" "snapshotting" monitor [];
    /// A snapshot was taken.
    Snapshotted {
        /// Its id, as in its manifest.
        id: Text,
        /// Microseconds since it began.
        duration_us: u64,
        /// Microseconds that the guest stood still; absent if it was paused all the time.
        blackout_us: Option<u64>,
        /// Why guest memory was written in passes; absent if it was frozen, or the guest paused all the time.
        in_passes: Option<Text>,
    } = "vm" "snapshotted" monitor [];
    /// A snapshot could not be taken, or was cancelled. The VM is as it was, and nothing is left of the snapshot.
    SnapshotFailed {
        /// What failed, in short; the log and the reply to the client say more.
        reason: Text,
    } = "vm" "snapshot-failed";
    /// A VM is being restored; stages as of a boot follow.
    Restoring = "vm" "restoring" monitor [];
    /// A VM was restored. It is paused; `resuming` may follow.
    Restored {
        /// Microseconds since the restore began.
        duration_us: u64,
    } = "vm" "restored" monitor [];
    /// A VM could not be restored. There is none.
    RestoreFailed {
        /// The stage that failed, as in `boot-stage`; absent if it was none of them.
        stage: Option<Text>,
        /// What failed, in short; the log and the reply to the client say more.
        reason: Text,
    } = "vm" "restore-failed";
    /// A migration goes on, as its source sees it. With each comes a `job/progress`.
    MigrationProgress {
        /// Number of the job.
        job: u64,
        /// Passes over memory, the one under way included.
        passes: u64,
        /// Bytes on the link so far, those sent again included.
        sent_bytes: u64,
        /// Bytes per second on the link; absent while it is not known.
        bandwidth: Option<u64>,
        /// Bytes per second that the guest writes to; absent while it is not known.
        dirty_rate: Option<u64>,
        /// By how much vCPUs are slowed down, in percent of their time.
        throttle: u64,
        /// How long the guest would stand still if the last pass began now; absent while it is not known.
        expected_blackout_ms: Option<u64>,
    } = "vm" "migration-progress";
    /// A VM was given away, or has arrived.
    Migrated {
        /// Microseconds since the migration began, or since the VM was waited for.
        duration_us: u64,
        /// Microseconds that the guest stood still, as the source saw it; absent at the destination, and if it was paused.
        blackout_us: Option<u64>,
        /// Bytes that were on the link.
        sent_bytes: u64,
        /// Passes over memory.
        passes: u64,
    } = "vm" "migrated";
    /// Nobody knows where the VM is. It stays paused, until the other end answers or an operator decides.
    MigrationInDoubt {
        /// Number of the job.
        job: u64,
    } = "vm" "migration-in-doubt";
    /// The link is lost while memory of the guest is at the source still: the guest stands still at the destination. At either end.
    MigrationSevered {
        /// Number of the job.
        job: u64,
        /// What happened, in short.
        reason: Text,
    } = "vm" "migration-severed";
    /// The link is there again, and the guest goes on. At either end.
    MigrationRestored {
        /// Number of the job.
        job: u64,
    } = "vm" "migration-restored";
    /// A migration failed or was cancelled, at either end.
    MigrationFailed {
        /// What failed, in short; the log and the reply to the client say more.
        reason: Text,
    } = "vm" "migration-failed";
    /// The VM is being resized.
    Resizing = "vm" "resizing" monitor [];
    /// The VM was resized.
    Resized = "vm" "resized" monitor [];
    /// The guest told its panic device something.
    GuestPanic {
        /// What it told.
        event: PanicEvent,
    } = "guest" "panic" monitor [event];
    /// The guest ended. What comes of it (`rebooting`, `pausing`, `shutdown`, nothing) follows; while the VM is paused,
    /// after the resume.
    GuestExit {
        /// How.
        cause: ExitCause,
        /// By which device, where it asked for it.
        via: Option<ExitVia>,
        /// The vCPU that took the fault or cannot go on.
        vcpu: Option<u64>,
        /// Why it cannot go on.
        reason: Option<CrashReason>,
        /// The number that goes with the reason.
        code: Option<u64>,
    } = "guest" "exit";
    /// A driver has set the device up, and it works.
    DeviceActivated {
        /// The device.
        id: Text,
    } = "virtio-device" "activated" monitor [id];
    /// A driver has reset the device, which was active.
    DeviceReset {
        /// The device.
        id: Text,
    } = "virtio-device" "reset" monitor [id];
    /// The device cannot start as its driver set it up, and waits for a reset.
    DeviceNeedsReset {
        /// The device.
        id: Text,
    } = "virtio-device" "needs-reset";
    /// A client has connected to a console.
    ConsoleConnected {
        /// The console.
        id: Text,
    } = "console" "connected";
    /// A console's client has gone.
    ConsoleDisconnected {
        /// The console.
        id: Text,
    } = "console" "disconnected";
    /// A long piece of work began.
    JobStarted {
        /// Its number.
        job: u64,
        /// What it does.
        kind: Text,
    } = "job" "started";
    /// A job goes on.
    JobProgress {
        /// Its number.
        job: u64,
        /// How much is done, in the job's own unit.
        done: u64,
        /// How much that is of, where it is known.
        total: Option<u64>,
    } = "job" "progress";
    /// A job is over.
    JobFinished {
        /// Its number.
        job: u64,
        /// What became of it.
        outcome: JobOutcome,
    } = "job" "finished";
}

impl Event {
    /// Whether a guest can have it happen again and again, without anybody else's doing.
    #[must_use]
    pub fn guest_repeats(&self) -> bool {
        matches!(
            self,
            Self::Booting
                | Self::BootStage { .. }
                | Self::Booted { .. }
                | Self::Rebooting { .. }
                | Self::Rebooted
                | Self::GuestPanic { .. }
                | Self::GuestExit { .. }
                | Self::DeviceActivated { .. }
                | Self::DeviceReset { .. }
                | Self::DeviceNeedsReset { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_over_long_text_is_cut_between_characters() {
        assert_eq!(Text::from("short").as_str(), "short");
        let most = "x".repeat(Text::MOST);
        assert_eq!(Text::from(most.as_str()).as_str(), most);
        let text = Text::from("ü".repeat(Text::MOST).as_str());
        assert_eq!(text.as_str(), format!("{}...", "ü".repeat((Text::MOST - 3) / 2)));
    }

    #[test]
    fn names_are_distinct_and_say_what_they_mean() {
        let mut names: Vec<_> = Event::KINDS.iter().map(|kind| (kind.source, kind.event)).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Event::KINDS.len());
        for kind in Event::KINDS {
            assert!(kind.doc.ends_with('.') && !kind.doc.contains("  "), "{kind:?}");
        }
    }

    #[test]
    fn an_event_knows_its_kind_and_leaves_out_what_it_does_not_know() {
        let exit =
            |via| Event::GuestExit { cause: ExitCause::Reset, via, vcpu: None, reason: None, code: None };
        assert_eq!((exit(None).kind().source, exit(None).kind().event), ("guest", "exit"));
        let keys = |event: &Event| event.properties().map(|(key, _)| key).collect::<Vec<_>>();
        assert_eq!(keys(&exit(None)), ["cause"]);
        assert_eq!(keys(&exit(Some(ExitVia::I8042))), ["cause", "via"]);
        assert_eq!(Event::Paused.properties().count(), 0);
    }
}
