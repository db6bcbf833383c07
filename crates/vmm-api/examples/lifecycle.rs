//! A VM's life by typed calls: create, boot, look, switch off, remove.
//!
//! ```sh
//! vmm --api-socket /tmp/vmm.sock &
//! cargo run -p vmm-api --example lifecycle -- /tmp/vmm.sock vmlinux
//! ```

use std::error::Error;
use std::path::Path;
use std::time::Duration;
use vmm_api::client::Client;
use vmm_api::commands::{vm, vmm};
use vmm_api::config::{PayloadConfig, VmConfig};
use vmm_state::Phase;

/// The longest that one of these calls may take.
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [socket, kernel] = arguments.as_slice() else {
        return Err("usage: lifecycle SOCKET KERNEL".into());
    };
    live(Path::new(socket), Path::new(kernel))
}

/// One life of a VM that boots `kernel`, in the VMM that listens at `socket`.
pub(crate) fn live(socket: &Path, kernel: &Path) -> Result<(), Box<dyn Error>> {
    // The VMM may have been started a moment ago.
    let mut client = Client::connect_within(socket, LIMIT)?;
    client.set_timeout(Some(LIMIT))?;
    println!("VMM {}", client.call::<vmm::Ping>(&())?.version);

    // Everything that is not said has the contract's default. The request is checked here as the VMM checks it.
    let payload = PayloadConfig { kernel: Some(kernel.to_owned()), ..PayloadConfig::default() };
    let config = VmConfig { payload: Some(payload), ..VmConfig::default() };
    client.call::<vm::Create>(&vm::CreateRequest::new(config)?)?;

    // A refusal is an error with a stable code, the causes, and the phases in which it would do.
    client.call::<vm::Boot>(&())?;
    client.wait_for(Phase::Running, Some(LIMIT))?;

    let info = client.call::<vm::Info>(&())?;
    println!("{:?}, {} bytes of memory", info.state, info.memory_actual_size);
    for (id, device) in info.device_tree.unwrap_or_default() {
        println!("  {id} {}", device.pci_bdf.unwrap_or_default());
    }

    client.call::<vm::Shutdown>(&())?;
    client.wait_for(Phase::Shutdown, Some(LIMIT))?;
    client.call::<vm::Delete>(&())?;
    Ok(())
}
