//! Console input on the control loop: from descriptors into devices, never faster than they take it.

use std::fs::File;
use std::sync::Arc;

use vmm_epoll::{Control, HandlerError, Input, SourceId};

use super::Vmm;
use crate::console::{Consoles, End};

/// The consoles' input sources.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    /// To be watched, once a handler of the loop comes by.
    wanted: Vec<(File, Arc<End>)>,
    pumps: Vec<Pump>,
    /// To be removed likewise.
    stale: Vec<SourceId>,
}

/// One console's input.
#[derive(Debug)]
struct Pump {
    source: SourceId,
    room: SourceId,
    end: Arc<End>,
    /// What the device did not take. While there is any, the source is masked.
    waiting: Vec<u8>,
}

impl Inputs {
    /// Takes the consoles' inputs over; those that are watched already stay.
    pub(super) fn want(&mut self, consoles: &mut Consoles) {
        for console in consoles.iter_mut() {
            if let Some(file) = console.take_input() {
                self.wanted.push((file, console.end()));
            }
        }
    }

    /// The consoles are gone.
    pub(super) fn drop_all(&mut self) {
        self.wanted.clear();
        for pump in self.pumps.drain(..) {
            self.stale.extend([pump.source, pump.room]);
        }
    }

    /// Brings the loop in line.
    pub(super) fn settle(vmm: &mut Vmm, control: &mut Control<'_, Vmm>) {
        for id in std::mem::take(&mut vmm.inputs.stale) {
            control.remove(id);
        }
        for (file, end) in std::mem::take(&mut vmm.inputs.wanted) {
            match Pump::add(control, file, end) {
                Ok(pump) => vmm.inputs.pumps.push(pump),
                // epoll does not take plain files, such as /dev/null: there is no input then.
                Err(error) => log::debug!("no console input: {error}"),
            }
        }
    }
}

impl Pump {
    fn add(control: &mut Control<'_, Vmm>, file: File, end: Arc<End>) -> Result<Self, HandlerError> {
        let of_room = Arc::clone(&end);
        let room = control.add_event("console room", end.room_event()?, move |vmm, control, _| {
            flow(vmm, control, &of_room, &[])
        })?;
        let of_source = Arc::clone(&end);
        let source = control.add_reader("console input", file, move |vmm, control, input| match input {
            Input::Data(bytes) => flow(vmm, control, &of_source, bytes),
            Input::End(_) => Ok(()),
        });
        match source {
            Ok(source) => Ok(Self { source, room, end, waiting: Vec::new() }),
            Err(error) => {
                control.remove(room);
                Err(error.into())
            }
        }
    }
}

/// Gives what waits, then `bytes`, to the device; what it does not take waits.
fn flow(
    vmm: &mut Vmm,
    control: &mut Control<'_, Vmm>,
    end: &Arc<End>,
    bytes: &[u8],
) -> Result<(), HandlerError> {
    let Some(pump) = vmm.inputs.pumps.iter_mut().find(|pump| Arc::ptr_eq(&pump.end, end)) else {
        return Ok(());
    };
    pump.waiting.extend_from_slice(bytes);
    let taken = pump.end.enqueue(&pump.waiting).min(pump.waiting.len());
    pump.waiting.drain(..taken);
    if pump.waiting.is_empty() {
        // Refused when the source has ended meanwhile, which is as good.
        let _ = control.unmask(pump.source);
    } else {
        let _ = control.mask(pump.source);
    }
    Ok(())
}
