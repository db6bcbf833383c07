//! All devices of a VM, in the order in which they were added.

use std::collections::BTreeMap;
use std::time::Instant;

use vmm_device_model::device::{Blocker, DeviceChange, DeviceError, VmDevice};
use vmm_device_model::metrics::{Measures, Sample};
use vmm_device_model::recipe::{BuildError, Recipe};
use vmm_pci::resources::PciResources;
use vmm_snapshot::{RecordError, RecordSet, SetError};

use crate::machine::Machine;
use crate::node::{DeviceNode, Resource};
use crate::tree::DeviceTreeV1;

/// A recipe as the set takes it: anything from a port to a PCI function.
pub type AnyRecipe = Box<dyn for<'a> Recipe<dyn PciResources + 'a>>;

/// The devices of a VM. Order matters: who delivers interrupts is added first, so that it is restored
/// first and quiesced last.
#[derive(Debug)]
pub struct DeviceSet {
    devices: Vec<Slot>,
    machine: Machine,
}

/// What the devices of a VM counted, see [`vmm_device_model::metrics`].
#[derive(Debug, Default)]
pub struct DeviceCounts {
    /// By device id and counter, as `vm.counters` tells it. Devices without such counters are left out.
    pub counters: BTreeMap<String, BTreeMap<String, u64>>,
    /// The same and more as metrics, in the order of the devices.
    pub samples: Vec<Sample>,
}

#[derive(Debug)]
struct Slot {
    id: String,
    device: Box<dyn VmDevice>,
    resources: Vec<Resource>,
}

impl DeviceSet {
    /// No devices yet.
    pub fn new(machine: Machine) -> Self {
        Self { devices: Vec::new(), machine }
    }

    /// Keeps for the devices of a saved tree, which are yet to be added, what they had.
    ///
    /// # Errors
    /// The tree is impossible here.
    pub fn keep(&mut self, tree: &DeviceTreeV1) -> Result<(), RecordError> {
        self.machine.keep(tree)
    }

    /// Builds a device and adds it.
    ///
    /// # Errors
    /// The id is taken, or the device cannot be built; nothing has changed then.
    pub fn add(&mut self, recipe: AnyRecipe) -> Result<(), AddError> {
        let id = recipe_id(&recipe);
        if self.devices.iter().any(|slot| slot.id == id) {
            return Err(AddError::Taken { id });
        }
        let mut builder = self.machine.builder(&id);
        match recipe.build(&mut builder) {
            Ok(device) => {
                let resources = builder.finish();
                self.devices.push(Slot { id, device, resources });
                Ok(())
            }
            Err(source) => {
                drop(builder);
                Err(AddError::Build { id, source })
            }
        }
    }

    /// Does what the device `id` asked for through its registers. Unknown ids are ignored: the request of
    /// a device that has gone meanwhile.
    ///
    /// # Errors
    /// The device's.
    pub fn service(&mut self, id: &str) -> Result<(), StepError> {
        match self.devices.iter_mut().find(|slot| slot.id == id) {
            Some(slot) => slot.device.service().map_err(|source| step("service", id, source)),
            None => Ok(()),
        }
    }

    /// What guests made of the devices since the last call: each with its id, by device, oldest first.
    pub fn take_changes(&mut self) -> Vec<(String, DeviceChange)> {
        let of_slot = |slot: &mut Slot| {
            let changes = slot.device.take_changes();
            changes.into_iter().map(|change| (slot.id.clone(), change)).collect::<Vec<_>>()
        };
        self.devices.iter_mut().flat_map(of_slot).collect()
    }

    /// Brings every device to rest: all are asked first, then waited for until `deadline`. vCPUs are
    /// paused.
    ///
    /// # Errors
    /// A device does not come to rest; all of them work again.
    pub fn quiesce(&mut self, deadline: Instant) -> Result<(), StepError> {
        for slot in self.devices.iter_mut().rev() {
            slot.device.quiesce_begin();
        }
        let mut result = Ok(());
        for slot in self.devices.iter_mut().rev() {
            let finished = slot.device.quiesce_finish(deadline);
            result = result.and(finished.map_err(|source| step("quiesce", &slot.id, source)));
        }
        if result.is_err()
            && let Err(error) = self.resume()
        {
            log::error!("{error}");
        }
        result
    }

