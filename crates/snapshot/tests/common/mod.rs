//! Shared by the tests on stable Rust and the fuzz target in fuzz/.

use vmm_snapshot::{RecordSet, Schema, minicbor, schema};

#[derive(Debug, Clone, PartialEq, minicbor::Encode, minicbor::Decode)]
pub(crate) struct UartV1 {
    #[n(0)]
    pub(crate) divisor: u16,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub(crate) fifo: Vec<u8>,
}
schema!(UartV1: "uart" v1);

#[derive(Debug, Clone, PartialEq, minicbor::Encode, minicbor::Decode)]
pub(crate) struct UartV2 {
    #[n(0)]
    pub(crate) divisor: u16,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub(crate) fifo: Vec<u8>,
    #[n(2)]
    pub(crate) scratch: u8,
}
schema!(UartV2: "uart" v2 after UartV1);

#[derive(Debug, Clone, PartialEq, minicbor::Encode, minicbor::Decode)]
pub(crate) struct UartV3 {
    #[n(0)]
    pub(crate) divisor: u16,
    #[n(1)]
    pub(crate) fifo: Vec<u16>,
    #[n(2)]
    pub(crate) scratch: u8,
    #[n(3)]
    pub(crate) pending: Option<u8>,
}
schema!(UartV3: "uart" v3 after UartV2);

impl From<UartV1> for UartV2 {
    fn from(UartV1 { divisor, fifo }: UartV1) -> Self {
        Self { divisor, fifo, scratch: 0xa5 }
    }
}

impl From<UartV2> for UartV3 {
    fn from(UartV2 { divisor, fifo, scratch }: UartV2) -> Self {
        Self { divisor, fifo: fifo.into_iter().map(u16::from).collect(), scratch, pending: None }
    }
}

/// Whatever decodes must encode to the same bytes.
pub(crate) fn decode_all(bytes: &[u8]) {
    fn one<S: Schema>(bytes: &[u8]) {
        if let Ok(state) = S::decode(bytes) {
            assert_eq!(state.encode(), bytes);
        }
    }
    one::<UartV1>(bytes);
    one::<UartV2>(bytes);
    one::<UartV3>(bytes);
    one::<RecordSet>(bytes);
}
