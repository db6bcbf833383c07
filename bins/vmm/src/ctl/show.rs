//! Replies as tables. Control characters of foreign texts do not reach the terminal.

use std::time::{Duration, UNIX_EPOCH};

use vmm_api::config::{Bytes, VmConfig};
use vmm_api::info::{CountersReply, DeviceNode, RestoredFrom, VmInfo};
use vmm_api::progress::MigrationProgressReply;

use crate::logger::time::rfc3339;

/// A text whose control characters are escaped.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { plain.extend(c.escape_default()) } else { plain.push(c) }
    }
    plain
}

/// `vm.info`: what the VM is, then its devices.
pub(super) fn info(info: &VmInfo) -> String {
    let VmInfo { config, state, memory_actual_size, device_tree, phase, boots, .. } = info;
    // Other VMMs tell no phase and do not count.
    let phase = if phase.is_empty() { format!("{state:?}") } else { plain(phase) };
    let mut facts = vec![["state", &phase].map(str::to_owned)];
    if *boots > 0 {
        facts.push(["boots".to_owned(), boots.to_string()]);
    }
    if let Some(event) = &info.last_guest_event {
        facts.push(["last event".to_owned(), plain(event)]);
    }
    if let Some(RestoredFrom { source_url, created_ms, .. }) = &info.restored_from {
        let text = format!("{} of {}", plain(source_url), moment(*created_ms));
        facts.push(["restored from".to_owned(), text]);
    }
    facts.push(["vCPUs".to_owned(), vcpus(config)]);
    facts.push(["memory".to_owned(), Bytes(*memory_actual_size).to_string()]);
    facts.extend(boots_what(config).map(|(what, path)| [what.to_owned(), path]));
    let mut text = table(&facts);
    if let Some(tree) = device_tree {
        let header = ["DEVICE", "ADDRESS", "PARENT"].map(str::to_owned);
        let rows: Vec<[String; 3]> = [header].into_iter().chain(tree.values().map(device)).collect();
        text.push('\n');
        text.push_str(&table(&rows));
    }
    text
}

/// A point in time, from milliseconds since 1970.
pub(crate) fn moment(milliseconds: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds));
    time.map_or_else(|| format!("{milliseconds} ms after 1970"), rfc3339)
}

fn vcpus(config: &VmConfig) -> String {
    let (boot, max) = (config.cpus.boot_vcpus, config.cpus.max_vcpus);
    if max == boot { boot.to_string() } else { format!("{boot} of {max}") }
}

/// The files that the VM boots from.
fn boots_what(config: &VmConfig) -> impl Iterator<Item = (&'static str, String)> {
    let payload = config.payload.clone().unwrap_or_default();
    let path = |path: std::path::PathBuf| plain(&path.to_string_lossy());
    let files =
        [("kernel", payload.kernel), ("initramfs", payload.initramfs), ("firmware", payload.firmware)];
    files.into_iter().filter_map(move |(what, file)| Some((what, path(file?))))
}

fn device(node: &DeviceNode) -> [String; 3] {
    let or_dash = |text: &Option<String>| text.as_deref().map_or("-".to_owned(), plain);
    [plain(&node.id), or_dash(&node.pci_bdf), or_dash(&node.parent)]
}

/// `vm.migration-progress`: one fact a line.
pub(super) fn migration(reply: &MigrationProgressReply) -> String {
    let seconds = |micros: u64| format!("{}.{:03} s", micros / 1_000_000, micros / 1000 % 1000);
    let rate = |bytes: u64| format!("{}/s", about(bytes));
    let mut facts = vec![("status", format!("{:?}", reply.status))];
    let mut add = |name, fact: Option<String>| facts.extend(fact.map(|fact| (name, fact)));
    let begun = reply.role.is_some();
    add("end", reply.role.map(|role| format!("{role:?}")));
    add("check only", reply.check.then(|| "yes".to_owned()));
    add("step", reply.step.as_deref().map(plain));
    add("time", begun.then(|| seconds(reply.elapsed_us)));
    add("memory", (reply.memory_bytes > 0).then(|| about(reply.memory_bytes)));
    add("sent", begun.then(|| format!("{}, passes {}", about(reply.sent_bytes), reply.passes)));
    add("bandwidth", reply.bandwidth.map(rate));
    add("dirtied", reply.dirty_rate.map(rate));
    add("vCPUs slowed", (reply.throttle > 0).then(|| format!("{} %", reply.throttle)));
    add("blackout expected", reply.expected_blackout_ms.map(|ms| format!("{ms} ms")));
    add("owed", reply.owed_bytes.map(about));
    add("blackout", reply.blackout_us.map(seconds));
    add("because", (!reply.causes.is_empty()).then(|| plain(&reply.causes.join(": "))));
    table(&facts.into_iter().map(|(name, fact)| [name.to_owned(), fact]).collect::<Vec<_>>())
}

