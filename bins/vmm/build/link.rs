//! How the binary is linked: with as little work before `main` as the libraries of the host allow, and with what is seldom
//! used apart from the rest. A build for another system is linked as usual.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

/// Crates and modules whose code neither a start nor a running guest needs. A page fault maps the pages around it, too: what
/// lies among the code of a start is mapped with it. Names that no longer exist do no harm; under another mangling than
/// the present one nothing is put apart, and the benchmark of memory tells.
const SELDOM: &[&str] = &[
    "clap_builder::output",
    "clap_complete",
    "lz4_flex",
    "minicbor",
    "ring",
    "rustls",
    "rustls_pki_types",
    "sha2",
    "untrusted",
    "vmm::ctl",
    "vmm::doctor",
    "vmm::migration",
    "vmm::preflight",
    "vmm::snapshot",
    "vmm_api::client",
    "vmm_api::openapi",
    "vmm_cpu_manager::state",
    "vmm_memory_manager::freeze",
    "vmm_memory_manager::handover",
    "vmm_migration_protocol",
    "vmm_snapshot",
    "webpki",
];

/// Says so to cargo.
pub(crate) fn set() -> io::Result<()> {
    let of = |name| env::var(name).unwrap_or_default();
    if of("TARGET") != of("HOST") || of("CARGO_CFG_TARGET_ENV") != "gnu" {
        return Ok(());
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
    let is_release = of("PROFILE") == "release";
    // The profile says so too, which cargo forgets for a package that has an optimization level of its own. 1.1 MiB.
    if is_release && of("DEBUG") == "false" {
        println!("cargo::rustc-link-arg-bins=-Wl,--strip-all");
    }
    if is_release && is_usual_linker() {
        // Functions of the same instructions are one; nobody compares their addresses.
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
        // What page faults map together begins at the same places of the file, wherever the binary is loaded.
        println!("cargo::rustc-link-arg-bins=-Wl,-z,max-page-size=65536");
        let path = PathBuf::from(of("OUT_DIR")).join("seldom.ld");
        fs::write(&path, seldom())?;
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", path.display());
    }
    Ok(())
}

/// Whether nobody chose another linker than the toolchain's own, LLD.
fn is_usual_linker() -> bool {
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let own = env::var("TARGET").is_ok_and(|target| target == "x86_64-unknown-linux-gnu");
    own && env::var_os("RUSTC_LINKER").is_none() && !["link", "ld="].iter().any(|word| flags.contains(word))
}

/// The linker script that puts what is [`SELDOM`] used into a section of its own, behind all other code.
fn seldom() -> String {
    // The C and assembly of ring are objects of an archive; Rust's sections have the names of their functions.
    let mut script = "SECTIONS { .text.seldom : {\n  *libring-*:*(.text .text.*)\n".to_owned();
    for path in SELDOM {
        let own: String = path.split("::").map(|name| format!("{}{name}", name.len())).collect();
        let of_types = path.replace("::", "..");
        // Writing to a String cannot fail. What is generic stays, since one copy of it serves all types that look alike.
        let _ = writeln!(script, "  *(.text._ZN{own}* .text._ZN*_$LT$*{of_types}..*)");
    }
    script + "} } INSERT AFTER .text;\n"
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
