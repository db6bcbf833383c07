//! The loop itself.

use crate::control::{Epoll, Registry, trigger_of};
use crate::error::system_error;
use crate::{Control, LoopError, SourceError, SourceId};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use std::cell::{Ref, RefCell, RefMut};
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A loop over typed sources with the state their handlers share. It is built on the thread it runs on.
pub struct ControlLoop<S> {
    manager: EventManager<Rc<RefCell<Dispatcher<S>>>>,
    subscriber: SubscriberId,
    dispatcher: Rc<RefCell<Dispatcher<S>>>,
    stopper: Stopper,
}

/// Ends a loop from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Ends the loop, now or as soon as it runs.
    pub fn stop(&self) {
        // EAGAIN: the count is at its end, so the loop is awake.
        let _ = self.0.write(1);
    }
}

impl<S: 'static> ControlLoop<S> {
    /// A loop without sources.
    ///
    /// # Errors
    /// The epoll instance or an eventfd cannot be made.
    pub fn new(state: S) -> Result<Self, LoopError> {
        let create = |what| move |source| LoopError::Create { what, source };
        let mut manager =
            EventManager::new().map_err(|error| create("epoll instance")(system_error(&error)))?;
        let dispatcher = Rc::new(RefCell::new(Dispatcher { state, registry: Registry::new() }));
        let subscriber = manager.add_subscriber(Rc::clone(&dispatcher));
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(create("stop event"))?;
        let stopper = Stopper(Arc::new(event.try_clone().map_err(create("stop event"))?));
        let mut new = Self { manager, subscriber, dispatcher, stopper };
        new.control(|_, control| {
            control.add_event("stop", event, |_, control, _| {
                control.stop();
                Ok(())
            })
        })?;
        Ok(new)
    }

    /// Replaces the error hook, which logs otherwise. It is told of each handler's error, and may change the state.
    pub fn on_error(&mut self, hook: impl FnMut(&mut S, &SourceError) + 'static) {
        self.dispatcher.borrow_mut().registry.hook = Box::new(hook);
    }

    /// Works on the state and the sources from outside a handler, while the loop does not run.
    pub fn control<R>(&mut self, work: impl FnOnce(&mut S, &mut Control<'_, S>) -> R) -> R {
        let mut dispatcher = self.dispatcher.borrow_mut();
        let Dispatcher { state, registry } = &mut *dispatcher;
        match self.manager.event_ops(self.subscriber) {
            Ok(mut ops) => work(state, &mut Control { registry, epoll: &mut ops, current: None }),
            // Not reachable: the subscriber stays for the life of the loop.
            Err(_) => work(state, &mut Control { registry, epoll: &mut NoEpoll, current: None }),
        }
    }

    /// Runs until a handler or a [`Stopper`] stops it.
    ///
    /// # Errors
    /// epoll fails. Handlers' errors go to the error hook instead.
    pub fn run(&mut self) -> Result<(), LoopError> {
        while !std::mem::take(&mut self.dispatcher.borrow_mut().registry.stopping) {
            self.manager.run().map_err(|error| LoopError::Wait(system_error(&error)))?;
        }
        Ok(())
    }

    /// Handles what is ready, waiting for it at most `timeout` (without end if `None`). The number of events.
    ///
    /// # Errors
    /// epoll fails.
    pub fn run_once(&mut self, timeout: Option<Duration>) -> Result<usize, LoopError> {
        let milliseconds = timeout.map_or(-1, |time| i32::try_from(time.as_millis()).unwrap_or(i32::MAX));
        self.manager.run_with_timeout(milliseconds).map_err(|error| LoopError::Wait(system_error(&error)))
    }

    /// A handle that ends this loop from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> Ref<'_, S> {
        Ref::map(self.dispatcher.borrow(), |dispatcher| &dispatcher.state)
    }

    /// The state, to change it.
    #[must_use]
    pub fn state_mut(&mut self) -> RefMut<'_, S> {
        RefMut::map(self.dispatcher.borrow_mut(), |dispatcher| &mut dispatcher.state)
    }
}

/// The one subscriber: finds the source of an event and calls its handler.
struct Dispatcher<S> {
    state: S,
    registry: Registry<S>,
}

impl<S: 'static> MutEventSubscriber for Dispatcher<S> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let id = SourceId(events.data());
        if self.registry.stopping {
            // Level-triggered: it is still there if the loop runs again.
            return;
        }
        let Some(source) = self.registry.sources.get_mut(&id.0) else {
            // Nobody's: forget the descriptor, or it would wake the loop for ever.
            let _ = ops.remove(events);
            return;
        };
        let name = source.name;
        let trigger = match trigger_of(source, events.event_set()) {
            Ok(trigger) => trigger,
            Err(error) => return self.report(id, name, error),
        };
        let Some(mut fire) = source.fire.take() else { return };
        let mut control = Control { registry: &mut self.registry, epoll: ops, current: Some(id) };
        let outcome = fire(&mut self.state, &mut control, trigger);
        if let Some(source) = self.registry.sources.get_mut(&id.0) {
            source.fire = Some(fire);
        }
        if let Err(source) = outcome {
            (self.registry.hook)(&mut self.state, &SourceError { name, id, source });
        }
    }

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

impl<S> Dispatcher<S> {
    fn report(&mut self, id: SourceId, name: &'static str, error: io::Error) {
        (self.registry.hook)(&mut self.state, &SourceError { name, id, source: error.into() });
    }
}

/// Stands in for epoll when there is none.
struct NoEpoll;

impl Epoll for NoEpoll {
    fn watch(&mut self, _events: Events) -> event_manager::Result<()> {
        Err(event_manager::Error::InvalidId)
    }

    fn unwatch(&mut self, _events: Events) -> event_manager::Result<()> {
        Err(event_manager::Error::InvalidId)
    }
}

impl<S> fmt::Debug for ControlLoop<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlLoop").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::EventSet;

    /// The kernel cannot be made to send a stale token (removal forgets fetched events), so it is forged here.
    #[test]
    fn a_stale_token_is_ignored_and_unwatched() {
        let mut control_loop = ControlLoop::new(0u32).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let forged = Events::with_data(&event, 4711, EventSet::IN);
        let mut ops = control_loop.manager.event_ops(control_loop.subscriber).unwrap();
        ops.add(forged).unwrap();
        event.write(1).unwrap();
        assert_eq!(control_loop.run_once(Some(Duration::ZERO)).unwrap(), 1);
        assert_eq!(control_loop.run_once(Some(Duration::ZERO)).unwrap(), 0);
    }
}
