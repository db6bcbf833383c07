//! vCPUs, memory, payload and platform.

use std::path::PathBuf;

use super::table::{choice, object};
use super::wire::Bytes;

object! {
    /// Host CPUs on which one vCPU may run.
    pub struct CpuAffinity {
        /// Index of the vCPU.
        [current, required] vcpu: u32 = 0,
        /// Host CPUs on which it may run.
        [current, required] host_cpus: Vec<u32> = Vec::new(),
    }
}

object! {
    /// Optional features of the vCPUs.
    pub struct CpuFeatures {
        /// Advanced matrix extensions.
        [later] amx: bool = false,
    }
}

object! {
    /// How the vCPUs are arranged; the product of the parts is `max_vcpus`.
    pub struct CpuTopology {
        /// Threads in a core.
        [current, required] threads_per_core: u32 = 1,
        /// Cores in a die.
        [current, required] cores_per_die: u32 = 1,
        /// Dies in a package.
        [current, required] dies_per_package: u32 = 1,
        /// Packages.
        [current, required] packages: u32 = 1,
    }
}

choice! {
    /// Which vCPU threads may share a host core (the Linux core scheduling cookie).
    pub enum CoreScheduling as "CoreSchedulingMode" {
        /// Those of this VM.
        Vm = "Vm" | "vm",
        /// None: each vCPU has a core of its own.
        Vcpu = "Vcpu" | "vcpu",
        /// Any thread of the host.
        Off = "Off" | "off",
    }
}

object! {
    /// Number and form of the vCPUs.
    pub struct CpusConfig {
        /// vCPUs that run at boot.
        [current, in_json; key = "boot"; range = 1 to 4_294_967_295] boot_vcpus: u32 = 1,
        /// vCPUs that can ever run.
        [current, in_json; key = "max"; range = 1 to 4_294_967_295] max_vcpus: u32 = 1,
        /// Arrangement as threads:cores:dies:packages; without it each vCPU is a core of one package.
        [current] topology: Option<CpuTopology> = None,
        /// Offer the Hyper-V interface to the guest.
        [later] kvm_hyperv: bool = false,
        /// Largest number of physical address bits; fewer if the host has fewer.
        [current; range = 32 to 52] max_phys_bits: u8 = 46,
        /// Whether the guest may run virtual machines of its own, where the host can.
        [current] nested: bool = true,
        /// Host CPUs per vCPU, as `vcpu@[cpus]`.
        [current] affinity: Option<Vec<CpuAffinity>> = None,
        /// Optional CPU features.
        [current] features: CpuFeatures = CpuFeatures::default(),
        /// Which vCPU threads may share a host core.
        [current] core_scheduling: CoreScheduling = CoreScheduling::Vm,
    }
}

choice! {
    /// How memory is added to a running VM.
    pub enum HotplugMethod {
        /// As ACPI memory devices.
        Acpi = "Acpi" | "acpi",
        /// By virtio-mem.
        VirtioMem = "VirtioMem" | "virtio-mem",
    }
}

object! {
    /// A named part of guest memory.
    pub struct MemoryZoneConfig {
        /// Name of the zone.
        [current, required] id: String = String::new(),
        /// Size in bytes.
        [current, in_json] size: Bytes = Bytes::mib(512),
        /// File that holds the memory.
        [current] file: Option<PathBuf> = None,
        /// Let the host merge equal pages.
        [current] mergeable: bool = false,
        /// Map the memory so that other processes can share it.
        [current] shared: bool = false,
        /// Use huge pages.
        [current] hugepages: bool = false,
        /// Size of the huge pages; the host's default if absent.
        [current] hugepage_size: Option<Bytes> = None,
        /// Host NUMA node to take the memory from.
        [later] host_numa_node: Option<u32> = None,
        /// How much can be added while the VM runs.
        [later] hotplug_size: Option<Bytes> = None,
        /// How much of it is there at boot.
        [later] hotplugged_size: Option<Bytes> = None,
        /// Take all pages from the host at boot.
        [current] prefault: bool = false,
        /// Reserve swap space for the memory.
        [current] reserve: bool = false,
    }
}

object! {
    /// Guest memory.
    pub struct MemoryConfig {
        /// Size in bytes; 0 if zones are given.
        [current, in_json] size: Bytes = Bytes::mib(512),
        /// How much can be added while the VM runs.
        [later] hotplug_size: Option<Bytes> = None,
        /// How much of it is there at boot.
        [later] hotplugged_size: Option<Bytes> = None,
        /// Let the host merge equal pages.
        [current] mergeable: bool = false,
        /// How memory is added to a running VM.
        [later] hotplug_method: HotplugMethod = HotplugMethod::Acpi,
        /// Map the memory so that other processes can share it.
        [current] shared: bool = false,
        /// Use huge pages.
        [current] hugepages: bool = false,
        /// Size of the huge pages; the host's default if absent.
        [current] hugepage_size: Option<Bytes> = None,
        /// Take all pages from the host at boot.
        [current] prefault: bool = false,
        /// Reserve swap space for the memory.
        [current] reserve: bool = false,
        /// Let the host use transparent huge pages.
        [current] thp: bool = true,
        /// Named parts, instead of `size`; `--memory-zone` on the command line.
        [current; key = ""] zones: Option<Vec<MemoryZoneConfig>> = None,
    }
    retired {
        "file" = "null", "use a memory zone with a file";
    }
}

