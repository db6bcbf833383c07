//! What goes wrong, and when.

use std::time::Duration;

use vmm_migration_protocol::{DestinationInput, DestinationState, Frame, Message, Reason, SourceInput};

use super::{Event, Holder, Item, World};
use crate::common::run as decode;
use crate::common::samples;
use crate::world::source::SourceWork;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Both ends see that the link is gone; what was on its way is lost.
    Lost,
    /// The same, and Query finds nobody.
    LostForGood,
    /// Nothing arrives any more, and nobody is told.
    Silent,
    /// The same, and Query finds nobody.
    SilentForGood,
    /// Only the source sees it; what was on its way to the destination arrives.
    LostAtSource,
    /// Only the destination sees it.
    LostAtDestination,
    CancelSource,
    CancelDestination,
    /// A Nack out of the blue.
    Nack,
    /// The clock jumps past the migration's timeout.
    Timeout,
    /// Bytes that are no frame.
    GarbageToSource,
    GarbageToDestination,
    /// The next frame arrives twice.
    Duplicate,
    /// The next frame arrives after the one that follows.
    Reorder,
    /// The next frame has a flipped bit.
    Flip,
    /// The next page arrives damaged.
    Damage,
    /// The next step cannot be done.
    StepFails,
    /// Any message, in the next place of its direction.
    Message(usize),
    KillSource,
    KillDestination,
}

impl Fault {
    /// All of them.
    pub(crate) fn all() -> Vec<Self> {
        let plain = [
            Self::Lost,
            Self::LostForGood,
            Self::Silent,
            Self::SilentForGood,
            Self::LostAtSource,
            Self::LostAtDestination,
            Self::CancelSource,
            Self::CancelDestination,
            Self::Nack,
            Self::Timeout,
            Self::GarbageToSource,
            Self::GarbageToDestination,
            Self::Duplicate,
            Self::Reorder,
            Self::Flip,
            Self::Damage,
            Self::StepFails,
            Self::KillSource,
            Self::KillDestination,
        ];
        let messages = (0..2 * samples::messages().len()).map(Self::Message);
        plain.into_iter().chain(messages).collect()
    }
}

/// A fault, before the event of this number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) at: usize,
    pub(crate) fault: Fault,
}

impl World {
    /// Makes it happen, and counts as an event. `false`: there is nothing that it could happen to.
    pub(crate) fn inject(&mut self, fault: Fault) -> bool {
        let applied = match fault {
            Fault::None | Fault::KillSource | Fault::KillDestination => {
                self.kill(fault);
                fault != Fault::None
            }
            Fault::Lost | Fault::LostForGood => {
                self.links.cut();
                self.links.reachable = fault == Fault::Lost;
                self.source_lost();
                self.destination_lost();
                true
            }
            Fault::Silent | Fault::SilentForGood => {
                self.links.cut();
                self.links.reachable = fault == Fault::Silent;
                true
            }
            Fault::LostAtSource => {
                self.links.to_source.clear();
                self.source_lost();
                true
            }
            Fault::LostAtDestination => {
                self.links.to_destination.iter_mut().for_each(std::collections::VecDeque::clear);
                self.destination_lost();
                true
            }
            Fault::CancelSource => self.give_the_source(SourceInput::Cancel("test".to_owned())),
            Fault::CancelDestination => {
                self.give_the_destination(DestinationInput::Cancel("test".to_owned()))
            }
            Fault::GarbageToSource => self.give_the_source(SourceInput::Garbage("test".to_owned())),
            Fault::GarbageToDestination => {
                self.give_the_destination(DestinationInput::Garbage("test".to_owned()))
            }
            Fault::Nack => {
                let fault = vmm_migration_protocol::Fault::new(Reason::Failed, "test");
                let nack = Message::Nack(vmm_migration_protocol::Command::Start, fault);
                self.give_the_source(SourceInput::Frame(nack.encode().unwrap()))
            }
            Fault::Timeout => {
                self.now += self.mode.timeout + Duration::from_millis(1);
                self.tick();
                true
            }
            Fault::Message(index) => self.any_message(index),
            Fault::StepFails => self.step_fails(),
            Fault::Damage => {
                self.destination.damage = true;
                true
            }
            Fault::Duplicate | Fault::Reorder | Fault::Flip => self.next_item(fault),
        };
        self.count += 1;
        applied
    }

