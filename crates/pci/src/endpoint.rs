//! Configuration space and MSI-X of one endpoint together: what most functions are made of.

use std::sync::Arc;

use vmm_device_model::interrupt::MsiVectors;
use vmm_snapshot::RecordError;

use crate::config::{BARS, ConfigError, ConfigSpace, ConfigWordV1};
use crate::function::ConfigEffect;
use crate::msix::{BarPlace, Msix, MsixError, MsixV1};

/// A configuration space, and MSI-X that follows its message control word.
#[derive(Debug)]
pub struct Endpoint {
    config: ConfigSpace,
    msix: Option<(Msix, u16)>,
}

impl Endpoint {
    /// An endpoint without MSI-X.
    pub fn new(config: ConfigSpace) -> Self {
        Self { config, msix: None }
    }

    /// An endpoint whose configuration space gets an MSI-X capability appended.
    ///
    /// # Errors
    /// There is no room, or an impossible number of vectors.
    pub fn with_msix(
        mut config: ConfigSpace,
        vectors: Arc<dyn MsiVectors>,
        table: BarPlace,
        pending: BarPlace,
    ) -> Result<Self, EndpointError> {
        let msix = Msix::new(vectors)?;
        let at = config.add_capability(&msix.capability(table, pending))?;
        Ok(Self { config, msix: Some((msix, at + 2)) })
    }

    /// See [`PciFunction::config_read`](crate::function::PciFunction::config_read).
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// See [`PciFunction::config_write`](crate::function::PciFunction::config_write).
    pub fn write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect {
        let moved = self.config.write(offset, data);
        if let Some((msix, control)) = &self.msix {
            msix.set_control(self.config.u16_at(*control));
        }
        if moved { ConfigEffect::BarsMoved } else { ConfigEffect::None }
    }

    /// See [`PciFunction::bar_addresses`](crate::function::PciFunction::bar_addresses).
    pub fn bar_addresses(&self) -> [Option<u64>; BARS] {
        self.config.bar_addresses()
    }

    /// Its MSI-X, if it has one.
    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref().map(|(msix, _)| msix)
    }

    /// Its configuration space, to look at.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// Back to power-on. The BARs are where they were then: the host bridge must be told.
    pub fn reset(&mut self) {
        self.config.reset();
        if let Some((msix, _)) = &self.msix {
            msix.reset();
        }
    }

    /// All state.
    pub fn save(&self) -> EndpointV1 {
        let Self { config, msix } = self;
        EndpointV1 { config: config.save(), msix: msix.as_ref().map(|(msix, _)| msix.save()) }
    }

    /// Takes over what [`save`](Self::save) gave. The host bridge must be told of the BARs.
    ///
    /// # Errors
    /// It is the state of another endpoint, or impossible.
    pub fn restore(&mut self, state: &EndpointV1) -> Result<(), RecordError> {
        self.config.restore(&state.config)?;
        match (&self.msix, &state.msix) {
            (Some((msix, control)), Some(saved)) => msix.restore(saved, self.config.u16_at(*control)),
            (None, None) => Ok(()),
            (Some(_), None) => Err(invalid("MSI-X is missing")),
            (None, Some(_)) => Err(invalid("the function has no MSI-X")),
        }
    }
}

fn invalid(what: &str) -> RecordError {
    RecordError::Invalid { kind: "pci endpoint", what: what.to_owned() }
}

/// Saved state of an [`Endpoint`]; part of its device's record.
#[derive(Debug, Clone, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub struct EndpointV1 {
    /// Registers that the guest can write, BARs among them.
    #[n(0)]
    pub config: Vec<ConfigWordV1>,
    /// MSI-X, if it has one.
    #[n(1)]
    pub msix: Option<MsixV1>,
}

/// Why an endpoint cannot be built as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// Its configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its MSI-X.
    #[error(transparent)]
    Msix(#[from] MsixError),
}
