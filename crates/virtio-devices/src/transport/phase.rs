//! Where a device is between its driver and its threads.

/// The phase of a virtio device, shared by front and back under the front's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
#[cbor(index_only)]
pub enum Phase {
    /// Status is 0; power-on, or a reset is done.
    #[n(0)]
    Reset,
    /// The driver negotiates and sets up queues.
    #[n(1)]
    Configuring,
    /// The driver said DRIVER_OK; the back has yet to start the device.
    #[n(2)]
    Starting,
    /// The device runs, or would if the VM were not paused.
    #[n(3)]
    Running,
    /// The driver wrote 0 to the status; the back has yet to stop and reset the device.
    #[n(4)]
    Resetting,
    /// The device could not start: DEVICE_NEEDS_RESET.
    #[n(5)]
    Failed,
}

/// What moves a device from phase to phase. The first three come from vCPUs, the others from the back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A status other than 0 was written, without a DRIVER_OK that counts.
    StatusWritten,
    /// DRIVER_OK was set, after FEATURES_OK.
    DriverOk,
    /// Status 0 was written.
    ResetWritten,
    /// The device started.
    Started,
    /// It did not.
    StartFailed,
    /// The device is stopped and reset.
    ResetDone,
}

impl Phase {
    pub(super) fn next(self, event: Event) -> Self {
        match (self, event) {
            (Self::Reset, Event::StatusWritten) => Self::Configuring,
            (Self::Configuring, Event::DriverOk) => Self::Starting,
            (Self::Starting, Event::Started) => Self::Running,
            (Self::Starting | Self::Running, Event::StartFailed) => Self::Failed,
            (Self::Configuring | Self::Starting | Self::Running | Self::Failed, Event::ResetWritten) => {
                Self::Resetting
            }
            (Self::Resetting, Event::ResetDone) => Self::Reset,
            // A start that a reset overtook leaves Resetting; all else changes nothing.
            _ => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Event::{DriverOk, ResetDone, ResetWritten, StartFailed, Started, StatusWritten};
    use super::Phase::{Configuring, Failed, Reset, Resetting, Running, Starting};

    #[test]
    fn every_phase_and_event() {
        let events = [StatusWritten, DriverOk, ResetWritten, Started, StartFailed, ResetDone];
        let table = [
            (Reset, [Configuring, Reset, Reset, Reset, Reset, Reset]),
            (Configuring, [Configuring, Starting, Resetting, Configuring, Configuring, Configuring]),
            (Starting, [Starting, Starting, Resetting, Running, Failed, Starting]),
            (Running, [Running, Running, Resetting, Running, Failed, Running]),
            (Resetting, [Resetting, Resetting, Resetting, Resetting, Resetting, Reset]),
            (Failed, [Failed, Failed, Resetting, Failed, Failed, Failed]),
        ];
        for (phase, expected) in table {
            assert_eq!(events.map(|e| phase.next(e)), expected, "{phase:?}");
        }
    }
}
