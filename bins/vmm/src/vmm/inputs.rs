//! Console input on the control loop: from descriptors into devices, never faster than they take it.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use vmm_epoll::{Control, HandlerError, Input, LoopError, SourceId};

use super::Vmm;
use crate::console::{ClientInput, Consoles, End, InputSource, Link};

/// How long a socket takes no clients when the system refuses one (no descriptor is left).
const REST: Duration = Duration::from_secs(1);

/// The consoles' input sources.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    /// To be watched, once a handler of the loop comes by.
    wanted: Vec<(InputSource, Arc<End>)>,
    pumps: Vec<Pump>,
    /// To be removed likewise.
    stale: Vec<SourceId>,
}

/// One console's input.
#[derive(Debug)]
struct Pump {
    /// Where bytes come from; a socket without a client has none, nor has what is at its end.
    source: Option<SourceId>,
    /// The client that is connected, while a former one's input is not yet taken.
    next: Option<ClientInput>,
    door: Option<Door>,
    room: SourceId,
    end: Arc<End>,
    /// What the device did not take. While there is any, the source is there, and masked.
    waiting: Vec<u8>,
}

/// Where the clients of a socket come in.
#[derive(Debug, Clone, Copy)]
struct Door {
    listener: SourceId,
    /// Opens it again after a rest.
    rest: SourceId,
}

impl Inputs {
    /// Takes the consoles' inputs over; those that are watched already stay.
    pub(super) fn want(&mut self, consoles: &mut Consoles) {
        for console in consoles.iter_mut() {
            if let Some(source) = console.take_input() {
                self.wanted.push((source, console.end()));
            }
        }
    }

    /// The consoles are gone.
    pub(super) fn drop_all(&mut self) {
        self.wanted.clear();
        for pump in self.pumps.drain(..) {
            self.stale.extend(pump.sources());
        }
    }

    /// Brings the loop in line.
    pub(super) fn settle(vmm: &mut Vmm, control: &mut Control<'_, Vmm>) {
        for id in std::mem::take(&mut vmm.inputs.stale) {
            control.remove(id);
        }
        for (source, end) in std::mem::take(&mut vmm.inputs.wanted) {
            match Pump::add(control, source, end) {
                Ok(pump) => vmm.inputs.pumps.push(pump),
                // epoll does not take plain files, such as /dev/null: there is no input then.
                Err(error) => log::debug!("no console input: {error}"),
            }
        }
    }

    fn pump(&mut self, end: &Arc<End>) -> Option<&mut Pump> {
        self.pumps.iter_mut().find(|pump| Arc::ptr_eq(&pump.end, end))
    }
}

impl Vmm {
    /// The user's terminal has another size.
    pub fn window_changed(&self) {
        if let Some(consoles) = self.slot.config().and_then(|configured| configured.consoles.as_ref()) {
            consoles.resized();
        }
    }
}

impl Pump {
    fn add(control: &mut Control<'_, Vmm>, source: InputSource, end: Arc<End>) -> Result<Self, HandlerError> {
        let of_room = Arc::clone(&end);
        let room = control.add_event("console room", end.room_event()?, move |vmm, control, _| {
            flow(vmm, control, &of_room, &[])
        })?;
        let mut pump = Self { source: None, next: None, door: None, room, end, waiting: Vec::new() };
        let added = match source {
            InputSource::Stream(file) => {
                watch(control, file, &pump.end).map(|source| pump.source = Some(source))
            }
            InputSource::Clients { listener, link } => {
                Door::add(control, listener, link, &pump.end).map(|door| pump.door = Some(door))
            }
        };
        if let Err(error) = added {
            control.remove(room);
            return Err(error.into());
        }
        Ok(pump)
    }

    fn sources(&self) -> impl Iterator<Item = SourceId> + use<> {
        let door = self.door.into_iter().flat_map(|door| [door.listener, door.rest]);
        self.source.into_iter().chain([self.room]).chain(door)
    }
}

/// Reads `input` into the console.
fn watch(
    control: &mut Control<'_, Vmm>,
    input: impl AsFd + Read + 'static,
    end: &Arc<End>,
) -> Result<SourceId, LoopError> {
    let end = Arc::clone(end);
    control.add_reader("console input", input, move |vmm, control, input| match input {
        Input::Data(bytes) => {
            end.resized();
            flow(vmm, control, &end, bytes)
        }
        // It is removed already, and all that it gave is taken. Only a socket has another one.
        Input::End(_) => {
            let Some(pump) = vmm.inputs.pump(&end) else { return Ok(()) };
            let next = pump.next.take();
            pump.source = next.map(|next| watch(control, next, &end)).transpose()?;
            Ok(())
        }
    })
}

impl Door {
    fn add(
        control: &mut Control<'_, Vmm>,
        listener: UnixListener,
        link: Arc<Link>,
        end: &Arc<End>,
    ) -> Result<Self, LoopError> {
        let of_listener = Arc::clone(end);
        let listener = control.add_fd("console socket", listener, move |vmm, control, listener, _| {
            admit(vmm, control, &of_listener, listener, &link)
        })?;
        let rest = control.add_timer("console socket", move |_, control, _| Ok(control.unmask(listener)?));
        match rest {
            Ok(rest) => Ok(Self { listener, rest }),
            Err(error) => {
                control.remove(listener);
                Err(error)
            }
        }
    }
}

/// Lets one client in, or sends it away while another one is connected.
fn admit(
    vmm: &mut Vmm,
    control: &mut Control<'_, Vmm>,
    end: &Arc<End>,
    listener: &UnixListener,
    link: &Link,
) -> Result<(), HandlerError> {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    let Some(pump) = vmm.inputs.pump(end) else { return Ok(()) };
    let input = match listener.accept().and_then(|(client, _)| link.admit(client)) {
        Ok(Some(input)) => input,
        Ok(None) => {
            log::debug!("a console's second client is sent away");
            return Ok(());
        }
        Err(error) if matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock) => return Ok(()),
        Err(error) => {
            // It would fail again at once: whoever waits still does.
            if let Some(door) = pump.door {
                control.mask(door.listener)?;
                control.set_timer(door.rest, REST, None)?;
            }
            return Err(error.into());
        }
    };
    if pump.source.is_some() {
        pump.next = Some(input);
    } else {
        pump.source = Some(watch(control, input, end)?);
    }
    Ok(())
}

/// Gives what waits, then `bytes`, to the device; what it does not take waits.
fn flow(
    vmm: &mut Vmm,
    control: &mut Control<'_, Vmm>,
    end: &Arc<End>,
    bytes: &[u8],
) -> Result<(), HandlerError> {
    let Some(pump) = vmm.inputs.pump(end) else { return Ok(()) };
    pump.waiting.extend_from_slice(bytes);
    let taken = pump.end.enqueue(&pump.waiting).min(pump.waiting.len());
    pump.waiting.drain(..taken);
    if let Some(source) = pump.source {
        // Refused when the source has ended meanwhile, which is as good.
        let _ = if pump.waiting.is_empty() { control.unmask(source) } else { control.mask(source) };
    }
    Ok(())
}
