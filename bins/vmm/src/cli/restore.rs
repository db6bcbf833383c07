//! `--restore`, and the flags that replace parts of what is restored.

use clap::ArgMatches;
use vmm_api::config::{Fault, FaultKind, RestoreConfig};
use vmm_api::options::{Arity, FLAGS, FromOptions};
use vmm_api::spec::RestoreSpec;

/// The flag.
pub(super) const RESTORE: &str = "restore";

/// The VM flags that may stand beside it: they replace parts of the saved configuration.
pub(crate) const OVERRIDES: [&str; 4] = ["disk", "serial", "console", "debug-console"];

/// What is to be restored, if anything is.
pub(super) fn restore(matches: &ArgMatches, faults: &mut Vec<Fault>) -> Option<RestoreSpec> {
    let text = matches.get_one::<String>(RESTORE)?;
    let before = faults.len();
    let request = RestoreConfig::from_options("--restore", text).map_err(|found| faults.extend(found));
    let mut request = request.unwrap_or_default();
    overrides(matches, &mut request, faults);
    for flag in FLAGS.iter().filter(|flag| !OVERRIDES.contains(&flag.name)) {
        let given = if flag.arity() == Arity::Switch {
            matches.get_flag(flag.name)
        } else {
            matches.contains_id(flag.name)
        };
        if given {
            let message = "cannot be given beside --restore: the snapshot says what the VM is";
            faults.push(Fault::new(format!("--{}", flag.name), FaultKind::Invalid, message));
        }
    }
    if faults.len() > before {
        return None;
    }
    let named = |fault: Fault| Fault { path: name(&fault.path), ..fault };
    RestoreSpec::check(&request).map_err(|found| faults.extend(found.into_iter().map(named))).ok()
}

/// Adds what the flags say to a request.
pub(crate) fn overrides(matches: &ArgMatches, request: &mut RestoreConfig, faults: &mut Vec<Fault>) {
    let mut disks = Vec::new();
    for (index, text) in matches.get_many::<String>("disk").into_iter().flatten().enumerate() {
        match FromOptions::from_options(&format!("--disk[{index}]"), text) {
            Ok(disk) => disks.push(disk),
            Err(found) => faults.extend(found),
        }
    }
    if !disks.is_empty() {
        request.disks.get_or_insert_default().extend(disks);
    }
    for (flag, console) in [
        ("serial", &mut request.serial),
        ("console", &mut request.console),
        ("debug-console", &mut request.debug_console),
    ] {
        let Some(text) = matches.get_many::<String>(flag).and_then(Iterator::last) else { continue };
        match FromOptions::from_options(&format!("--{flag}"), text) {
            Ok(to) => *console = Some(to),
            Err(found) => faults.extend(found),
        }
    }
}

/// Where a field of the request stands on the command line.
fn name(path: &str) -> String {
    format!("--restore {path}")
}
