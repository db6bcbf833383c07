//! What a handler may do to the loop it runs in.

use crate::error::system_error;
use crate::source::{Fire, READ_SIZE, Source, Taken, Trigger, take_input};
use crate::{HandlerError, Inbox, Input, LoopError, Readiness, SourceError, SourceId};
use event_manager::{EventOps, EventSet, Events};
use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

/// The loop as seen from a handler, or from outside through [`ControlLoop::control`](crate::ControlLoop::control).
pub struct Control<'a, S> {
    pub(crate) registry: &'a mut Registry<S>,
    pub(crate) epoll: &'a mut dyn Epoll,
    /// The source whose handler runs.
    pub(crate) current: Option<SourceId>,
}

/// The sources of a loop, and whether it is to end.
pub(crate) struct Registry<S> {
    pub(crate) sources: BTreeMap<u32, Source<S>>,
    pub(crate) next: u32,
    pub(crate) stopping: bool,
    pub(crate) hook: Hook<S>,
}

/// Where handlers' errors go.
pub(crate) type Hook<S> = Box<dyn FnMut(&mut S, &SourceError)>;

/// The three epoll operations; hides the lifetime of [`EventOps`].
pub(crate) trait Epoll {
    fn watch(&mut self, events: Events) -> event_manager::Result<()>;
    fn unwatch(&mut self, events: Events) -> event_manager::Result<()>;
}

impl Epoll for EventOps<'_> {
    fn watch(&mut self, events: Events) -> event_manager::Result<()> {
        self.add(events)
    }

    fn unwatch(&mut self, events: Events) -> event_manager::Result<()> {
        self.remove(events)
    }
}

