//! Migrations between two VMMs.

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use vmm_state::Phase;

use super::counting::goes_on;
use super::{Answer, Api, LIMIT, Pending, Scratch, SerialFile, Vmm, wait_until};

/// This host, for those within it.
const LOOPBACK: &str = "127.0.0.1";

/// The address of a UNIX socket.
#[must_use]
pub fn url(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// What `vm.send-migration` is told of a UNIX socket.
#[must_use]
pub fn to(path: &Path) -> Value {
    json!({ "destination_url": url(path) })
}

/// One test of a program at a time: each ends many VMs, and KVM takes long where many end at once.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `vm.migration-progress`.
///
/// # Panics
/// When it is not answered.
#[must_use]
pub fn progress(vmm: &Vmm) -> Value {
    let answer = vmm.api().get("vm.migration-progress");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Waits until the progress is as wanted, and gives it.
///
/// # Panics
/// When it does not become so.
pub fn until(vmm: &Vmm, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    wait_until(LIMIT, || Some(progress(vmm)).filter(&wanted), || format!("{what}, and not {}", progress(vmm)))
}

/// A request with a body on a connection of its own, which is not waited for.
///
/// # Panics
/// When it cannot be sent.
#[must_use]
pub fn pending(vmm: &Vmm, name: &str, body: &Value) -> Pending {
    Pending::send(vmm.socket(), name, body.to_string().as_bytes())
}

/// A request's body, with the folder of an end's certificates if it has one.
#[must_use]
pub fn with_tls(mut body: Value, tls_dir: Option<&Path>) -> Value {
    if let (Some(folder), Some(fields)) = (tls_dir, body.as_object_mut()) {
        fields.insert("tls_dir".to_owned(), json!(folder));
    }
    body
}

/// Begins to wait for a VM at `address`, whose serial port is to go to `serial`.
///
/// # Panics
/// When the request cannot be sent.
#[must_use]
pub fn receive_at(vmm: &Vmm, address: &str, tls_dir: Option<&Path>, serial: &SerialFile) -> Pending {
    // Over TCP the source may name no file unless it is allowed to.
    let serial = json!({ "mode": "File", "file": serial.path() });
    let body = json!({ "receiver_url": address, "paths": ["/"], "serial": serial });
    pending(vmm, "vm.receive-migration", &with_tls(body, tls_dir))
}

/// The same at a UNIX socket, whose path is given; somebody listens there.
///
/// # Panics
/// When nobody does.
#[must_use]
pub fn receive(vmm: &Vmm, scratch: &Scratch, serial: &SerialFile) -> (Pending, PathBuf) {
    receive_with(vmm, scratch, serial, &json!({}))
}

/// The same with other fields in the request, as `{"disks": [...]}`.
///
/// # Panics
/// When nobody listens.
#[must_use]
pub fn receive_with(vmm: &Vmm, scratch: &Scratch, serial: &SerialFile, more: &Value) -> (Pending, PathBuf) {
    // A receiver answers at its address for a while after its end.
    static RECEIVERS: AtomicU32 = AtomicU32::new(0);
    let path = scratch.path(format!("m{}", RECEIVERS.fetch_add(1, Ordering::Relaxed)));
    let mut body = json!({
        "receiver_url": url(&path), "serial": { "mode": "File", "file": serial.path() },
    });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    let pending = pending(vmm, "vm.receive-migration", &body);
    // The path is there before anybody listens. One who comes and goes is no source.
    wait_until(LIMIT, || UnixStream::connect(&path).ok(), || "a receiver".to_owned());
    (pending, path)
}

/// A port of this host that was free a moment ago.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    TcpListener::bind((LOOPBACK, 0)).and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// Begins to wait for a VM at a port of this host, which is given; somebody listens there, unless it has failed.
///
/// # Panics
/// When nobody does.
#[must_use]
pub fn receive_tcp(vmm: &Vmm, serial: &SerialFile, tls_dir: Option<&Path>) -> (Pending, u16) {
    let port = free_port();
    let mut pending = receive_at(vmm, &format!("tcp:{LOOPBACK}:{port}"), tls_dir, serial);
    let listens = || (pending.is_answered() || is_listening(port)).then_some(());
    wait_until(LIMIT, listens, || "a receiver".to_owned());
    (pending, port)
}

/// Whether somebody listens at a port of this host, without a connection to it (proc_net_tcp(5)).
fn is_listening(port: u16) -> bool {
    let of = format!(":{port:04X} 00000000:0000 0A");
    let all = std::fs::read_to_string("/proc/net/tcp").expect("what is listened to");
    all.lines().any(|line| line.contains(&of))
}

/// Sends the VM of `first`, as the body that `to` makes of a path says: the VMM that has it then, and where its serial port goes.
///
/// # Panics
/// When that fails.
#[must_use]
pub fn moves(scratch: &Scratch, mut first: Vmm, to: impl Fn(&Path) -> Value) -> (Vmm, SerialFile) {
    let second = Vmm::with_api(scratch, [""; 0]);
    let serial = SerialFile::new(scratch.path(format!("serial-{}", second.pid())));
    let (mut received, path) = receive(&second, scratch, &serial);
    first.api().done("vm.send-migration", &to(&path));
    assert_eq!(received.answer().status, 204);
    first.expect_exit(0);
    (second, serial)
}

/// Pauses the guest of `first`, which has counted on `serial`, and sends it, as the body that `to` makes of a path says. It
/// arrives paused, and goes on.
///
/// # Panics
/// When it does not.
pub fn arrives_paused(scratch: &Scratch, first: Vmm, serial: &SerialFile, to: impl Fn(&Path) -> Value) {
    first.api().puts(&["vm.pause"]);
    let (second, other) = moves(scratch, first, to);
    assert_eq!(second.api().phase(), Phase::Paused);
    second.api().puts(&["vm.resume"]);
    goes_on(serial, &other);
}

/// Sends the VM to `address` as soon as somebody listens there.
///
/// # Panics
/// When nobody does.
pub fn send_to(vmm: &Vmm, address: &str, tls_dir: Option<&Path>) -> Answer {
    send_with(&mut vmm.api(), &with_tls(json!({ "destination_url": address }), tls_dir), LIMIT)
}

/// Sends the VM as `body` says, as soon as somebody listens there; waits for that no longer than `limit`.
///
/// # Panics
/// When nobody does.
pub fn send_with(api: &mut Api, body: &Value, limit: Duration) -> Answer {
    let nobody = |answer: &Answer| answer.body.contains("cannot connect to the receiver");
    wait_until(
        limit,
        || Some(api.put_json("vm.send-migration", body)).filter(|answer| !nobody(answer)),
        || format!("a receiver at {}", body["destination_url"]),
    )
}

/// Two network namespaces with a cable between them; removed when dropped.
#[derive(Debug)]
pub struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    /// Their addresses.
    pub const ADDRESSES: [&'static str; 2] = ["192.0.2.1", "192.0.2.2"];

    /// Makes them.
    ///
    /// # Errors
    /// What ip(8) said, where that is not allowed or there is no such program.
    pub fn new() -> Result<Self, String> {
        let names = ["a", "b"].map(|end| format!("vmm{}{end}", std::process::id()));
        let made = Self { names };
        let [a, b] = &made.names;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add e0 netns {a} type veth peer name e0 netns {b}"))?;
        for (name, address) in made.names.iter().zip(Self::ADDRESSES) {
            ip(&format!("-n {name} address add {address}/24 dev e0"))?;
            ip(&format!("-n {name} link set e0 up"))?;
        }
        Ok(made)
    }

    /// The name of one of them.
    #[must_use]
    pub fn name(&self, second: bool) -> &str {
        let [a, b] = &self.names;
        if second { b } else { a }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns delete {name}"));
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("ip {arguments}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("ip {arguments}: {}", text.trim_end())) }
}
