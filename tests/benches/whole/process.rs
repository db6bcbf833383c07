//! Processes under measurement.

use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::Result;

/// A process; killed when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: Option<ChildStdout>,
}

impl Process {
    /// Starts it with its standard output in a pipe.
    pub(crate) fn start(program: &Path, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        Ok(Self { stdout: child.stdout.take(), child })
    }

    /// Waits for the next byte on its standard output.
    pub(crate) fn read_byte(&mut self) -> Result<()> {
        let stdout = self.stdout.as_mut().ok_or("no standard output")?;
        Ok(stdout.read_exact(&mut [0])?)
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes of a process's memory, each page divided by how many processes share it, without the guest's: neighbouring mappings that
/// are as large as its memory together (advice to the kernel about a part of them makes two of one).
pub(crate) fn outside_guest_memory(pid: u32, guest: u64) -> Result<u64> {
    let maps = mappings(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?)?;
    let guests = (0..maps.len()).find_map(|first| run_of_size(&maps, first, guest));
    let guests = guests.ok_or("no mappings have the size of guest memory")?;
    let outside = maps.iter().enumerate().filter(|(index, _)| !guests.contains(index));
    Ok(outside.map(|(_, map)| map.pss).sum())
}

/// One entry of smaps.
struct Mapping {
    start: u64,
    end: u64,
    pss: u64,
}

fn mappings(smaps: &str) -> Result<Vec<Mapping>> {
    let mut maps: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib: u64 = rest.trim().trim_end_matches(" kB").parse()?;
            maps.last_mut().ok_or("smaps does not begin with a mapping")?.pss = kib << 10;
        } else if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
            let number = |text| u64::from_str_radix(text, 16);
            maps.push(Mapping { start: number(start)?, end: number(end)?, pss: 0 });
        }
    }
    Ok(maps)
}

/// The neighbours from `first` on that are `size` bytes together, if there are such.
fn run_of_size(maps: &[Mapping], first: usize, size: u64) -> Option<RangeInclusive<usize>> {
    let start = maps.get(first)?.start;
    let mut end = start;
    for (index, map) in maps.iter().enumerate().skip(first) {
        if map.start != end || map.end - start > size {
            return None;
        }
        end = map.end;
        if end - start == size {
            return Some(first..=index);
        }
    }
    None
}
