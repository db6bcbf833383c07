//! Stand-ins for tests: time that stands still, events that are remembered.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use vmm_device_model::interrupt::MsiMessage;

use crate::clock::Clock;
use crate::debug_port::{PostCode, PostCodes};
use crate::events::{SystemEvent, SystemEvents};
use crate::ioapic::{IoApicTarget, PINS};
use crate::output::{ByteSink, Notify};
use crate::registers::lock;

/// A clock that is set by hand.
#[derive(Debug, Default)]
pub struct TestClock(Mutex<Duration>);

impl TestClock {
    /// Shows `time`.
    pub fn new(time: Duration) -> Self {
        Self(Mutex::new(time))
    }

    /// Shows `time` from now on.
    pub fn set(&self, time: Duration) {
        *lock(&self.0) = time;
    }

    /// Moves on by `step`.
    pub fn advance(&self, step: Duration) {
        *lock(&self.0) += step;
    }
}

impl Clock for TestClock {
    fn now(&self) -> Duration {
        *lock(&self.0)
    }
}

/// Remembers what the guest asked for.
#[derive(Debug, Default)]
pub struct TestEvents(Mutex<Vec<SystemEvent>>);

impl TestEvents {
    /// Requests since the last call.
    pub fn take(&self) -> Vec<SystemEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl SystemEvents for TestEvents {
    fn request(&self, event: SystemEvent) {
        lock(&self.0).push(event);
    }
}

/// Keeps all bytes.
#[derive(Debug, Default)]
pub struct TestSink(Mutex<Vec<u8>>);

impl TestSink {
    /// Bytes since the last call.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl ByteSink for TestSink {
    fn put(&self, bytes: &[u8]) {
        lock(&self.0).extend(bytes);
    }

    fn lost(&self) -> u64 {
        0
    }
}

/// Counts its notifications.
#[derive(Debug, Default)]
pub struct TestNotify(Mutex<u64>);

impl TestNotify {
    /// Notifications since the last call.
    pub fn take(&self) -> u64 {
        std::mem::take(&mut lock(&self.0))
    }
}

impl Notify for TestNotify {
    fn notify(&self) {
        *lock(&self.0) += 1;
    }
}

/// Keeps all POST codes.
#[derive(Debug, Default)]
pub struct TestCodes(Mutex<Vec<PostCode>>);

impl TestCodes {
    /// Codes since the last call.
    pub fn take(&self) -> Vec<PostCode> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl PostCodes for TestCodes {
    fn post(&self, code: PostCode) {
        lock(&self.0).push(code);
    }
}

/// What a hypervisor would see of an IOAPIC.
#[derive(Debug, Default)]
pub struct TestTarget(Mutex<TargetState>);

#[derive(Debug, Default)]
struct TargetState {
    routes: [Option<MsiMessage>; PINS as usize],
    calls: u64,
    delivered: Vec<MsiMessage>,
    refuse: bool,
}

impl TestTarget {
    /// The route of `pin`.
    pub fn route(&self, pin: u8) -> Option<MsiMessage> {
        lock(&self.0).routes.get(usize::from(pin)).copied().flatten()
    }

    /// How often routes were set since the last call.
    pub fn take_calls(&self) -> u64 {
        std::mem::take(&mut lock(&self.0).calls)
    }

    /// Messages delivered since the last call.
    pub fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut lock(&self.0).delivered)
    }

    /// Whether everything is refused from now on.
    pub fn refuse(&self, refuse: bool) {
        lock(&self.0).refuse = refuse;
    }
}

impl IoApicTarget for TestTarget {
    fn set_routes(&self, routes: &[(u8, Option<MsiMessage>)]) -> io::Result<()> {
        let mut state = lock(&self.0);
        if state.refuse {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        state.calls += 1;
        for (pin, route) in routes {
            *state.routes.get_mut(usize::from(*pin)).ok_or(io::ErrorKind::InvalidInput)? = *route;
        }
        Ok(())
    }

    fn deliver(&self, message: MsiMessage) -> io::Result<()> {
        let mut state = lock(&self.0);
        if state.refuse {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        state.delivered.push(message);
        Ok(())
    }
}
