//! Names of devices: unique across all kinds, automatic where none is given.

use std::collections::{BTreeMap, BTreeSet};

use super::VmConfig;
use super::check::Checker;

/// The longest name in bytes; it becomes part of thread names, paths of saved state and replies.
const MAX_ID: usize = 128;

/// Names of the parts that have no id of their own in the configuration.
const BUILT_IN: &[&str] = &["_serial", "_ioapic", "_gpio", "_iommu", "_watchdog", "_pvpanic"];

/// One device of a configuration.
struct Slot<'c> {
    path: String,
    prefix: &'static str,
    /// Whether there can be several, so that automatic names are numbered.
    many: bool,
    id: &'c mut Option<String>,
}

/// Gives a name to each device that has none: `_disk0`, `_rng` and so on, the first that is free.
///
/// Names once given stay with their device, whatever is added or removed later: they key its saved state.
pub fn fill_ids(config: &mut VmConfig) {
    let slots = slots(config);
    let mut used: BTreeSet<String> = slots.iter().filter_map(|slot| slot.id.clone()).collect();
    used.extend(BUILT_IN.iter().map(|id| (*id).to_owned()));
    let mut next: BTreeMap<&str, u32> = BTreeMap::new();
    for slot in slots.into_iter().filter(|slot| slot.id.is_none()) {
        let mut id = slot.prefix.to_owned();
        let number = next.entry(slot.prefix).or_default();
        // Ends: `used` is finite, and each round tries another name.
        while slot.many && id == slot.prefix || used.contains(&id) {
            id = format!("{}{number}", slot.prefix);
            *number += 1;
        }
        used.insert(id.clone());
        *slot.id = Some(id);
    }
}

/// Checks the names that the user chose.
pub(super) fn check(config: &mut VmConfig, checker: &mut Checker) {
    let mut owners: BTreeMap<String, String> =
        BUILT_IN.iter().map(|id| ((*id).to_owned(), "a built-in device".to_owned())).collect();
    for slot in slots(config) {
        let Some(id) = slot.id.as_deref() else {
            continue;
        };
        let path = format!("{}.id", slot.path);
        if id.is_empty() || id.len() > MAX_ID || id.chars().any(char::is_control) {
            checker.invalid(path, format!("must be 1 to {MAX_ID} bytes without control characters"));
        } else if let Some(owner) = owners.get(id) {
            checker.invalid(path, format!("{id:?} is also the name of {owner}"));
        } else {
            owners.insert(id.to_owned(), slot.path);
        }
    }
}

/// Whether `id` names a fixed part of the machine.
pub(super) fn is_fixed(config: &VmConfig, id: &str) -> bool {
    let of = |given: &Option<String>| given.as_deref() == Some(id);
    BUILT_IN.contains(&id)
        || of(&config.rng.id)
        || of(&config.console.id)
        || config.balloon.iter().any(|device| of(&device.id))
        || config.rtc.iter().any(|device| of(&device.id))
        || config.ivshmem.iter().any(|device| of(&device.id))
}

/// All devices that can have a name.
fn slots(config: &mut VmConfig) -> Vec<Slot<'_>> {
    let mut slots = Vec::new();
    macro_rules! many {
        ($($field:ident $prefix:literal),+) => {$(
            for (index, device) in config.$field.iter_mut().flatten().enumerate() {
                let path = format!("{}[{index}]", stringify!($field));
                slots.push(Slot { path, prefix: $prefix, many: true, id: &mut device.id });
            }
        )+};
    }
    macro_rules! one {
        ($($field:ident $prefix:literal),+) => {$(
            for device in config.$field.iter_mut() {
                slots.push(Slot { path: stringify!($field).into(), prefix: $prefix, many: false, id: &mut device.id });
            }
        )+};
    }
    many!(disks "_disk", net "_net", fs "_fs", generic_vhost_user "_generic_vhost_user", pmem "_pmem");
    many!(devices "_vfio", user_devices "_vfio_user", vdpa "_vdpa");
    one!(balloon "_balloon", vsock "_vsock", rtc "_rtc", ivshmem "_ivshmem");
    slots.push(Slot { path: "rng".into(), prefix: "_rng", many: false, id: &mut config.rng.id });
    slots.push(Slot { path: "console".into(), prefix: "_console", many: false, id: &mut config.console.id });
    slots
}
