//! What the guest boots.

use super::check::Checker;
use super::{MAX_CMDLINE, PayloadSpec};
use crate::config::PayloadConfig;

pub(super) fn check(config: Option<&PayloadConfig>, checker: &mut Checker) -> Option<PayloadSpec> {
    let Some(config) = config else {
        checker.invalid("payload", "is required, with a kernel or firmware");
        return None;
    };
    match (&config.kernel, &config.firmware) {
        (Some(kernel), None) => {
            let cmdline = config.cmdline.clone().unwrap_or_default();
            check_cmdline(&cmdline, checker);
            Some(PayloadSpec::Kernel { kernel: kernel.clone(), initramfs: config.initramfs.clone(), cmdline })
        }
        (None, Some(firmware)) => {
            // As in the contract: clients send both.
            for (name, given) in
                [("cmdline", config.cmdline.is_some()), ("initramfs", config.initramfs.is_some())]
            {
                if given {
                    checker.warn(format!("payload.{name}"), "is ignored: the payload is firmware");
                }
            }
            Some(PayloadSpec::Firmware(firmware.clone()))
        }
        (Some(_), Some(_)) => {
            checker.invalid("payload.firmware", "cannot be combined with a kernel");
            None
        }
        (None, None) => {
            // An IGVM image would do; that it is not supported is said elsewhere.
            if config.igvm.is_none() {
                checker.invalid("payload", "needs a kernel or firmware");
            }
            None
        }
    }
}

fn check_cmdline(cmdline: &str, checker: &mut Checker) {
    let path = "payload.cmdline";
    if cmdline.len() > MAX_CMDLINE {
        checker.invalid(
            path,
            format!("{} bytes are more than the {MAX_CMDLINE} that Linux takes", cmdline.len()),
        );
    }
    if let Some(bad) = cmdline.chars().find(|c| !c.is_ascii() || *c == '\0') {
        checker.invalid(path, format!("{bad:?} is not an ASCII character of a command line"));
    }
}