    /// Lets every device work again.
    ///
    /// # Errors
    /// The first device's that could not; the others work.
    pub fn resume(&mut self) -> Result<(), StepError> {
        let mut result = Ok(());
        for slot in &mut self.devices {
            let resumed = slot.device.resume();
            result = result.and(resumed.map_err(|source| step("resume", &slot.id, source)));
        }
        result
    }

    /// Brings every device back to power-on. Quiesced before.
    ///
    /// # Errors
    /// The first device's that could not.
    pub fn reset(&mut self) -> Result<(), StepError> {
        self.devices
            .iter_mut()
            .try_for_each(|slot| slot.device.reset().map_err(|source| step("reset", &slot.id, source)))
    }

    /// The state of every device. Quiesced before.
    ///
    /// # Errors
    /// Never in practice: ids are unique.
    pub fn save(&self) -> Result<RecordSet, SetError> {
        let mut records = RecordSet::new();
        for slot in &self.devices {
            records.insert(&slot.id, slot.device.save_record())?;
        }
        Ok(records)
    }

    /// Gives every device its state. The devices are freshly built or reset.
    ///
    /// # Errors
    /// A device's state is missing or refused, or state of a device is left that this VM does not have.
    /// The VM is of no use then.
    pub fn restore(&mut self, mut records: RecordSet) -> Result<(), RestoreError> {
        for slot in &mut self.devices {
            let record = records.take_record(&slot.id)?;
            slot.device
                .restore_record(&record)
                .map_err(|source| RestoreError::Refused { id: slot.id.clone(), source })?;
        }
        Ok(records.finish()?)
    }

    /// What stands against a snapshot, a migration or an unplug, by device.
    pub fn blockers(&self) -> Vec<(String, Blocker)> {
        let of = |slot: &Slot| -> Vec<_> {
            slot.device.blockers().into_iter().map(|blocker| (slot.id.clone(), blocker)).collect()
        };
        self.devices.iter().flat_map(of).collect()
    }

    /// What every device counted.
    pub fn measure(&self) -> DeviceCounts {
        let mut counts = DeviceCounts::default();
        for slot in &self.devices {
            let mut measures = Measures::of_device(&slot.id);
            slot.device.measure(&mut measures);
            let (counters, samples) = measures.into_parts();
            counts.samples.extend(samples);
            if !counters.is_empty() {
                let named = counters.into_iter().map(|(name, value)| (name.to_owned(), value));
                counts.counters.insert(slot.id.clone(), named.collect());
            }
        }
        counts
    }

    /// The device tree, as saved state.
    pub fn tree(&self) -> DeviceTreeV1 {
        DeviceTreeV1::of(&self.nodes())
    }

    /// Checks that every device of a saved tree is here and has what it had.
    ///
    /// # Errors
    /// The first that has not, by name.
    pub fn check(&self, saved: &DeviceTreeV1) -> Result<(), RecordError> {
        saved.check(&self.tree())
    }

    /// The device tree.
    pub fn nodes(&self) -> Vec<DeviceNode> {
        let node = |slot: &Slot| DeviceNode { id: slot.id.clone(), resources: slot.resources.clone() };
        self.devices.iter().map(node).collect()
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        // Backwards, as they were built; each before what it had is given back.
        while let Some(Slot { id, device, resources }) = self.devices.pop() {
            drop(device);
            self.machine.release(&id, &resources);
        }
    }
}

/// [`Recipe::id`] of a recipe for any lifetime of resources.
fn recipe_id(recipe: &AnyRecipe) -> String {
    let recipe: &dyn Recipe<dyn PciResources> = &**recipe;
    recipe.id().to_owned()
}

fn step(what: &'static str, id: &str, source: DeviceError) -> StepError {
    StepError { what, id: id.to_owned(), source }
}

/// A device could not be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// Two devices with one id.
    #[error("there is a device {id:?} already")]
    Taken {
        /// The id.
        id: String,
    },
    /// The device could not be built.
    #[error("cannot build device {id:?}")]
    Build {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: BuildError,
    },
}

/// A device failed a step of its life cycle.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} device {id:?}")]
pub struct StepError {
    what: &'static str,
    id: String,
    #[source]
    source: DeviceError,
}

/// Devices could not take their saved state over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// A device refuses its state.
    #[error("cannot restore device {id:?}")]
    Refused {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// The records are not those of these devices.
    #[error("saved state and devices do not match")]
    Records(#[from] SetError),
}
