//! What was found, as text. What files say is shown without control characters.

use serde_json::Value;
use vmm_api::config::Bytes;
use vmm_snapshot::directory::{
    ConfigChange, Described, Difference, Extents, Inspection, LayerSummary, MemorySummary, RecordChange,
    RecordSummary, Region,
};

use crate::ctl::{moment, plain, short, table};

/// Ranges of memory that are listed per region, and the length of a value of the configuration.
const MOST_RANGES: usize = 16;
const MOST_VALUE: usize = 80;

/// `verify`: a line for each snapshot that is whole.
pub(super) fn verified(layers: &[Value], all: bool) -> String {
    let line = |layer: &Value| {
        let text = |name| plain(layer.get(name).and_then(Value::as_str).unwrap_or_default());
        let number = |name| layer.get(name).and_then(Value::as_u64).unwrap_or_default();
        let (path, held) = (text("path"), Bytes(number("held_bytes")));
        let chunks = counted(number("chunks"), "chunk");
        format!("{path}: manifest, state, chunk table and {chunks} of memory ({held} held) are as written\n")
    };
    let end = match (all, layers.len()) {
        (false, _) => String::new(),
        (true, 1) => "whole\n".to_owned(),
        (true, count) => format!("whole: {count} snapshots\n"),
    };
    layers.iter().map(line).collect::<String>() + &end
}

/// `inspect`: what it is, then tables, then the configuration.
pub(super) fn inspection(found: &Inspection) -> String {
    let size: u64 = found.memory.iter().map(|region| region.size).sum();
    let facts = [
        ["snapshot", &found.id.to_string()],
        ["format", &found.format.to_string()],
        ["written by", &format!("vmm {}", plain(&found.vmm))],
        ["created", &moment(found.created_ms)],
        ["architecture", &plain(&found.architecture)],
        ["memory", &format!("{} in {}", Bytes(size), counted(found.memory.len() as u64, "region"))],
    ]
    .map(|facts| facts.map(str::to_owned));
    let mut text = table(&facts);
    text.push('\n');
    text += &chain(&found.layers);
    text.push('\n');
    text += &memory(found);
    text.push('\n');
    let header = ["RECORD", "KIND", "VERSION", "BYTES"].map(str::to_owned);
    let mut rows = vec![header];
    records(&found.records, 0, &mut rows);
    text += &table(&rows);
    text += "\nCONFIG\n";
    // What is nested too deep for a value is shown as it is.
    let config = serde_json::from_str::<Value>(found.config.get());
    let config = config.map_or_else(|_| plain(found.config.get()), |value| format!("{value:#}"));
    text += &config.lines().map(|line| plain(line) + "\n").collect::<String>();
    text
}

fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// The snapshots, oldest first, numbered as in the table of memory.
fn chain(layers: &[LayerSummary]) -> String {
    let header = ["LAYER", "ID", "CREATED", "STATE", "DIRECTORY"].map(str::to_owned);
    let row = |(index, layer): (usize, &LayerSummary)| {
        let LayerSummary { id, path, created_ms, state_bytes, .. } = layer;
        [
            (index + 1).to_string(),
            id.to_string().chars().take(12).collect(),
            moment(*created_ms),
            state_bytes.to_string(),
            plain(&path.to_string_lossy()),
        ]
    };
    table(&[header].into_iter().chain(layers.iter().enumerate().map(row)).collect::<Vec<_>>())
}

/// Per region and layer what is held.
fn memory(found: &Inspection) -> String {
    let header =
        ["REGION", "ADDRESS", "SIZE", "LAYER", "EXTENTS", "HELD", "CHUNKS", "ON DISK"].map(str::to_owned);
    let mut rows = vec![header];
    for (number, region) in found.memory.iter().enumerate() {
        for (index, layer) in found.layers.iter().enumerate() {
            let of = layer.regions.get(number).copied().unwrap_or_default();
            let MemorySummary { extents, held_bytes, chunks, disk_bytes } = of;
            rows.push([
                plain(&region.zone),
                format!("{:#x}", region.gpa),
                Bytes(region.size).to_string(),
                (index + 1).to_string(),
                extents.to_string(),
                Bytes(held_bytes).to_string(),
                chunks.to_string(),
                Bytes(disk_bytes).to_string(),
            ]);
        }
    }
    table(&rows)
}

/// As deep as `inspect` opens sets.
fn records(list: &[RecordSummary], depth: usize, rows: &mut Vec<[String; 4]>) {
    for RecordSummary { owner, kind, version, bytes, records: inner } in list {
        let owner = format!("{}{}", "  ".repeat(depth), plain(owner));
        rows.push([owner, plain(kind), version.to_string(), bytes.to_string()]);
        records(inner, depth + 1, rows);
    }
}

/// `diff`: a line for each thing that differs.
pub(super) fn difference(found: &Difference, regions: &[Region]) -> String {
    if found.is_none() {
        return "no difference\n".to_owned();
    }
    let mut lines: Vec<String> = found.config.iter().map(config).collect();
    lines.extend(found.records.iter().map(record));
    match &found.memory {
        None => lines.push("memory: the regions are not the same".to_owned()),
        Some(memory) => {
            let differing = memory.iter().zip(regions).filter(|(extents, _)| !extents.ranges().is_empty());
            lines.extend(differing.flat_map(|(extents, region)| ranges(extents, region)));
        }
    }
    lines.join("\n") + "\n"
}

fn config(ConfigChange { path, before, after }: &ConfigChange) -> String {
    let value = |value: &Option<Value>| match value {
        None => "absent".to_owned(),
        Some(value) => short(&plain(&value.to_string()), MOST_VALUE),
    };
    match (path.as_str(), before, after) {
        ("", ..) => "config: all of it".to_owned(),
        (path, before, after) => format!("config {}: {} -> {}", plain(path), value(before), value(after)),
    }
}

fn record(RecordChange { owner, before, after }: &RecordChange) -> String {
    let of = |record: &Option<Described>| match record {
        None => "absent".to_owned(),
        Some(Described { kind, version, bytes }) => format!("{} v{version}, {bytes} bytes", plain(kind)),
    };
    let (before, after) = (of(before), of(after));
    let what =
        if before == after { format!("{before}, other content") } else { format!("{before} -> {after}") };
    format!("record {}: {what}", plain(owner))
}

/// What differs of a region, by guest physical address.
fn ranges(extents: &Extents, region: &Region) -> Vec<String> {
    let Region { zone, gpa, .. } = region;
    let all = extents.ranges();
    let pages = Bytes(extents.bytes());
    let first =
        format!("memory {} at {gpa:#x}: {pages} in {}", plain(zone), counted(all.len() as u64, "range"));
    let range = |range: &std::ops::Range<u64>| {
        let (start, end) = (gpa.saturating_add(range.start), gpa.saturating_add(range.end));
        format!("  {start:#x} to {end:#x}, {}", Bytes(range.end - range.start))
    };
    let more = all.len().checked_sub(MOST_RANGES).filter(|more| *more > 0);
    let more = more.map(|more| format!("  and {more} more"));
    std::iter::once(first).chain(all.iter().take(MOST_RANGES).map(range)).chain(more).collect()
}
