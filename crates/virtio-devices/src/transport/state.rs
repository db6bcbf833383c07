//! Saved state of a virtio-pci device.

use vmm_device_model::dma::DmaMemory;
use vmm_pci::endpoint::EndpointV1;
use vmm_snapshot::{Record, RecordError};

use super::VIRTIO_F_EVENT_IDX;
use super::common::Common;
use super::front::Front;
use super::phase::Phase;
use super::queue::{QueueConfig, size_is_valid};
use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};

/// Saved state of a virtio device and its transport.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct VirtioPciV1 {
    /// Device ID (virtio 1.3, section 5).
    #[n(0)]
    pub device_type: u32,
    /// Phase; `Starting` and `Resetting` are work that was not done yet.
    #[n(1)]
    pub phase: Phase,
    /// Device status register.
    #[n(2)]
    pub status: u8,
    /// Features that the driver wrote.
    #[n(3)]
    pub driver_features: u64,
    /// Feature windows: the device's half shown, the driver's half written.
    #[n(4)]
    pub feature_selects: [u32; 2],
    /// Queue that the queue registers show.
    #[n(5)]
    pub queue_select: u16,
    /// MSI-X vector of configuration changes, 0xffff for none.
    #[n(6)]
    pub config_vector: u16,
    /// Configuration generation.
    #[n(7)]
    pub generation: u8,
    /// Interrupt status.
    #[n(8)]
    pub isr: u8,
    /// All queues in order.
    #[n(9)]
    pub queues: Vec<QueueV1>,
    /// Configuration space and MSI-X.
    #[n(10)]
    pub endpoint: EndpointV1,
    /// The device's own record.
    #[n(11)]
    pub device: Record,
}

vmm_snapshot::schema!(VirtioPciV1: "virtio-pci" v1);

/// Saved state of one virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct QueueV1 {
    /// Descriptors.
    #[n(0)]
    pub size: u16,
    /// MSI-X vector, 0xffff for none.
    #[n(1)]
    pub vector: u16,
    /// Whether the driver enabled it.
    #[n(2)]
    pub enabled: bool,
    /// Guest physical address of the descriptor table.
    #[n(3)]
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    #[n(4)]
    pub available: u64,
    /// Guest physical address of the used ring.
    #[n(5)]
    pub used: u64,
    /// Index of the next available entry to take.
    #[n(6)]
    pub next_available: u16,
    /// Index of the next used entry to write.
    #[n(7)]
    pub next_used: u16,
}

impl Front {
    pub(super) fn save(&self, device_type: u32, device: Record) -> VirtioPciV1 {
        // What is not named below is built from the configuration, or shared with the device.
        let Self {
            id: _,
            endpoint,
            common,
            interrupt,
            config: _,
            kicks: _,
            attention: _,
            window: _,
            misuse: _,
        } = self;
        let Common {
            offered: _,
            device_feature_select,
            driver_feature_select,
            driver_features,
            status,
            phase,
            queue_select,
            queues,
        } = common;
        let queue = |(i, config): (usize, &QueueConfig)| {
            let QueueConfig {
                max_size: _,
                size,
                enabled,
                descriptors,
                available,
                used,
                next_available,
                next_used,
            } = *config;
            let vector = interrupt.queue_vector(i);
            QueueV1 { size, vector, enabled, descriptors, available, used, next_available, next_used }
        };
        VirtioPciV1 {
            device_type,
            phase: *phase,
            status: *status,
            driver_features: *driver_features,
            feature_selects: [*device_feature_select, *driver_feature_select],
            queue_select: *queue_select,
            config_vector: interrupt.config_vector(),
            generation: interrupt.generation(),
            isr: interrupt.isr(),
            queues: queues.iter().enumerate().map(queue).collect(),
            endpoint: endpoint.save(),
            device,
        }
    }

