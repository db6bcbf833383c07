//! A line on the terminal while something takes its time.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::ctl::plain;

/// What is faster than this shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often the line changes.
pub(crate) const PERIOD: Duration = Duration::from_secs(1);

/// Shows the line as long as it lives.
pub(crate) struct Progress {
    running: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Starts it, if standard error is a terminal. What `news` makes is asked for each line how far it is; it is
    /// made with the first one, on a thread of its own.
    pub(crate) fn start<N>(about: &str, news: impl FnOnce() -> N + Send + 'static) -> Self
    where
        N: FnMut() -> Option<String>,
    {
        if io::stderr().is_terminal() {
            Self::on(io::stderr(), about, PATIENCE, news)
        } else {
            Self { running: None }
        }
    }

    fn on<N>(
        mut terminal: impl Write + Send + 'static,
        about: &str,
        patience: Duration,
        news: impl FnOnce() -> N + Send + 'static,
    ) -> Self
    where
        N: FnMut() -> Option<String>,
    {
        let (end, ended) = mpsc::channel();
        let (about, start) = (plain(about), Instant::now());
        let over = move |pause| ended.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
        let show = move || {
            if over(patience) {
                return;
            }
            draw(&mut terminal, &line(&about, start.elapsed(), ""));
            let (mut news, mut latest) = (news(), String::new());
            while !over(PERIOD) {
                latest = news().unwrap_or(latest);
                draw(&mut terminal, &line(&about, start.elapsed(), &latest));
            }
            draw(&mut terminal, "");
        };
        // Without the thread there is no line, and nothing else is missing.
        let thread = thread::Builder::new().name("progress".to_owned()).spawn(show);
        Self { running: thread.ok().map(|thread| (end, thread)) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.running.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}

fn line(about: &str, elapsed: Duration, latest: &str) -> String {
    let mut text = format!("{about} ... ");
    let (minutes, seconds) = (elapsed.as_secs() / 60, elapsed.as_secs() % 60);
    // Writing to a String cannot fail.
    let _ = if minutes > 0 { write!(text, "{minutes} min {seconds} s") } else { write!(text, "{seconds} s") };
    if !latest.is_empty() {
        let _ = write!(text, ", {latest}");
    }
    text
}

/// Replaces the line (ECMA-48: carriage return, erase in line).
fn draw(terminal: &mut impl Write, text: &str) {
    let _ = write!(terminal, "\r\x1b[K{text}").and_then(|()| terminal.flush());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Screen {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_fast_shows_nothing_and_what_is_slow_cleans_up() {
        let screen = Screen::default();
        drop(Progress::on(screen.clone(), "vm.boot", Duration::from_secs(600), || || None));
        assert_eq!(screen.text(), "");
        let progress = Progress::on(screen.clone(), "vm.boot", Duration::ZERO, || || None);
        while screen.text().is_empty() {
            thread::yield_now();
        }
        drop(progress);
        let text = screen.text();
        assert!(text.starts_with("\r\x1b[Kvm.boot ... 0 s") && text.ends_with("\r\x1b[K"), "{text:?}");
    }

    #[test]
    fn the_line_says_how_long_and_how_far() {
        assert_eq!(line("x", Duration::from_secs(59), ""), "x ... 59 s");
        assert_eq!(line("x", Duration::from_secs(61), "7 %"), "x ... 1 min 1 s, 7 %");
    }
}
