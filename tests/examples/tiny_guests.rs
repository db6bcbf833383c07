//! Writes the tiny guests as kernel files into a folder: `cargo run -p vmm-tests --example tiny_guests -- FOLDER`.

use std::io;
use std::path::PathBuf;

use vmm_tests::tiny::Guest;

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    for guest in Guest::ALL {
        println!("{}", guest.write(&folder)?.display());
    }
    Ok(())
}
