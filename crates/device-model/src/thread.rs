//! Threads: what each is for, and what is done to it before it begins.
//!
//! Who starts a thread does not know how the process confines its threads, and who confines them does not know
//! when they start. A [`ThreadHook`] is what they share: it is called on the new thread, which goes on only if
//! it may.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

/// What a thread is for, which decides what it needs of the system. The word is the same for all threads that do the
/// same: `vcpu`, not `vcpu0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ThreadKind(pub &'static str);

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What is done to a thread before its work begins, e.g. to confine it.
pub trait ThreadHook: Send + Sync + fmt::Debug {
    /// The calling thread is of `kind`. All that it does from here on is its work.
    ///
    /// # Errors
    /// The thread must not go on.
    fn begin(&self, kind: ThreadKind) -> io::Result<()>;
}

/// Does nothing to threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unconfined;

impl ThreadHook for Unconfined {
    fn begin(&self, _: ThreadKind) -> io::Result<()> {
        Ok(())
    }
}

/// Starts a thread called `name` that does `work` after `hook` let it.
///
/// # Errors
/// There is no thread to be had, or the hook refused; `work` is dropped then, not done.
pub fn spawn(
    hook: &Arc<dyn ThreadHook>,
    kind: ThreadKind,
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let hook = Arc::clone(hook);
    let (begun, verdict) = sync_channel(1);
    let main = move || {
        let may = hook.begin(kind);
        let goes_on = may.is_ok();
        drop(hook);
        // The channel has room for it, and the caller waits.
        let _ = begun.send(may);
        if goes_on {
            work();
        }
    };
    // Not every string can name a thread.
    let thread = Builder::new().name(name.replace('\0', "")).spawn(main)?;
    match verdict.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(refusal)) => {
            let _ = thread.join();
            Err(refusal)
        }
        Err(_) => Err(io::Error::other(format!("thread {name} panicked before it began"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use super::*;

    /// Refuses one kind, and writes down who came.
    #[derive(Debug, Default)]
    struct Porter(Mutex<Vec<(ThreadKind, Option<String>)>>);

    const REFUSED: ThreadKind = ThreadKind("refused");

    impl ThreadHook for Porter {
        fn begin(&self, kind: ThreadKind) -> io::Result<()> {
            let name = std::thread::current().name().map(str::to_owned);
            self.0.lock().unwrap().push((kind, name));
            if kind == REFUSED { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn a_thread_works_after_its_hook() {
        let porter = Arc::new(Porter::default());
        let hook: Arc<dyn ThreadHook> = porter.clone();
        let (done, seen) = channel();
        let before = Arc::clone(&porter);
        let work = move || done.send(before.0.lock().unwrap().len()).unwrap();
        spawn(&hook, ThreadKind("any"), "wor\0ker", work).unwrap().join().unwrap();
        assert_eq!(seen.recv(), Ok(1));
        assert_eq!(*porter.0.lock().unwrap(), [(ThreadKind("any"), Some("worker".to_owned()))]);
    }

    #[test]
    fn a_thread_that_is_refused_never_works() {
        let hook: Arc<dyn ThreadHook> = Arc::new(Porter::default());
        let (done, seen) = channel();
        let error = spawn(&hook, REFUSED, "worker", move || done.send(()).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(seen.recv().is_err(), "its work is dropped");
    }
}