    fn kill(&mut self, fault: Fault) {
        match fault {
            Fault::KillSource => {
                self.source.dead = true;
                self.source.running = false;
                self.release(Holder::Source);
                self.links.to_source.clear();
                // What it has sent arrives, then the end.
                for connection in 0..16 {
                    self.send_to_destination(connection, Item::End);
                }
            }
            Fault::KillDestination => {
                self.destination.dead = true;
                self.destination.vm = None;
                self.release(Holder::Destination);
                self.links.to_destination.iter_mut().for_each(std::collections::VecDeque::clear);
                self.send_to_source(Item::End);
            }
            _ => {}
        }
    }

    /// A process that ends holds no lock.
    fn release(&mut self, holder: Holder) {
        if self.locks == holder {
            self.locks = Holder::Nobody;
        }
    }

    fn source_lost(&mut self) {
        if !self.source.dead && !self.source.closed {
            self.source_input(SourceInput::Lost("test".to_owned()));
        }
    }

    fn destination_lost(&mut self) {
        if !self.destination.dead {
            self.destination_input(DestinationInput::Lost("test".to_owned()));
        }
    }

    fn give_the_source(&mut self, input: SourceInput) -> bool {
        let from_peer = matches!(input, SourceInput::Frame(_) | SourceInput::Garbage(_));
        if self.source.dead || (from_peer && self.source.closed) {
            return false;
        }
        self.source_input(input);
        true
    }

    fn give_the_destination(&mut self, input: DestinationInput) -> bool {
        if self.destination.dead {
            return false;
        }
        self.destination_input(input);
        true
    }

    /// Each message of the wire out of place: to the source, and to the destination.
    fn any_message(&mut self, index: usize) -> bool {
        let message = match samples::messages()[index / 2].clone() {
            // Too early, of the right session. A Commit or Committed of it would be a lie, not a fault.
            Message::Ready(_) => Message::Ready(self.source_session()),
            other => other,
        };
        let frame: Frame = message.encode().unwrap();
        match index % 2 {
            0 => self.give_the_source(SourceInput::Frame(frame)),
            _ => self.give_the_destination(DestinationInput::Frame(frame)),
        }
    }

    fn step_fails(&mut self) -> bool {
        match self.next_event() {
            Some(Event::SourceWork) if matches!(self.source.work, Some(SourceWork::Step(_))) => {
                self.source_work(true);
            }
            Some(Event::DestinationWork) if self.destination.machine.state() != DestinationState::Undoing => {
                self.destination_work(true);
            }
            _ => return false,
        }
        true
    }

    /// What `fault` does to the next thing that arrives.
    fn next_item(&mut self, fault: Fault) -> bool {
        let Some(event) = self.next_event() else { return false };
        let queue = match event {
            Event::ToDestination(at) => &mut self.links.to_destination[at],
            Event::ToSource => &mut self.links.to_source,
            Event::SourceWork | Event::DestinationWork => return false,
        };
        match fault {
            Fault::Duplicate => queue.push_front(queue[0].clone()),
            Fault::Reorder if queue.len() >= 2 => queue.swap(0, 1),
            Fault::Flip if matches!(queue[0], Item::Frame(_)) => {
                let Some(Item::Frame(frame)) = queue.pop_front() else { return false };
                let text = flipped(&frame, self.count * 37);
                return if event == Event::ToSource {
                    self.give_the_source(SourceInput::Garbage(text))
                } else {
                    self.give_the_destination(DestinationInput::Garbage(text))
                };
            }
            _ => return false,
        }
        true
    }
}

/// What a decoder says of a frame with one flipped bit.
fn flipped(frame: &Frame, bit: usize) -> String {
    let mut bytes = frame.encode();
    let at = bit % (bytes.len() * 8);
    bytes[at / 8] ^= 1 << (at % 8);
    let (frames, end) = decode(std::iter::once(&bytes[..]));
    assert!(frames.is_empty());
    end.unwrap_err().to_string()
}