impl<S: 'static> Control<'_, S> {
    /// Watches an eventfd. The handler gets its count, which the loop has taken already.
    ///
    /// The loop should be the only reader, or the eventfd be non-blocking.
    ///
    /// # Errors
    /// epoll refuses the descriptor.
    pub fn add_event<F>(
        &mut self,
        name: &'static str,
        event: EventFd,
        mut handler: F,
    ) -> Result<SourceId, LoopError>
    where
        F: FnMut(&mut S, &mut Control<'_, S>, u64) -> Result<(), HandlerError> + 'static,
    {
        let fd = event.as_raw_fd();
        let fire: Fire<S> = Box::new(move |state, control, _| match event.read() {
            Ok(count) => handler(state, control, count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        });
        self.add(name, fd, None, fire)
    }

    /// Watches a descriptor for input; what to do with it is the handler's business (accept, receive, ...).
    ///
    /// The handler must consume what made the descriptor readable, or mask or remove the source. Two things are done
    /// for it, lest the loop spin: after an error the source is masked; after a call that told only of a hang-up it is
    /// removed.
    ///
    /// # Errors
    /// epoll refuses the descriptor.
    pub fn add_fd<D, F>(
        &mut self,
        name: &'static str,
        mut fd: D,
        mut handler: F,
    ) -> Result<SourceId, LoopError>
    where
        D: AsFd + 'static,
        F: FnMut(&mut S, &mut Control<'_, S>, &mut D, Readiness) -> Result<(), HandlerError> + 'static,
    {
        let raw = fd.as_fd().as_raw_fd();
        let fire: Fire<S> = Box::new(move |state, control, trigger| {
            let readiness = trigger.readiness();
            let outcome = handler(state, control, &mut fd, readiness);
            if let Some(id) = control.live() {
                if readiness.hung_up && !readiness.readable {
                    control.remove(id);
                } else if outcome.is_err() {
                    control.mask(id)?;
                }
            }
            outcome
        });
        self.add(name, raw, None, fire)
    }

    /// Reads a descriptor (a terminal, a pty, a pipe) and hands its bytes to the handler. At its end the handler gets
    /// [`Input::End`] once, and the source is gone.
    ///
    /// # Errors
    /// epoll refuses the descriptor; it does for plain files (`EPERM`).
    pub fn add_reader<D, F>(
        &mut self,
        name: &'static str,
        mut reader: D,
        mut handler: F,
    ) -> Result<SourceId, LoopError>
    where
        D: AsFd + Read + 'static,
        F: FnMut(&mut S, &mut Control<'_, S>, Input<'_>) -> Result<(), HandlerError> + 'static,
    {
        let raw = reader.as_fd().as_raw_fd();
        let fire: Fire<S> = Box::new(move |state, control, trigger| {
            let mut buffer = [0; READ_SIZE];
            match take_input(&mut reader, &mut buffer, trigger.readiness()) {
                Taken::Bytes(count) => match buffer.get(..count) {
                    Some(bytes) => handler(state, control, Input::Data(bytes)),
                    None => Ok(()),
                },
                Taken::Nothing => Ok(()),
                Taken::End(error) => {
                    if let Some(id) = control.live() {
                        control.remove(id);
                    }
                    handler(state, control, Input::End(error))
                }
            }
        });
        self.add(name, raw, None, fire)
    }

    /// Adds a timer, not yet set. The handler gets the number of times it expired since the last call.
    ///
    /// # Errors
    /// The timer cannot be made.
    pub fn add_timer<F>(&mut self, name: &'static str, mut handler: F) -> Result<SourceId, LoopError>
    where
        F: FnMut(&mut S, &mut Control<'_, S>, u64) -> Result<(), HandlerError> + 'static,
    {
        let timer =
            TimerFd::new().map_err(|errno| LoopError::Create { what: "timer", source: errno.into() })?;
        let fd = timer.as_raw_fd();
        let fire: Fire<S> =
            Box::new(move |state, control, trigger| handler(state, control, trigger.expirations));
        self.add(name, fd, Some(timer), fire)
    }

    /// Watches a mailbox. Each message is handed over singly, all queued ones at one wake-up.
    ///
    /// # Errors
    /// epoll refuses the descriptor.
    pub fn add_mailbox<T, F>(
        &mut self,
        name: &'static str,
        mut inbox: Inbox<T>,
        mut handler: F,
    ) -> Result<SourceId, LoopError>
    where
        T: 'static,
        F: FnMut(&mut S, &mut Control<'_, S>, T) -> Result<(), HandlerError> + 'static,
    {
        let fd = inbox.as_raw_fd();
        let mut pending = VecDeque::new();
        let fire: Fire<S> = Box::new(move |state, control, _| {
            pending.extend(inbox.take_all());
            while let Some(message) = pending.pop_front() {
                if let Err(error) = handler(state, control, message) {
                    control.report(state, name, error);
                }
                if control.live().is_none() {
                    // Masked or stopped: the rest waits, and wakes the loop again when it may.
                    if !pending.is_empty() {
                        inbox.wake();
                    }
                    break;
                }
            }
            Ok(())
        });
        self.add(name, fd, None, fire)
    }

    /// Removes a source and closes its descriptor. Whether it was there. A handler may remove its own source.
    pub fn remove(&mut self, id: SourceId) -> bool {
        let Some(source) = self.registry.sources.remove(&id.0) else { return false };
        if !source.masked {
            // The descriptor is open and watched, so this cannot fail; an event already fetched is forgotten with it.
            let _ = self.epoll.unwatch(events_of(source.fd, id));
        }
        true
    }

    /// Stops watching a source until [`unmask`](Self::unmask); what arrives meanwhile waits in the kernel.
    ///
    /// # Errors
    /// There is no such source, or epoll fails.
    pub fn mask(&mut self, id: SourceId) -> Result<(), LoopError> {
        let source = self.registry.sources.get_mut(&id.0).ok_or(LoopError::NoSource(id))?;
        if !source.masked {
            // Not EPOLL_CTL_MOD to no events: a hang-up is reported even then.
            self.epoll
                .unwatch(events_of(source.fd, id))
                .map_err(|error| cannot_watch(source.name, &error))?;
            source.masked = true;
        }
        Ok(())
    }

    /// Watches a masked source again.
    ///
    /// # Errors
    /// There is no such source, or epoll fails.
    pub fn unmask(&mut self, id: SourceId) -> Result<(), LoopError> {
        let source = self.registry.sources.get_mut(&id.0).ok_or(LoopError::NoSource(id))?;
        if source.masked {
            self.epoll.watch(events_of(source.fd, id)).map_err(|error| cannot_watch(source.name, &error))?;
            source.masked = false;
        }
        Ok(())
    }

    /// Sets a timer: first after `after`, then every `every`. An earlier setting, even an expired one, is forgotten.
    ///
    /// # Errors
    /// There is no such timer, or the system refuses the time.
    pub fn set_timer(
        &mut self,
        id: SourceId,
        after: Duration,
        every: Option<Duration>,
    ) -> Result<(), LoopError> {
        // Zero would disarm it.
        let after = after.max(Duration::from_nanos(1));
        self.rearm(id, |timer| timer.reset(after, every))
    }

    /// Disarms a timer.
    ///
    /// # Errors
    /// There is no such timer.
    pub fn clear_timer(&mut self, id: SourceId) -> Result<(), LoopError> {
        self.rearm(id, TimerFd::clear)
    }

    /// Ends the loop after the handler that runs now.
    pub fn stop(&mut self) {
        self.registry.stopping = true;
    }

    /// The source whose handler runs; `None` outside of one.
    #[must_use]
    pub fn current(&self) -> Option<SourceId> {
        self.current
    }

    fn rearm(
        &mut self,
        id: SourceId,
        set: impl FnOnce(&mut TimerFd) -> Result<(), vmm_sys_util::errno::Error>,
    ) -> Result<(), LoopError> {
        let source = self.registry.sources.get_mut(&id.0).ok_or(LoopError::NoSource(id))?;
        let timer = source.timer.as_mut().ok_or(LoopError::NoSource(id))?;
        set(timer).map_err(|errno| LoopError::Timer { name: source.name, source: errno.into() })?;
        // An expiry that epoll has reported already must be forgotten: its count is gone, reading it would block.
        if !source.masked {
            self.mask(id)?;
            self.unmask(id)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        name: &'static str,
        fd: RawFd,
        timer: Option<TimerFd>,
        fire: Fire<S>,
    ) -> Result<SourceId, LoopError> {
        let id = self.registry.fresh_id();
        self.epoll.watch(events_of(fd, id)).map_err(|error| cannot_watch(name, &error))?;
        self.registry.sources.insert(id.0, Source { name, fd, masked: false, timer, fire: Some(fire) });
        Ok(id)
    }

    /// The current source, if it may be called again: registered, not masked, the loop not ending.
    fn live(&self) -> Option<SourceId> {
        let id = self.current?;
        let source = self.registry.sources.get(&id.0)?;
        (!source.masked && !self.registry.stopping).then_some(id)
    }

    fn report(&mut self, state: &mut S, name: &'static str, source: HandlerError) {
        if let Some(id) = self.current {
            (self.registry.hook)(state, &SourceError { name, id, source });
        }
    }
}

impl<S> Registry<S> {
    pub(crate) fn new() -> Self {
        let hook: Hook<S> = Box::new(|_, error| log::error!("{error}: {}", error.source));
        Self { sources: BTreeMap::new(), next: 0, stopping: false, hook }
    }

    fn fresh_id(&mut self) -> SourceId {
        // Four thousand million sources later the numbers start again; skip those in use.
        while self.sources.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = SourceId(self.next);
        self.next = self.next.wrapping_add(1);
        id
    }
}

fn events_of(fd: RawFd, id: SourceId) -> Events {
    Events::with_data_raw(fd, id.0, EventSet::IN)
}

fn cannot_watch(name: &'static str, error: &event_manager::Error) -> LoopError {
    LoopError::Watch { name, source: system_error(error) }
}

/// What woke `source`, with its expirations if it is a timer.
pub(crate) fn trigger_of<S>(source: &mut Source<S>, events: EventSet) -> Result<Trigger, io::Error> {
    let expirations = match source.timer.as_mut() {
        Some(timer) => timer.wait()?,
        None => 0,
    };
    Ok(Trigger { events, expirations })
}

impl<S> fmt::Debug for Control<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("current", &self.current).finish_non_exhaustive()
    }
}
