//! How the binary is linked: with as little work before `main` as the libraries of the host allow. A build for another
//! system is linked as usual.

use std::env;
use std::path::Path;
use std::process::Command;

/// Says so to cargo.
pub(crate) fn set() {
    let of = |name| env::var(name).unwrap_or_default();
    if of("TARGET") != of("HOST") || of("CARGO_CFG_TARGET_ENV") != "gnu" {
        return;
    }
    // Relocations that are a bitmap (DT_RELR) instead of 24 bytes each: 160 KiB less to read, and to keep in memory.
    if glibc() >= Some((2, 36)) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    // The unwinder in the binary: one library less to load. A linker that takes the shared one all the same is right, too.
    if let Some(folder) = folder_of("libgcc_eh.a") {
        println!("cargo::rustc-link-search=native={folder}");
        println!("cargo::rustc-link-lib=static:-bundle=gcc_eh");
    }
}

/// Major and minor version of the host's C library.
fn glibc() -> Option<(u32, u32)> {
    let version = answer("getconf", "GNU_LIBC_VERSION")?;
    let (major, minor) = version.strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
}

/// Where the C compiler has a library; it repeats the name of one that it has not.
fn folder_of(library: &str) -> Option<String> {
    let path = answer("cc", &format!("-print-file-name={library}"))?;
    let folder = Path::new(&path).parent().filter(|folder| folder.is_absolute())?;
    Some(folder.display().to_string())
}

fn answer(program: &str, argument: &str) -> Option<String> {
    let output =
        Command::new(program).arg(argument).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
