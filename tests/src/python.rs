//! A Python environment of its own for a test tool, in the cache.

use std::path::PathBuf;
use std::process::Command;

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::run::run;

/// The interpreter: Debian's, not one that a version manager puts in front.
const PYTHON: &str = "/usr/bin/python3";

/// The interpreter of an environment with exactly what `requirements` (pip's format, with hashes) lists. Run tools by
/// `-m`: the scripts in the environment name a folder that is gone.
///
/// # Errors
/// There is no Python with venv, or the package index cannot be reached.
pub fn environment(cache: &Cache, name: &str, requirements: &str) -> Result<PathBuf> {
    let version = run(Command::new(PYTHON).arg("--version"))?;
    let recipe = format!("{}\n{requirements}", String::from_utf8_lossy(&version.stdout));
    let folder = cache.entry(name, &recipe, |folder| {
        run(Command::new(PYTHON).args(["-m", "venv"]).arg(folder))?;
        let list = folder.join("requirements.txt");
        std::fs::write(&list, requirements).map_err(Error::io("write", &list))?;
        let mut install = Command::new(folder.join("bin/python"));
        install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
        install.args(["--require-hashes", "--only-binary=:all:", "--no-cache-dir", "-r"]).arg(&list);
        run(&mut install).map(drop)
    })?;
    Ok(folder.join("bin/python"))
}