/// Bytes in a unit that leaves few digits.
pub(super) fn about(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes >> shift > 0);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(shift, unit)| format!("{}.{} {unit}", bytes >> shift, (bytes >> (shift - 10)) % 1024 * 10 / 1024),
    )
}

/// `vm.counters`: one counter a line.
pub(super) fn counters(counters: &CountersReply) -> String {
    let header = ["DEVICE", "COUNTER", "VALUE"].map(str::to_owned);
    let rows = counters.0.iter().flat_map(|(device, counters)| {
        counters.iter().map(|(counter, value)| [plain(device), plain(counter), value.to_string()])
    });
    table(&[header].into_iter().chain(rows).collect::<Vec<_>>())
}

/// Characters of a cell, at most: what a file or a server says makes no other line longer, and is no width that cannot be printed.
const WIDEST: usize = 256;

/// The beginning of `text`, if it has more characters than that.
pub(crate) fn short(text: &str, most: usize) -> String {
    match text.char_indices().nth(most).and_then(|(at, _)| text.get(..at)) {
        Some(begin) => format!("{begin}..."),
        None => text.to_owned(),
    }
}

/// Columns two spaces apart; what is only numbers below its header stands at the right.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| short(cell, WIDEST))).collect();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or_default());
    let numbers: [bool; N] = std::array::from_fn(|column| {
        let below = rows.iter().skip(1).filter_map(|row| row.get(column));
        column > 0 && N > 2 && rows.len() > 1 && below.into_iter().all(|cell| cell.parse::<u64>().is_ok())
    });
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths.iter().zip(&numbers)).map(|(cell, (width, number))| {
            if *number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_api::config::PayloadConfig;
    use vmm_api::info::VmState;

    fn node(id: &str, bdf: Option<&str>) -> (String, DeviceNode) {
        let node = DeviceNode { id: id.to_owned(), pci_bdf: bdf.map(str::to_owned), ..DeviceNode::default() };
        (id.to_owned(), node)
    }

    /// A file or a server may say anything.
    #[test]
    fn a_long_cell_is_cut() {
        let text = table(&[["a".repeat(1 << 17), "b".to_owned()], ["c".to_owned(), "d".to_owned()]]);
        assert_eq!(text.lines().map(|line| line.chars().count()).max(), Some(WIDEST + "...  b".len()));
    }

    #[test]
    fn info_is_two_tables() {
        let mut config = VmConfig::default();
        config.cpus.max_vcpus = 4;
        config.payload =
            Some(PayloadConfig { kernel: Some("/boot/vmlinux".into()), ..PayloadConfig::default() });
        let running = VmInfo {
            config: std::sync::Arc::new(config),
            state: VmState::Running,
            memory_actual_size: 512 << 20,
            device_tree: Some([node("_disk0", Some("0000:00:02.0")), node("serial", None)].into()),
            phase: "Running".to_owned(),
            boots: 2,
            last_guest_event: Some("reset".to_owned()),
            restored_from: Some(RestoredFrom {
                source_url: "file:///srv/\n".to_owned(),
                id: "0".repeat(64),
                created_ms: 1_790_000_000_000,
            }),
        };
        let expected = "\
state          Running
boots          2
last event     reset
restored from  file:///srv/\\n of 2026-09-21T14:13:20.000000Z
vCPUs          1 of 4
memory         512M
kernel         /boot/vmlinux

DEVICE  ADDRESS       PARENT
_disk0  0000:00:02.0  -
serial  -             -
";
        assert_eq!(info(&running), expected);
        let other = VmInfo {
            config: std::sync::Arc::default(),
            device_tree: None,
            phase: String::new(),
            boots: 0,
            last_guest_event: None,
            restored_from: None,
            ..running
        };
        assert_eq!(info(&other), "state   Running\nvCPUs   1\nmemory  512M\n");
    }

    #[test]
    fn counters_stand_below_each_other() {
        let of =
            |list: &[(&str, u64)]| list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let all = [
            ("_disk0".to_owned(), of(&[("read_bytes", 4096), ("read_ops", 1)])),
            ("_net10".to_owned(), of(&[("rx", 12)])),
        ];
        let expected = "\
DEVICE  COUNTER     VALUE
_disk0  read_bytes   4096
_disk0  read_ops        1
_net10  rx             12
";
        assert_eq!(counters(&CountersReply(all.into())), expected);
        assert_eq!(counters(&CountersReply::default()), "DEVICE  COUNTER  VALUE\n");
    }

    #[test]
    fn no_text_commands_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\n\u{9b}é"), "a\\u{1b}[2Jb\\n\\u{9b}é");
        let evil = node("\u{1b}c", Some("\r"));
        assert_eq!(device(&evil.1), ["\\u{1b}c", "\\r", "-"].map(str::to_owned));
    }
}
