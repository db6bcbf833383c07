//! `cargo xtask images`: fetches and builds what tests boot, into the cache.

use std::process::ExitCode;
use std::time::Instant;

use vmm_tests::cache::Cache;
use vmm_tests::error::{self, describe};
use vmm_tests::image::{initramfs, rootfs};
use vmm_tests::kernels::{Kernel, KernelVersion};
use vmm_tests::nested::{Nested, Settings};
use vmm_tests::toolbox::Toolbox;

const USAGE: &str = "usage: cargo xtask images [--refresh]\n\
    Fetches kernels and tools and builds the images that tests boot, and prints where they are. --refresh makes all anew.";

/// Runs the subcommand with the words after its name.
pub(crate) fn run(args: &[String]) -> ExitCode {
    let refresh = match args {
        [] => false,
        [word] if word == "--refresh" => true,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match build(refresh) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn build(refresh: bool) -> error::Result<()> {
    let start = Instant::now();
    let cache = Cache::open()?;
    if refresh {
        cache.clear()?;
    }
    let tools = Toolbox::open(&cache)?;
    for version in KernelVersion::ALL {
        let kernel = Kernel::get(&cache, &tools, version)?;
        println!("{} release {}", version.name(), kernel.release()?);
        println!("{} bzImage {}", version.name(), kernel.bzimage().display());
        println!("{} vmlinux {}", version.name(), kernel.vmlinux().display());
        println!("{} initramfs {}", version.name(), initramfs::guest(&cache, &tools, &kernel)?.display());
    }
    println!("debian13 root {}", rootfs::image(&cache, &tools)?.display());
    Nested::prepare(&cache, Settings::default())?;
    println!("all in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
