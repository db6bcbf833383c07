//! Requests in flight.

use std::time::Instant;

use vm_memory::GuestAddress;

use crate::chain::Span;

/// What a request in flight is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// A write that is done, of so many bytes, to become durable.
    Settling(u32),
    /// Zeroes.
    Zeroes,
    /// No data, no count.
    Other,
}

/// What is needed to answer a request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    pub(super) kind: Kind,
    /// What a read fills.
    pub(super) spans: Vec<Span>,
    /// When it was taken off the ring.
    pub(super) taken: Instant,
}

/// A table of requests under tokens of our own: the driver may have the same head in flight twice.
#[derive(Debug)]
pub(super) struct Flights {
    slots: Vec<Option<Request>>,
    free: Vec<u16>,
    /// Empty lists with an allocation.
    lists: Vec<Vec<Span>>,
}

impl Flights {
    pub(super) fn new(depth: u16) -> Self {
        Self {
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            lists: Vec::new(),
        }
    }

    /// How many more there is room for.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// An empty list for [`Request::spans`].
    pub(super) fn list(&mut self) -> Vec<Span> {
        self.lists.pop().unwrap_or_default()
    }

    /// Takes a list back.
    pub(super) fn recycle(&mut self, mut list: Vec<Span>) {
        list.clear();
        self.lists.push(list);
    }

    /// Keeps a request; its token. `None` if the table is full.
    pub(super) fn add(&mut self, request: Request) -> Option<u64> {
        let index = self.free.pop()?;
        *self.slots.get_mut(usize::from(index))? = Some(request);
        Some(index.into())
    }

    /// Takes a request out; `None` if there is none under this token.
    pub(super) fn remove(&mut self, token: u64) -> Option<Request> {
        let index = u16::try_from(token).ok()?;
        let request = self.slots.get_mut(usize::from(index))?.take()?;
        self.free.push(index);
        Some(request)
    }

    /// Takes any request out.
    pub(super) fn remove_any(&mut self) -> Option<Request> {
        let index = self.slots.iter().position(Option::is_some)?;
        self.remove(index as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(head: u16) -> Request {
        let (status, kind, taken) = (GuestAddress(0), Kind::Other, Instant::now());
        Request { head, status, kind, spans: Vec::new(), taken }
    }

    #[test]
    fn equal_heads_are_different_requests() {
        let mut flights = Flights::new(2);
        let (a, b) = (flights.add(request(7)).unwrap(), flights.add(request(7)).unwrap());
        assert_ne!(a, b);
        assert!(flights.room() == 0 && flights.add(request(1)).is_none());
        assert!(flights.remove(a).is_some());
        assert!(flights.remove(a).is_none(), "once only");
        assert!(flights.remove(99).is_none() && flights.remove(u64::MAX).is_none());
        assert!(flights.remove_any().is_some() && flights.remove_any().is_none());
        assert!(flights.is_empty());
    }
}