    pub(super) fn restore(
        &mut self,
        device_type: u32,
        state: &VirtioPciV1,
        memory: &DmaMemory,
    ) -> Result<(), RecordError> {
        let found = state.device_type;
        if found != device_type {
            return Err(invalid(format!("device type {found}, expected {device_type}")));
        }
        let mut common = self.restored(state)?;
        if !self.interrupt.knows(state.config_vector) {
            return Err(invalid(format!("no MSI-X vector {}", state.config_vector)));
        }
        check_status(&common)?;
        common.queues = self.restored_queues(state)?;
        if state.phase == Phase::Running {
            let view = memory.view();
            for queue in common.queues.iter().filter(|q| q.enabled) {
                let built = queue.build(&view, common.agreed() & VIRTIO_F_EVENT_IDX != 0);
                built.map_err(|e| invalid(e.to_string()))?;
            }
        }
        self.endpoint.restore(&state.endpoint)?;
        self.common = common;
        self.interrupt.set_config_vector(state.config_vector);
        for (i, queue) in state.queues.iter().enumerate() {
            self.interrupt.set_queue_vector(i, queue.vector);
        }
        self.interrupt.set_generation(state.generation);
        self.interrupt.set_isr(state.isr);
        Ok(())
    }

    fn restored(&self, state: &VirtioPciV1) -> Result<Common, RecordError> {
        let [device_feature_select, driver_feature_select] = state.feature_selects;
        if state.isr & !3 != 0 {
            return Err(invalid(format!("interrupt status {:#x}", state.isr)));
        }
        Ok(Common {
            offered: self.common.offered,
            device_feature_select,
            driver_feature_select,
            driver_features: state.driver_features,
            status: state.status,
            phase: state.phase,
            queue_select: state.queue_select,
            queues: Vec::new(),
        })
    }

    fn restored_queues(&self, state: &VirtioPciV1) -> Result<Vec<QueueConfig>, RecordError> {
        let (found, expected) = (state.queues.len(), self.common.queues.len());
        if found != expected {
            return Err(invalid(format!("{found} queues, expected {expected}")));
        }
        let mut queues = Vec::with_capacity(expected);
        for (saved, built) in state.queues.iter().zip(&self.common.queues) {
            let QueueV1 { size, vector, enabled, descriptors, available, used, next_available, next_used } =
                *saved;
            let max_size = built.max_size;
            if !size_is_valid(size, max_size) {
                return Err(invalid(format!("queue size {size} is not a power of two up to {max_size}")));
            }
            if !self.interrupt.knows(vector) {
                return Err(invalid(format!("no MSI-X vector {vector}")));
            }
            queues.push(QueueConfig {
                max_size,
                size,
                enabled,
                descriptors,
                available,
                used,
                next_available,
                next_used,
            });
        }
        Ok(queues)
    }
}

/// Whether phase, status and features can stand together.
fn check_status(common: &Common) -> Result<(), RecordError> {
    let has = |bits: u8| common.status & bits == bits;
    let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
    let phase_fits = match common.phase {
        Phase::Reset => common.status == 0,
        Phase::Configuring => common.status != 0 && !has(DRIVER_OK) && !has(NEEDS_RESET),
        Phase::Starting | Phase::Running => has(DRIVER_OK | FEATURES_OK) && !has(NEEDS_RESET),
        Phase::Resetting => common.status != 0,
        Phase::Failed => has(DRIVER_OK | FEATURES_OK | NEEDS_RESET),
    };
    if common.status & !known != 0 || !phase_fits {
        return Err(invalid(format!("status {:#x} in phase {:?}", common.status, common.phase)));
    }
    if has(FEATURES_OK) && common.driver_features & !common.offered != 0 {
        let missing = common.driver_features & !common.offered;
        return Err(invalid(format!("features {missing:#x} are in use but not offered")));
    }
    if has(FEATURES_OK) && !common.features_acceptable() {
        return Err(invalid("the driver is not a modern one"));
    }
    Ok(())
}

fn invalid(what: impl Into<String>) -> RecordError {
    RecordError::invalid::<VirtioPciV1>(what)
}
