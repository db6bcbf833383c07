//! Where the processes are that a guest goes to and fro between, and how it gets there.

use super::migrating::{Namespaces, free_port, url};
use super::{Scratch, Vmm};

/// What carries a guest to another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// A UNIX socket.
    Unix,
    /// TCP.
    Tcp,
    /// TLS over TCP.
    Tls,
}

/// Two network namespaces where they can be had, and this one where not.
#[derive(Debug)]
pub struct Places(Option<Namespaces>);

impl Places {
    /// The hosts that a certificate has to be good for.
    pub const HOSTS: [&'static str; 3] = [Namespaces::ADDRESSES[0], Namespaces::ADDRESSES[1], "127.0.0.1"];

    /// Makes them, and says which they are.
    #[must_use]
    pub fn new() -> Self {
        let namespaces = Namespaces::new();
        match &namespaces {
            Ok(_) => println!("TCP goes between two network namespaces"),
            Err(error) => {
                println!("TCP goes over the loopback interface, for there are no namespaces: {error}");
            }
        }
        Self(namespaces.ok())
    }

    /// The `number`th process: by turns in one and in the other.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(&self, scratch: &Scratch, number: usize) -> Vmm {
        match &self.0 {
            Some(namespaces) => Vmm::in_namespace(scratch, namespaces.name(number % 2 == 1)),
            None => Vmm::with_api(scratch, [""; 0]),
        }
    }

    /// An address where that process can be reached.
    #[must_use]
    pub fn address(&self, scratch: &Scratch, number: usize, link: Link) -> String {
        match (link, &self.0) {
            (Link::Unix, _) => url(&scratch.path(format!("m{number}"))),
            (Link::Tcp | Link::Tls, Some(_)) => {
                let [a, b] = Namespaces::ADDRESSES;
                format!("tcp:{}:7000", if number % 2 == 1 { b } else { a })
            }
            (Link::Tcp | Link::Tls, None) => format!("tcp:127.0.0.1:{}", free_port()),
        }
    }
}

impl Default for Places {
    fn default() -> Self {
        Self::new()
    }
}
