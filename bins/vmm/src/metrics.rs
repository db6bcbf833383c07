//! All metrics of this process on one page: its build, its own use of the host, the API's answers, and what devices and
//! vCPUs of the machine counted. `docs/observability.md` lists them.

mod process;

use vmm_api::http::Counts;
use vmm_api::metrics::{Exposition, Family, Kind, Value};

use crate::cli::CONTRACT_VERSION;
use crate::machine::Machine;

/// The program.
static BUILD: Family =
    Family::of(Kind::Info, "vmm_build", "", "The program: its version and the contract's that it follows.");

/// What there is to tell now. Without a machine, or without a server, theirs is missing.
#[must_use]
pub fn page(machine: Option<&Machine>, answers: Option<&Counts>) -> Exposition {
    let mut page = Exposition::new();
    let version = concat!("v", env!("CARGO_PKG_VERSION"));
    page.sample(&BUILD, &[("version", version), ("contract", CONTRACT_VERSION)], Value::Info);
    process::measure(&mut page);
    if let Some(answers) = answers {
        answers.measure(&mut page);
    }
    if let Some(machine) = machine {
        page.devices(machine.metrics());
    }
    page
}

/// The families of `page` as a Markdown table, by name.
#[must_use]
pub fn table(page: &Exposition) -> String {
    let mut rows: Vec<String> = page
        .families()
        .map(|family| format!("| `{}` | {} | {} |\n", family.series(), family.kind.name(), family.help))
        .collect();
    rows.sort();
    format!("| metric | type | what |\n|---|---|---|\n{}", rows.concat())
}
