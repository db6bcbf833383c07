//! Devices that come and go while there is no machine: edits of the configuration, checked as a whole.

use super::ids::is_fixed;
use super::{Checked, MachineSpec, fill_ids};
use crate::commands::device::AddCommand;
use crate::config::{Fault, VmConfig};
use crate::error::{ApiError, Code};

/// `config` with one more device.
///
/// # Errors
/// There is a device of that id already, or the device cannot be part of this VM; the faults have their paths in the
/// device's own object.
pub fn with_device<C: AddCommand>(config: &VmConfig, device: C::Request) -> Result<Checked, ApiError> {
    let mut edited = config.clone();
    if let Some(id) = C::id(&device)
        && (has_device(config, id) || is_fixed(config, id))
    {
        return Err(ApiError::new(Code::DeviceExists, format!("the VM has a device {id:?} already")));
    }
    let Some(place) = C::put(device, &mut edited) else {
        let what = format!("the VM has a {} already, and can have one only", C::FIELD);
        return Err(ApiError::new(Code::DeviceExists, what));
    };
    checked(edited).map_err(|faults| {
        let faults: Vec<_> = faults.into_iter().map(|fault| within(&place, fault)).collect();
        ApiError::from(faults).context(format!("cannot add to {}", C::FIELD))
    })
}

/// `config` without the device `id`.
///
/// # Errors
/// There is no such device, or it is a fixed part of the machine.
pub fn without_device(config: &VmConfig, id: &str) -> Result<Checked, ApiError> {
    if is_fixed(config, id) {
        return Err(ApiError::new(
            Code::FixedDevice,
            format!("device {id:?} is a fixed part of the machine"),
        ));
    }
    let mut edited = config.clone();
    if !take_device(&mut edited, id) {
        return Err(ApiError::new(Code::NoDevice, format!("the VM has no device {id:?}")));
    }
    checked(edited).map_err(|faults| ApiError::from(faults).context(format!("cannot remove device {id:?}")))
}

fn checked(mut config: VmConfig) -> Result<Checked, Vec<Fault>> {
    let spec = MachineSpec::check(&config)?;
    fill_ids(&mut config);
    Ok(Checked { config, spec })
}

/// The fault with its path from `place` on: what the client sent is the object there.
fn within(place: &str, fault: Fault) -> Fault {
    let inner = fault.path.strip_prefix(place).map(|rest| rest.trim_start_matches('.'));
    match inner {
        Some("") => Fault { path: "$".to_owned(), ..fault },
        Some(path) => Fault { path: path.to_owned(), ..fault },
        None => fault,
    }
}

/// Lists the kinds of devices that can be added and removed.
macro_rules! removable {
    (many $($many:ident),+; one $($one:ident),+) => {
        fn has_device(config: &VmConfig, id: &str) -> bool {
            $(config.$many.iter().flatten().any(|device| device.id.as_deref() == Some(id)) ||)+
            $(config.$one.iter().any(|device| device.id.as_deref() == Some(id)) ||)+
            false
        }

        /// Whether there was such a device; then it is gone.
        fn take_device(config: &mut VmConfig, id: &str) -> bool {
            let found = has_device(config, id);
            $(if let Some(list) = &mut config.$many {
                list.retain(|device| device.id.as_deref() != Some(id));
                if list.is_empty() {
                    config.$many = None;
                }
            })+
            $(config.$one.take_if(|device| device.id.as_deref() == Some(id));)+
            found
        }
    };
}

removable! {
    many disks, net, fs, generic_vhost_user, pmem, devices, user_devices, vdpa;
    one vsock
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::device::{AddDisk, AddNet, AddVsock};
    use crate::config::{DiskConfig, NetConfig, UnknownFields, VsockConfig, parse_vm_config};

    fn config() -> VmConfig {
        let json = br#"{"payload": {"kernel": "k"}, "disks": [{"path": "a"}, {"path": "b", "id": "data"}]}"#;
        let mut config = parse_vm_config(json, UnknownFields::Refuse).unwrap().config;
        fill_ids(&mut config);
        config
    }

    fn disk(path: &str, id: Option<&str>) -> DiskConfig {
        DiskConfig { path: Some(path.into()), id: id.map(str::to_owned), ..DiskConfig::default() }
    }

    fn ids(config: &VmConfig) -> Vec<String> {
        config.disks.iter().flatten().filter_map(|disk| disk.id.clone()).collect()
    }

    #[test]
    fn a_disk_comes_with_a_name_of_its_own_and_the_others_keep_theirs() {
        let added = with_device::<AddDisk>(&config(), disk("c", None)).unwrap();
        assert_eq!(ids(&added.config), ["_disk0", "data", "_disk1"]);
        assert_eq!(added.spec.disks.len(), 3);
        let removed = without_device(&added.config, "data").unwrap();
        assert_eq!(ids(&removed.config), ["_disk0", "_disk1"]);
        let named = with_device::<AddDisk>(&removed.config, disk("d", Some("data"))).unwrap();
        assert_eq!(ids(&named.config), ["_disk0", "_disk1", "data"]);
    }

    #[test]
    fn the_last_device_of_its_kind_leaves_no_list() {
        let config = without_device(&config(), "data").unwrap().config;
        let config = without_device(&config, "_disk0").unwrap().config;
        assert_eq!(config.disks, None);
    }

    #[test]
    fn a_name_that_is_taken_is_a_conflict() {
        for id in ["data", "_rng", "_console", "_ioapic", "_serial"] {
            let error = with_device::<AddDisk>(&config(), disk("c", Some(id))).unwrap_err();
            assert_eq!(error.code, Code::DeviceExists, "{id}");
        }
    }

    #[test]
    fn what_is_not_there_or_belongs_to_the_machine_is_not_removed() {
        assert_eq!(without_device(&config(), "nothing").unwrap_err().code, Code::NoDevice);
        for id in ["_rng", "_console", "_serial", "_ioapic"] {
            assert_eq!(without_device(&config(), id).unwrap_err().code, Code::FixedDevice, "{id}");
        }
    }

    #[test]
    fn faults_have_their_place_in_what_was_sent() {
        let odd = DiskConfig { queue_size: 3, ..disk("c", None) };
        let error = with_device::<AddDisk>(&config(), odd).unwrap_err();
        assert_eq!(error.code, Code::InvalidConfig);
        assert_eq!(error.faults[0].path, "queue_size");
    }

    #[test]
    fn a_kind_that_is_not_built_is_refused_by_name() {
        let error = with_device::<AddNet>(&config(), NetConfig::default()).unwrap_err();
        assert_eq!((error.code, error.faults[0].path.as_str()), (Code::NotBuilt, "$"));
        assert!(error.to_string().contains("net[0]"), "{error}");
        let socket = VsockConfig { cid: 3, socket: "s".into(), ..VsockConfig::default() };
        let error = with_device::<AddVsock>(&config(), socket.clone()).unwrap_err();
        assert_eq!(error.code, Code::NotBuilt);
        let mut config = config();
        config.vsock = Some(socket.clone());
        assert_eq!(with_device::<AddVsock>(&config, socket).unwrap_err().code, Code::DeviceExists);
    }
}
