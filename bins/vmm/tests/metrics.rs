//! All metrics of a machine with every device, and the page that lists them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::sync::Arc;

use vmm::console::Consoles;
use vmm::machine::stages::Stages;
use vmm::machine::{EventPost, Locks, Machine, Plan, Ports};
use vmm_api::config::UnknownFields;
use vmm_api::http::Counts;
use vmm_api::spec::parse_and_check;
use vmm_device_model::thread::{ThreadHook, Unconfined};
use vmm_epoll::mailbox;
use vmm_hypervisor::fake::Fake;
use vmm_tests::tiny::Guest;

#[test]
fn the_documented_table_is_this_one() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let json = serde_json::json!({
        "payload": { "kernel": Guest::Halt.write(folder.path()).unwrap() },
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 64 << 20 },
        "disks": [{ "path": disk, "image_type": "Raw" }],
        "serial": { "mode": "Null" },
        "console": { "mode": "Null" },
        "debug_console": { "mode": "Null" },
        "pvpanic": true,
    });
    let spec = parse_and_check(json.to_string().as_bytes(), UnknownFields::Refuse).unwrap().spec;
    let threads: Arc<dyn ThreadHook> = Arc::new(Unconfined);
    let consoles = Consoles::open(&spec, &threads).unwrap();
    let end = |console: &Option<vmm::console::Console>| console.as_ref().map(vmm::console::Console::end);
    let ports =
        Ports { serial: end(&consoles.serial), console: end(&consoles.console), debug: end(&consoles.debug) };
    let (mailbox, _inbox) = mailbox().unwrap();
    let post = EventPost::new(1, mailbox);
    let plan = Plan {
        hypervisor: &Fake::new(),
        spec: &spec,
        ports: &ports,
        post: &post,
        threads: &threads,
        locks: Locks::Now,
        generation: None,
    };
    let machine = Machine::build(&plan, &mut Stages::default()).unwrap();

    let page = vmm::metrics::page(Some(&machine), Some(&Counts::default()));
    let text = page.text().unwrap();
    assert!(text.contains("vmm_build_info{version=\"v") && text.ends_with("# EOF\n"), "{text}");
    for family in page.families() {
        assert!(family.name.starts_with("vmm_") || family.name.starts_with("process_"), "{family:?}");
        assert!(family.help.ends_with('.'), "{family:?}");
    }
    let documented = include_str!("../../../docs/observability.md");
    let table = vmm::metrics::table(&page);
    assert!(documented.contains(&table), "docs/observability.md should have:\n{table}");
}
