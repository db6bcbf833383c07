//! The address of a PCI function.

use std::fmt;
use std::str::FromStr;

/// Devices on a bus.
pub const DEVICES: u8 = 32;
/// Functions of a device.
pub const FUNCTIONS: u8 = 8;
/// Bytes of a function's configuration space in the ECAM window.
pub const FUNCTION_CONFIG_SIZE: u64 = 4096;
/// Bytes of a segment's ECAM window per bus.
pub const BUS_CONFIG_SIZE: u64 = FUNCTION_CONFIG_SIZE * (DEVICES as u64) * (FUNCTIONS as u64);

/// Segment, bus, device and function of a PCI function; shown and parsed as `ssss:bb:dd.f`.
///
/// ```
/// use vmm_pci::bdf::Bdf;
///
/// let bdf: Bdf = "0000:00:1f.2".parse()?;
/// assert_eq!((bdf.device(), bdf.function()), (31, 2));
/// assert_eq!(bdf.ecam_offset(), 0xf_a000);
/// assert_eq!(bdf.to_string(), "0000:00:1f.2");
/// # Ok::<(), vmm_pci::bdf::BdfError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    segment: u16,
    bus: u8,
    devfn: u8,
}

impl Bdf {
    /// Function `function` of device `device` on bus `bus` of segment `segment`.
    ///
    /// # Errors
    /// There is no such device or function number.
    pub fn new(segment: u16, bus: u8, device: u8, function: u8) -> Result<Self, BdfError> {
        if device >= DEVICES {
            return Err(BdfError::Device { device });
        }
        if function >= FUNCTIONS {
            return Err(BdfError::Function { function });
        }
        Ok(Self { segment, bus, devfn: device << 3 | function })
    }

    /// From an offset into the ECAM window of `segment` (PCI Express base specification, 7.2.2), with the
    /// register offset in the function. `None` past bus 255.
    pub fn from_ecam_offset(segment: u16, offset: u64) -> Option<(Self, u16)> {
        let bus = u8::try_from(offset / BUS_CONFIG_SIZE).ok()?;
        let devfn = u8::try_from((offset / FUNCTION_CONFIG_SIZE) % 256).ok()?;
        let register = u16::try_from(offset % FUNCTION_CONFIG_SIZE).ok()?;
        Some((Self { segment, bus, devfn }, register))
    }

    /// Where the function's configuration space starts in the ECAM window of its segment.
    pub fn ecam_offset(self) -> u64 {
        u64::from(self.bus) * BUS_CONFIG_SIZE + u64::from(self.devfn) * FUNCTION_CONFIG_SIZE
    }

    /// Segment (PCI domain).
    pub fn segment(self) -> u16 {
        self.segment
    }

    /// Bus in the segment.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// Device on the bus, below 32.
    pub fn device(self) -> u8 {
        self.devfn >> 3
    }

    /// Function of the device, below 8.
    pub fn function(self) -> u8 {
        self.devfn & 7
    }

    /// Device and function in one byte, as the configuration mechanisms encode them.
    pub fn devfn(self) -> u8 {
        self.devfn
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device(), self.function())
    }
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        let bad = || BdfError::Syntax { text: text.to_owned() };
        let (segment, rest) = text.split_once(':').ok_or_else(bad)?;
        let (bus, rest) = rest.split_once(':').ok_or_else(bad)?;
        let (device, function) = rest.split_once('.').ok_or_else(bad)?;
        let hex = |field: &str, digits: usize| {
            let all_hex = field.len() == digits && field.bytes().all(|b| b.is_ascii_hexdigit());
            all_hex.then(|| u16::from_str_radix(field, 16).ok()).flatten().ok_or_else(bad)
        };
        let byte = |field: &str, digits| hex(field, digits).and_then(|v| u8::try_from(v).map_err(|_| bad()));
        Self::new(hex(segment, 4)?, byte(bus, 2)?, byte(device, 2)?, byte(function, 1)?)
    }
}

/// Not the address of a PCI function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BdfError {
    /// Device number above 31.
    #[error("PCI device number {device} is above 31")]
    Device {
        /// The number.
        device: u8,
    },
    /// Function number above 7.
    #[error("PCI function number {function} is above 7")]
    Function {
        /// The number.
        function: u8,
    },
    /// The text has another shape.
    #[error("{text:?} is not a PCI address of the form ssss:bb:dd.f")]
    Syntax {
        /// The text.
        text: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_for_every_device_and_function() {
        for device in 0..DEVICES {
            for function in 0..FUNCTIONS {
                let bdf = Bdf::new(0x12, 0xab, device, function).unwrap();
                assert_eq!(bdf.to_string().parse::<Bdf>().unwrap(), bdf);
                let (back, register) = Bdf::from_ecam_offset(0x12, bdf.ecam_offset() + 0xffc).unwrap();
                assert_eq!((back, register), (bdf, 0xffc));
            }
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        assert_eq!(Bdf::new(0, 0, 32, 0).unwrap_err(), BdfError::Device { device: 32 });
        assert_eq!(Bdf::new(0, 0, 0, 8).unwrap_err(), BdfError::Function { function: 8 });
        for text in
            ["", "0:0:0.0", "0000:00:00", "0000:00:20.0", "0000:00:00.8", "000g:00:00.0", "+000:00:00.0"]
        {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
        assert_eq!(Bdf::from_ecam_offset(0, 256 * BUS_CONFIG_SIZE), None);
    }
}
