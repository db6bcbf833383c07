//! Saves with version 1 of a schema, restores with version 2.
use vmm_snapshot::{RecordSet, Schema, SetError, minicbor, schema};

/// What version 1 saved.
#[derive(minicbor::Encode, minicbor::Decode)]
struct TimerV1 {
    #[n(0)]
    ticks: u64,
}
schema!(TimerV1: "timer" v1);

/// Version 2 knows a rate.
#[derive(Debug, minicbor::Encode, minicbor::Decode)]
struct TimerV2 {
    #[n(0)]
    ticks: u64,
    #[n(1)]
    hertz: u32,
}
schema!(TimerV2: "timer" v2 after TimerV1);

impl From<TimerV1> for TimerV2 {
    fn from(TimerV1 { ticks }: TimerV1) -> Self {
        Self { ticks, hertz: 1000 }
    }
}

fn main() -> Result<(), SetError> {
    let mut saved = RecordSet::new();
    saved.put("pm-timer", &TimerV1 { ticks: 42 })?;
    println!("saved {} record(s), {} bytes", saved.len(), saved.encode().len());

    let timer: TimerV2 = saved.take("pm-timer")?;
    println!("restored {timer:?} after {} ticks at {} Hz", timer.ticks, timer.hertz);
    saved.finish()
}
