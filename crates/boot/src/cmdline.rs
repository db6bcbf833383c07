//! The kernel command line, with its limits checked when it is built.

use std::fmt;

use thiserror::Error;

use crate::layout;

/// Longest command line in bytes, without its NUL: x86 Linux's `COMMAND_LINE_SIZE` (2048) less one. Linux cuts a
/// longer one in silence, so it is refused here.
pub const MAX_LEN: usize = 2047;

const _: () = assert!(MAX_LEN as u64 + 1 < layout::COMMAND_LINE.size);

/// Why a text cannot be a command line.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// The command line is longer than [`MAX_LEN`], or than the kernel at hand takes.
    #[error("command line is {len} bytes long, the limit is {limit}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes, without the NUL.
        limit: usize,
    },
    /// The command line holds a NUL or something that is not ASCII.
    #[error("command line has byte {byte:#04x} at position {position}, only ASCII without NUL is allowed")]
    InvalidByte {
        /// The byte.
        byte: u8,
        /// Its position.
        position: usize,
    },
}

/// A command line that any x86 Linux takes whole: ASCII, no NUL, at most [`MAX_LEN`] bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cmdline(String);

impl Cmdline {
    /// Checks `text`.
    ///
    /// # Errors
    /// [`CmdlineError`] for a text that is too long or has a byte that is not allowed.
    pub fn new(text: &str) -> Result<Self, CmdlineError> {
        let mut line = Self::default();
        line.append(text)?;
        Ok(line)
    }

    /// Appends words, with a space before them where one is needed.
    ///
    /// # Errors
    /// As [`Cmdline::new`]; the line then stays as it was.
    pub fn append(&mut self, words: &str) -> Result<(), CmdlineError> {
        if let Some((position, &byte)) =
            words.as_bytes().iter().enumerate().find(|(_, b)| **b == 0 || **b > 0x7f)
        {
            return Err(CmdlineError::InvalidByte { byte, position });
        }
        if words.is_empty() {
            return Ok(());
        }
        let space = usize::from(!self.0.is_empty());
        let len = self.0.len().saturating_add(space).saturating_add(words.len());
        if len > MAX_LEN {
            return Err(CmdlineError::TooLong { len, limit: MAX_LEN });
        }
        if space == 1 {
            self.0.push(' ');
        }
        self.0.push_str(words);
        Ok(())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text with its NUL, as it is written to guest memory.
    pub(crate) fn to_bytes_with_nul(&self) -> Vec<u8> {
        let mut bytes = self.0.clone().into_bytes();
        bytes.push(0);
        bytes
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_joined_by_one_space() {
        let mut line = Cmdline::new("console=ttyS0").unwrap();
        line.append("").unwrap();
        line.append("root=/dev/vda").unwrap();
        assert_eq!(line.as_str(), "console=ttyS0 root=/dev/vda");
        assert_eq!(Cmdline::new("").unwrap().to_bytes_with_nul(), [0]);
    }

    #[test]
    fn the_limit_counts_the_joining_space() {
        let mut line = Cmdline::new(&"x".repeat(MAX_LEN)).unwrap();
        assert_eq!(line.append("y"), Err(CmdlineError::TooLong { len: MAX_LEN + 2, limit: MAX_LEN }));
        assert_eq!(line.as_str().len(), MAX_LEN);
        assert_eq!(
            Cmdline::new(&"x".repeat(MAX_LEN + 1)),
            Err(CmdlineError::TooLong { len: MAX_LEN + 1, limit: MAX_LEN })
        );
        let text = CmdlineError::TooLong { len: 2050, limit: 2047 }.to_string();
        assert_eq!(text, "command line is 2050 bytes long, the limit is 2047");
    }

    #[test]
    fn nul_and_non_ascii_are_refused_by_position() {
        assert_eq!(Cmdline::new("a\0b"), Err(CmdlineError::InvalidByte { byte: 0, position: 1 }));
        assert_eq!(Cmdline::new("quiet é"), Err(CmdlineError::InvalidByte { byte: 0xc3, position: 6 }));
    }
}
