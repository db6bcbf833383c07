//! A VM whose memory is handed over to another process.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_api::client::Client;
use vmm_api::command::Method;

use crate::figure::{Figure, Goal, median};
use crate::process::Process;
use crate::{Bench, Result, micros};

const ROUNDS: usize = 20;
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

impl Bench {
    /// From the request to the answer of vm.send-migration with `local`: the new process makes the VM, restores it and runs the
    /// guest, all of whose memory is in use.
    pub(crate) fn local_migration(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for (mib, name, goal) in [
            (64, "local migration, 64 MiB in use", Goal::None),
            (1024, "local migration, 1 GiB in use", Goal::AtMost(20.0)),
        ] {
            let mut times = Vec::new();
            for _ in 0..ROUNDS {
                times.push(micros(self.hand_over(mib)?) / 1e3);
            }
            figures.push(Figure::alone(name, "ms", median(&mut times), goal));
        }
        Ok(figures)
    }

    fn hand_over(&self, mib: u64) -> Result<Duration> {
        let kernel = self.kernel.display().to_string();
        let memory = format!("size={mib}M,shared=on,prefault=on");
        let vm = ["--kernel", &kernel, "--memory", &memory, "--serial", "tty", "--console", "off"];
        let (mut source, mut from) = self.serving("source.sock", &vm)?;
        source.read_byte()?;
        let (_destination, mut to) = self.serving("destination.sock", &[])?;
        let socket = self.folder.join("migration.sock");
        let receive =
            format!(r#"{{"receiver_url":"unix:{0}","serial":{{"mode":"Null"}}}}"#, socket.display());
        let receiving = std::thread::spawn(move || {
            let answer = to.request(Method::Put, "vm.receive-migration", receive.as_bytes(), &[]);
            answer.map(|answer| answer.status).map_err(|error| error.to_string())
        });
        wait_for(&socket)?;
        let body = format!(r#"{{"destination_url":"unix:{}","local":true}}"#, socket.display());
        let start = Instant::now();
        let answer = from.request(Method::Put, "vm.send-migration", body.as_bytes(), &[])?;
        let took = start.elapsed();
        let received = receiving.join().map_err(|_| "the receiver's client panicked")??;
        match (answer.status, received) {
            (204, 204) => Ok(took),
            other => Err(format!("local migration: {other:?}: {answer:?}").into()),
        }
    }

    /// The VMM with its API at this socket.
    pub(crate) fn serving(&self, socket: &str, args: &[&str]) -> Result<(Process, Client)> {
        let socket = self.folder.join(socket);
        let _ = std::fs::remove_file(&socket);
        let option = format!("path={}", socket.display());
        let process = Process::start(&self.vmm, &[&["--api-socket", option.as_str()], args].concat())?;
        let mut client = Client::connect_within(&socket, LIMIT)?;
        client.set_timeout(Some(LIMIT))?;
        Ok((process, client))
    }
}

/// Waits until somebody listens at `socket`; who comes and goes is no source.
pub(crate) fn wait_for(socket: &Path) -> Result<()> {
    let start = Instant::now();
    while UnixStream::connect(socket).is_err() {
        if start.elapsed() > LIMIT {
            return Err(format!("nobody listens at {}", socket.display()).into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
