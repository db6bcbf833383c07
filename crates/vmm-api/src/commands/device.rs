//! Commands that add and remove devices.

use super::command;
use crate::command::{Command, Decode, Encode, Incoming, JSON, decode_json, encode_json};
use crate::config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, UserDeviceConfig,
    VdpaConfig, VmConfig, VmRemoveDevice, VsockConfig,
};
use crate::error::ApiError;
use serde::{Deserialize, Serialize};

/// Where a device is, once it is on the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    /// The device's id.
    pub id: String,
    /// Its PCI address, `0000:00:01.0`.
    pub bdf: String,
}

/// Reply of the `vm.add-*` commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is part of the configuration and comes with the next boot: 204.
    Cold,
    /// It is on the bus: 200.
    Hot(PciDeviceInfo),
}

impl Encode for Added {
    const MEDIA_TYPE: &'static str = JSON;

    fn encode(&self) -> Result<Vec<u8>, ApiError> {
        match self {
            Self::Cold => Ok(Vec::new()),
            Self::Hot(info) => encode_json(info),
        }
    }
}

impl Decode for Added {
    fn decode(incoming: Incoming) -> Result<Self, ApiError> {
        if incoming.body.is_empty() { Ok(Self::Cold) } else { Ok(Self::Hot(decode_json(&incoming.body)?)) }
    }
}

/// A command that adds a device; its request is the device's object of the configuration.
pub trait AddCommand: Command<Reply = Added> {
    /// The field of [`VmConfig`] that the device goes into.
    const FIELD: &'static str;

    /// The device's id in its object.
    fn id(device: &Self::Request) -> Option<&str>;

    /// Puts the device into a configuration; returns its JSON path there, or `None` if there is one already and there
    /// can be no second.
    fn put(device: Self::Request, config: &mut VmConfig) -> Option<String>;
}

/// Declares a command that adds a device to a list of the configuration.
macro_rules! add {
    ($(#[doc = $text:literal])* $name:ident($request:ty), $route:literal, $field:ident) => {
        command! {
            $(#[doc = $text])*
            $name($request) -> Added, Put $route, $name, DeviceExists
        }

        impl AddCommand for $name {
            const FIELD: &'static str = stringify!($field);

            fn id(device: &$request) -> Option<&str> {
                device.id.as_deref()
            }

            fn put(device: $request, config: &mut VmConfig) -> Option<String> {
                let list = config.$field.get_or_insert_default();
                list.push(device);
                Some(format!("{}[{}]", Self::FIELD, list.len() - 1))
            }
        }
    };
}

add! {
    /// Adds a physical device by VFIO.
    AddDevice(DeviceConfig), "vm.add-device", devices
}
add! {
    /// Adds a device of another process by vfio-user.
    AddUserDevice(UserDeviceConfig), "vm.add-user-device", user_devices
}
add! {
    /// Adds a disk.
    AddDisk(DiskConfig), "vm.add-disk", disks
}
add! {
    /// Adds a shared file system.
    AddFs(FsConfig), "vm.add-fs", fs
}
add! {
    /// Adds a vhost-user device of any type.
    AddGenericVhostUser(GenericVhostUserConfig), "vm.add-generic-vhost-user", generic_vhost_user
}
add! {
    /// Adds persistent memory.
    AddPmem(PmemConfig), "vm.add-pmem", pmem
}
add! {
    /// Adds a network device.
    AddNet(NetConfig), "vm.add-net", net
}
add! {
    /// Adds a vDPA device.
    AddVdpa(VdpaConfig), "vm.add-vdpa", vdpa
}

command! {
    /// Adds the socket between guest and host; there is one at most.
    AddVsock(VsockConfig) -> Added, Put "vm.add-vsock", AddVsock, DeviceExists
}

impl AddCommand for AddVsock {
    const FIELD: &'static str = "vsock";

    fn id(device: &VsockConfig) -> Option<&str> {
        device.id.as_deref()
    }

    fn put(device: VsockConfig, config: &mut VmConfig) -> Option<String> {
        if config.vsock.is_some() {
            return None;
        }
        config.vsock = Some(device);
        Some(Self::FIELD.to_owned())
    }
}

command! {
    /// Removes a device that was added or created.
    RemoveDevice(VmRemoveDevice) -> (), Put "vm.remove-device", RemoveDevice, NoDevice, FixedDevice
}
