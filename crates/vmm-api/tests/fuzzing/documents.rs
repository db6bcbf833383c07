//! Configurations as JSON and as option strings.

use vmm_api::config::{Fault, RestoreConfig, UnknownFields, VmConfig, parse_vm_config};
use vmm_api::options::{Arity, FLAGS, VmFlags};
use vmm_api::spec::{MachineSpec, RestoreSpec, parse_and_check};

/// Most faults of an answer, and the line that says that there were more.
const MOST_FAULTS: usize = 101;

/// Reads and checks `bytes` as the body of `vm.create`. What is accepted says the same once it is written and read
/// again; what is not has faults, each with a path and a message, and not too many.
pub(crate) fn config(bytes: &[u8]) {
    match parse_and_check(bytes, UnknownFields::Refuse) {
        Ok(checked) => {
            let again = reread(&checked.config);
            assert_eq!(MachineSpec::check(&again).unwrap(), checked.spec);
        }
        Err(faults) => check_faults(&faults),
    }
    if let Ok(parsed) = parse_vm_config(bytes, UnknownFields::Warn) {
        reread(&parsed.config);
    }
}

/// Reads the first line of `bytes` as the body of `vm.restore`, the rest as the configuration in the snapshot. A VM of both is one
/// that could have been created.
pub(crate) fn restored(bytes: &[u8]) {
    let (request, saved) = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[][..]),
    };
    let Ok(request) = serde_json::from_slice::<RestoreConfig>(request) else { return };
    match RestoreSpec::check(&request).and_then(|spec| spec.configure(saved)) {
        Ok(checked) => {
            let again = reread(&checked.config);
            assert_eq!(MachineSpec::check(&again).unwrap(), checked.spec);
        }
        Err(faults) => check_faults(&faults),
    }
}

/// Reads `bytes` as the values of flags, one a line; the first byte of a line says which flag.
pub(crate) fn options(bytes: &[u8]) {
    let mut flags = VmFlags::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some((which, value)) = line.split_first() else { continue };
        let flag = &FLAGS[usize::from(*which) % FLAGS.len()];
        let value = if flag.arity() == Arity::Switch { "" } else { &String::from_utf8_lossy(value) };
        // A flag given twice is refused; the others still count.
        let _ = flags.add(flag.name, value);
    }
    match flags.parse() {
        Ok(parsed) => {
            reread(&parsed.config);
        }
        Err(faults) => check_faults(&faults),
    }
}

/// What is read from the text of `config`, which must be the same.
fn reread(config: &VmConfig) -> VmConfig {
    let json = serde_json::to_vec(config).unwrap();
    let again = parse_vm_config(&json, UnknownFields::Refuse);
    let again =
        again.unwrap_or_else(|faults| panic!("{faults:?}: {}", String::from_utf8_lossy(&json))).config;
    assert_eq!(&again, config);
    again
}

fn check_faults(faults: &[Fault]) {
    assert!((1..=MOST_FAULTS).contains(&faults.len()), "{} faults", faults.len());
    for fault in faults {
        assert!(!fault.path.is_empty() && !fault.message.is_empty(), "{fault:?}");
    }
}
