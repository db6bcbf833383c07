//! What a machine counted. Counts go on over a pause, and begin at 0 with each machine: at boot and at reboot.

use std::collections::BTreeMap;

use vmm_device_model::metrics::{Family, Kind, Sample, Value};

use super::Machine;

static CONSOLE_LOST: Family = Family {
    name: "vmm_console_lost_bytes",
    help: "Bytes of a console's output that were lost because nobody took them in time.",
    unit: "bytes",
    kind: Kind::Counter,
};

impl Machine {
    /// The counters of `vm.counters`, by device and name; devices without such counters are left out.
    pub fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        self.devices.measure().counters
    }

    /// All that is counted: by vCPUs, devices and consoles. Samples of one family need not stand together.
    pub fn metrics(&self) -> Vec<Sample> {
        let lost = self.ways.outputs.iter().map(|(id, output)| Sample {
            family: &CONSOLE_LOST,
            labels: vec![("device", id.clone())],
            value: Value::Counter(output.lost()),
        });
        self.vcpus.measure().into_iter().chain(self.devices.measure().samples).chain(lost).collect()
    }
}