object! {
    /// One item of the firmware configuration device.
    pub struct FwCfgItem {
        /// Name of the item.
        [current, required] name: String = String::new(),
        /// File with its content.
        [current] file: Option<PathBuf> = None,
        /// Its content.
        [current] string: Option<String> = None,
    }
}

object! {
    /// What the firmware configuration device offers.
    pub struct FwCfgConfig {
        /// The memory map.
        [current] e820: bool = true,
        /// The kernel.
        [current] kernel: bool = true,
        /// The command line.
        [current] cmdline: bool = true,
        /// The initial RAM file system.
        [current] initramfs: bool = true,
        /// The ACPI tables.
        [current] acpi_tables: bool = true,
        /// More items.
        [current; key = ""] items: Option<Vec<FwCfgItem>> = None,
    }
}

object! {
    /// What the guest boots.
    pub struct PayloadConfig {
        /// Firmware image (an ELF file with a PVH entry).
        [current] firmware: Option<PathBuf> = None,
        /// Kernel: an ELF file with a PVH entry, or a bzImage.
        [current] kernel: Option<PathBuf> = None,
        /// Command line of the kernel.
        [current] cmdline: Option<String> = None,
        /// Initial RAM file system.
        [current] initramfs: Option<PathBuf> = None,
        /// IGVM image for confidential guests.
        [later] igvm: Option<PathBuf> = None,
        /// Host data of a confidential guest.
        [later] host_data: Option<String> = None,
        /// Firmware configuration device.
        [later] fw_cfg_config: Option<FwCfgConfig> = None,
    }
}

object! {
    /// Identity and limits of the machine.
    pub struct PlatformConfig {
        /// Number of PCI segments.
        [later] num_pci_segments: u16 = 1,
        /// Segments whose devices are all behind the virtual IOMMU.
        [later] iommu_segments: Option<Vec<u16>> = None,
        /// Address width of the virtual IOMMU.
        [later; key = "iommu_address_width"; alias = "iommu_address_width"] iommu_address_width_bits: u8 = 64,
        /// SMBIOS: serial number of the system.
        [later; alias = "serial_number"] system_serial_number: Option<String> = None,
        /// SMBIOS: UUID of the system.
        [later; alias = "uuid"] system_uuid: Option<String> = None,
        /// SMBIOS: strings of the manufacturer.
        [later] oem_strings: Option<Vec<String>> = None,
        /// SMBIOS: manufacturer.
        [later] system_manufacturer: Option<String> = None,
        /// SMBIOS: product.
        [later] system_product_name: Option<String> = None,
        /// SMBIOS: version.
        [later] system_version: Option<String> = None,
        /// SMBIOS: family.
        [later] system_family: Option<String> = None,
        /// SMBIOS: SKU number.
        [later] system_sku_number: Option<String> = None,
        /// SMBIOS: asset tag of the chassis.
        [later] chassis_asset_tag: Option<String> = None,
        /// Confidential guest by Intel TDX.
        [later] tdx: bool = false,
        /// Confidential guest by AMD SEV-SNP.
        [later] sev_snp: bool = false,
        /// Pass devices through by iommufd.
        [later] iommufd: bool = false,
        /// Descriptor of an open iommufd.
        [later] iommufd_fd: Option<i32> = None,
        /// Let passed-through devices reach each other's memory.
        [later] vfio_p2p_dma: bool = true,
    }
}

object! {
    /// One PCI segment.
    pub struct PciSegmentConfig {
        /// Number of the segment.
        [current, required] pci_segment: u16 = 0,
        /// Its share of the 32-bit window.
        [current] mmio32_aperture_weight: u32 = 1,
        /// Its share of the 64-bit window.
        [current] mmio64_aperture_weight: u32 = 1,
    }
}

object! {
    /// Distance to another NUMA node.
    pub struct NumaDistance {
        /// The other node.
        [current, required] destination: u32 = 0,
        /// Distance, 10 being local.
        [current, required] distance: u8 = 0,
    }
}

object! {
    /// One NUMA node of the guest.
    pub struct NumaConfig {
        /// Number of the node.
        [current, required] guest_numa_id: u32 = 0,
        /// Its vCPUs.
        [current] cpus: Option<Vec<u32>> = None,
        /// Distances to the others, as `node@distance`.
        [current] distances: Option<Vec<NumaDistance>> = None,
        /// Its memory zones.
        [current] memory_zones: Option<Vec<String>> = None,
        /// Its PCI segments.
        [current] pci_segments: Option<Vec<u16>> = None,
        /// The device that initiates its accesses.
        [current] device_id: Option<String> = None,
    }
    retired {
        "sgx_epc_sections" = "[]", "SGX is gone";
    }
}

object! {
    /// A path that the sandbox allows.
    pub struct LandlockConfig {
        /// File or directory.
        [current, required] path: PathBuf = PathBuf::new(),
        /// `r`, `w` or both.
        [current, required] access: String = String::new(),
    }
}

object! {
    /// Trusted platform module.
    pub struct TpmConfig {
        /// Socket of the software TPM.
        [current, required] socket: PathBuf = PathBuf::new(),
    }
}
