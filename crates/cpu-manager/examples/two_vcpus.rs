//! Two scripted vCPUs on the fake hypervisor: run, pause, save, and go on in another set of vCPUs.

use std::error::Error;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_cpu_manager::affinity::CoreScheduling;
use vmm_cpu_manager::cpuid::{Cpuid, CpuidOptions};
use vmm_cpu_manager::set::{ExitTargets, VcpuSet, VcpuSpec};
use vmm_cpu_manager::state::TimeBase;
use vmm_cpu_manager::topology::Topology;
use vmm_device_model::bus::{Bus, BusDevice, Mapping};
use vmm_device_model::thread::Unconfined;
use vmm_hypervisor::fake::{Exit, Fake};
use vmm_hypervisor::{Hypervisor, VmOptions};

const PORT: u16 = 0x80;

/// Prints what the guest writes.
struct Printer;

impl BusDevice for Printer {
    fn read(&mut self, _region: u16, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _region: u16, _offset: u64, data: &[u8]) {
        println!("the guest writes {data:?}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let hypervisor = Fake::new();
    let vm = hypervisor.create_vm(&VmOptions { ioapic_pins: 24, tss_address: 0 })?;

    let pio = Arc::new(Bus::new());
    let target = Arc::new(Mutex::new(Printer));
    pio.update(|map| map.insert(Mapping { base: PORT.into(), len: 1, target, region: 0 }))?;
    let (ended, events) = channel();
    let ended = Mutex::new(ended);
    let targets = ExitTargets {
        pio,
        mmio: Arc::new(Bus::new()),
        end_of_interrupt: Arc::new(|_vector| {}),
        events: Arc::new(move |event| {
            let _ = ended.lock().unwrap_or_else(PoisonError::into_inner).send(event);
        }),
    };

    let topology = Topology::flat(2);
    let options = CpuidOptions { topology, max_phys_bits: None, nested: false };
    let cpuid = Cpuid::new(&hypervisor.supported_cpuid()?, &options);
    let spec = VcpuSpec {
        boot: 2,
        topology,
        cpuid,
        msrs: None,
        affinity: Vec::new(),
        core_scheduling: CoreScheduling::Off,
        threads: Arc::new(Unconfined),
    };

    let mut first = VcpuSet::create(&hypervisor, &vm, &spec, None, &targets)?;
    for vcpu in 0..2 {
        hypervisor.script(vcpu, [Exit::PioWrite { port: PORT, data: vec![vcpu as u8] }]);
    }
    first.run();
    while hypervisor.count("KVM_RUN") < 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    first.pause()?;
    let states = first.save()?;
    println!("paused and saved {} vCPUs, APIC IDs {:?}", states.len(), first.apic_ids());
    drop(first);

    let mut second = VcpuSet::create(&hypervisor, &vm, &spec, None, &targets)?;
    second.restore(states, TimeBase::SameVm)?;
    second.run();
    hypervisor.script(1, [Exit::PioWrite { port: PORT, data: vec![7] }, Exit::Shutdown]);
    let event = events.recv_timeout(Duration::from_secs(5))?;
    println!("vcpu{}: {}", event.vcpu, event.kind);
    second.pause()?;
    Ok(())
}
