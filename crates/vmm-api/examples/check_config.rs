//! Reads a configuration from standard input and prints it with its defaults, or all that is wrong with it.
//!
//! `echo '{"payload": {"kernel": "/k"}, "disk": []}' | cargo run -p vmm-api --example check_config`

use std::io::Read as _;
use std::process::ExitCode;

use vmm_api::config::{MAX_DOCUMENT, UnknownFields};
use vmm_api::spec::parse_and_check;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut json = Vec::new();
    std::io::stdin().take(MAX_DOCUMENT as u64 + 1).read_to_end(&mut json)?;
    match parse_and_check(&json, UnknownFields::Refuse) {
        Ok(checked) => {
            checked.spec.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
            println!("{}", serde_json::to_string_pretty(&checked.config)?);
            Ok(ExitCode::SUCCESS)
        }
        Err(faults) => {
            faults.iter().for_each(|fault| eprintln!("{}: {fault}", fault.kind.code()));
            Ok(ExitCode::FAILURE)
        }
    }
}
