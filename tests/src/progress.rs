//! Telling people what takes long: one line when it begins, one with the time when it ends, and the seconds between on a
//! terminal.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A long step of work; it ends when dropped.
#[derive(Debug)]
pub struct Step {
    what: String,
    start: Instant,
    ticker: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Step {
    /// Says on standard error that `what` begins.
    #[must_use]
    pub fn begin(what: &str) -> Self {
        let start = Instant::now();
        let ticker = std::io::stderr().is_terminal().then(|| {
            let (stop, stopped) = mpsc::channel();
            let text = what.to_owned();
            let thread = thread::spawn(move || {
                while stopped.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                    eprint!("\r   {text} ... {} s", start.elapsed().as_secs());
                    let _ = std::io::stderr().flush();
                }
            });
            (stop, thread)
        });
        eprintln!("=> {what}");
        Self { what: what.to_owned(), start, ticker }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.ticker.take() {
            drop(stop);
            let _ = thread.join();
            eprint!("\r\x1b[K");
        }
        eprintln!("   {}: {:.1} s", self.what, self.start.elapsed().as_secs_f64());
    }
}
