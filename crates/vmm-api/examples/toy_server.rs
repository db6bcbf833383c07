//! A host of two commands behind the HTTP server, and a client that talks to it.
//!
//! With a path as argument it serves there until interrupted: `curl --unix-socket PATH http://localhost/api/v1/vmm.ping`

use std::error::Error;
use std::path::PathBuf;
use std::thread;
use vmm_api::client::Client;
use vmm_api::command::{ApiRequest, Endpoint, Handle, Host, Replier};
use vmm_api::commands::vmm;
use vmm_api::http::{ApiSocket, Config, Server};
use vmm_api::info::PingReply;
use vmm_epoll::{ControlLoop, mailbox};
use vmm_state::Phase;

/// A VMM that never has a VM.
#[derive(Default)]
struct Toy {
    pings: u64,
    ends: bool,
}

impl Host for Toy {
    fn phase(&self) -> Phase {
        Phase::Empty
    }

    /// Nothing boots here; a request that is dropped is answered with an error.
    fn park(&mut self, _request: ApiRequest<Self>) {}

    /// There are no boards.
    fn publish(&mut self) {}
}

impl Handle<vmm::Ping> for Toy {
    fn handle(&mut self, _request: (), replier: Replier<PingReply>) {
        self.pings = self.pings.saturating_add(1);
        replier.reply(Ok(PingReply {
            version: format!("0.1.{}", self.pings),
            build_version: "toy".to_owned(),
            pid: i64::from(std::process::id()),
            features: Vec::new(),
        }));
    }
}

impl Handle<vmm::Shutdown> for Toy {
    fn handle(&mut self, _request: (), replier: Replier<()>) {
        self.ends = true;
        replier.reply(Ok(()));
    }
}

static TABLE: [Endpoint<Toy>; 2] = [Endpoint::of::<vmm::Ping>(), Endpoint::of::<vmm::Shutdown>()];

fn main() -> Result<(), Box<dyn Error>> {
    let argument = std::env::args_os().nth(1).map(PathBuf::from);
    let path =
        argument.clone().unwrap_or_else(|| std::env::temp_dir().join(format!("toy-{}", std::process::id())));

    let (requests, inbox) = mailbox::<ApiRequest<Toy>>()?;
    let server =
        Server::new(ApiSocket::bind(&path)?, &TABLE, requests, Config::default())?.start(|| Ok(()))?;
    let client = argument.is_none().then(|| thread::spawn(move || talk(path)));

    let mut control_loop = ControlLoop::new(Toy::default())?;
    control_loop.control(|_, control| {
        control.add_mailbox("api", inbox, |toy, control, request| {
            request.dispatch(toy);
            if toy.ends {
                control.stop();
            }
            Ok(())
        })
    })?;
    control_loop.run()?;
    // First the host's inbox, so that whoever waits is answered; then the server, which sends the answers.
    drop(control_loop);
    server.stop();
    if let Some(client) = client {
        client.join().map_err(|_| "the client has panicked")??;
    }
    Ok(())
}

fn talk(path: PathBuf) -> Result<(), vmm_api::client::ClientError> {
    let mut client = Client::connect(path)?;
    println!("{:?}", client.call::<vmm::Ping>(&())?);
    println!("{:?}", client.call::<vmm::Ping>(&())?);
    client.call::<vmm::Shutdown>(&())
}
