//! What operators do to Linux guests, and what guests do that operators are told of.

use vmm_tests::harness::linux::{Console, LinuxGuest};
use vmm_tests::harness::{Api, Scratch, Vmm, wait_until};
use vmm_tests::image::rootfs;
use vmm_tests::kernels::KernelVersion;

use crate::{BOOT_LIMIT, Bench, SYSTEM_LIMIT, check_report, now, system};

/// A guest that runs a script from its initramfs; `words` are more of its command line.
fn script_guest(bench: &Bench, script: &str, words: &str) -> LinuxGuest {
    let (kernel, initramfs) = bench.images.kernel(KernelVersion::Debian13);
    LinuxGuest {
        kernel: kernel.vmlinux(),
        initramfs: initramfs.to_owned(),
        cmdline: format!("console=ttyS0 quiet {words} {}", rootfs::script_word(script)),
        cpus: 2,
        memory_mib: 512,
        disks: Vec::new(),
    }
}

fn boot(vmm: &Vmm, guest: &LinuxGuest, console: &Console, pvpanic: bool) -> Api {
    let mut document = guest.document(console.path());
    document["pvpanic"] = pvpanic.into();
    let mut api = vmm.api();
    api.create(&document);
    api.puts(&["vm.boot"]);
    api
}

const READY: &str = r#"echo "VMM-TEST: ready=$(systemctl is-active systemd-logind)"; sleep 600"#;

/// The power button makes a Debian shut down as its administrator would.
pub(crate) fn power_button(bench: &Bench) {
    let scratch = Scratch::new();
    let mut guest = system(bench, "button", READY, "none");
    guest.cmdline.push_str(" vmm.modules=button,evdev");
    let console = bench.disks.console("button");
    let before = now();
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = boot(&vmm, &guest, &console, false);
    console.wait_for(&mut vmm, SYSTEM_LIMIT, "ready", "active");
    api.puts(&["vm.power-button"]);
    console.wait_for_power_off(&mut vmm, SYSTEM_LIMIT);
    check_report(&console, before, 1);
}

/// Reboots of one VM, by the guest; 20 in a soak (`VMM_REBOOTS=20`).
fn reboots() -> u64 {
    std::env::var("VMM_REBOOTS").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// A guest that reboots again and again comes up each time, and is counted.
pub(crate) fn reboot_loop(bench: &Bench) {
    let scratch = Scratch::new();
    let guest = script_guest(bench, "true", "vmm.action=reboot");
    let console = bench.disks.console("reboots");
    let before = now();
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = boot(&vmm, &guest, &console, false);
    let boots = reboots() + 1;
    let limit = BOOT_LIMIT * u32::try_from(boots).unwrap();
    let up = || {
        console.check_alive();
        (console.facts("action").len() as u64 >= boots).then_some(())
    };
    wait_until(limit, up, || format!("{boots} boots; so far {}", console.facts("action").len()));
    // The last of them may be rebooting by now.
    let info = api.info();
    assert!(info.boots >= boots, "{} boots", info.boots);
    assert_eq!(info.last_guest_event.as_deref(), if info.boots > 1 { Some("reset") } else { None });
    api.puts(&["vm.shutdown"]);
    for epoch in console.facts("epoch") {
        let epoch: u64 = epoch.parse().unwrap();
        assert!((before - 3..=now() + 3).contains(&epoch), "the guest's clock says {epoch}");
    }
    assert_eq!(console.facts("dmesg"), [""; 0]);
}

const COUNT_NMIS: &str = r#"
nmis() { awk '/NMI:/ { for (i = 2; i <= 3; i++) n += $i; print n }' /proc/interrupts; }
echo "VMM-TEST: before=$(nmis)"
tries=0
while [ "$(nmis)" -lt 2 ] && [ $tries -lt 3000 ]; do sleep 0.1; tries=$((tries + 1)); done
echo "VMM-TEST: after=$(nmis)"
"#;

/// An NMI reaches every vCPU.
pub(crate) fn nmi_arrives(bench: &Bench) {
    let scratch = Scratch::new();
    // Without the watchdog, which uses NMIs itself where there is a counter for it.
    let guest = script_guest(bench, COUNT_NMIS, "nmi_watchdog=0");
    let console = bench.disks.console("nmi");
    let mut vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = boot(&vmm, &guest, &console, false);
    console.wait_for(&mut vmm, BOOT_LIMIT, "before", "0");
    api.puts(&["vm.nmi"]);
    console.wait_for_power_off(&mut vmm, BOOT_LIMIT);
    assert_eq!(console.fact("after"), "2");
}

const CRASH: &str = r#"
echo "VMM-TEST: pvpanic=$(ls /sys/bus/pci/drivers/pvpanic-pci | grep -c 0000)"
# The line is to be on the console before the kernel has none.
sleep 2
echo c >/proc/sysrq-trigger
"#;

/// A kernel's panic is told with its cause, and leads where the operator chose.
pub(crate) fn panic_is_reported(bench: &Bench) {
    let scratch = Scratch::new();
    let guest = script_guest(bench, CRASH, "vmm.modules=pvpanic_pci");
    let console = bench.disks.console("panic");
    let vmm = Vmm::with_api(&scratch, [""; 0]);
    let mut api = boot(&vmm, &guest, &console, true);
    let told = || api.info().last_guest_event;
    let event = wait_until(BOOT_LIMIT, told, || "the panic to be told".to_owned());
    assert_eq!(event, "panic");
    assert_eq!(console.fact("pvpanic"), "1");
    assert_eq!(api.state(), "Running", "reported, and no more");
    api.puts(&["vm.delete"]);

    let mut vmm = Vmm::with_api(&scratch, ["--on-panic", "exit"]);
    let console = bench.disks.console("panic-exit");
    boot(&vmm, &guest, &console, true);
    assert_eq!(vmm.wait_within(BOOT_LIMIT).code(), Some(10));
}
