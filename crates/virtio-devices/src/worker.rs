//! A thread that works on virtqueues, between a start and a stop.
//!
//! The thread owns its queues; nothing about them is shared or locked. It sleeps until one of its sources is
//! readable, and gives the queues back when it was told to stop and nothing is in flight any more.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_queue::Queue;
use vmm_device_model::device::DeviceError;
use vmm_device_model::thread::{self, ThreadHook, ThreadKind};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a dropped worker is waited for before its thread is left to itself.
const DROP_LIMIT: Duration = Duration::from_secs(5);
const STOP: u64 = u64::MAX;
const EVENTS: usize = 8;

/// What a worker does. All methods are called by its thread, but for [`sources`](Self::sources).
pub trait Task: Send + 'static {
    /// Descriptors that wake the worker while they are readable. They stay open as long as the task.
    fn sources(&self) -> Vec<RawFd>;

    /// Source number `source` is readable: takes the signal, so that it does not wake again. Does not block.
    fn wake(&mut self, source: usize);

    /// Does what there is to do: once at the start, and after each round of wakes. When `stopping`, no new
    /// request is taken and what is in flight comes to its end.
    fn work(&mut self, stopping: bool) -> Next;

    /// The queues, in the order in which they came. Nothing is in flight.
    fn into_queues(self) -> Vec<Queue>;
}

/// How a worker goes on after [`Task::work`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Sleep until a source is readable.
    Wait,
    /// Sleep as long at most, then work again.
    WaitAtMost(Duration),
    /// Look for a stop, then work again: there is more, but one task may not hold its thread for ever.
    Again,
    /// Nothing is in flight; the answer to `stopping`, which alone ends the worker.
    Idle,
}

/// The owner's hold on the thread. Dropping it stops the thread.
pub struct Worker {
    name: String,
    stop: EventFd,
    ended: Receiver<Vec<Queue>>,
    queues: Option<Vec<Queue>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` that works on `task`, once the hook let it.
    ///
    /// # Errors
    /// No descriptors or no thread could be had, or the hook refused; the task is dropped.
    pub fn spawn<T: Task>(
        name: &str,
        (hook, kind): (&Arc<dyn ThreadHook>, ThreadKind),
        task: T,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        let watch = |fd, token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token)).map(|_| ())
        };
        watch(stop.as_raw_fd(), STOP)?;
        for (token, source) in (0..).zip(task.sources()) {
            watch(source, token)?;
        }
        let own_stop = stop.try_clone()?;
        let (end, ended) = sync_channel(1);
        let thread = thread::spawn(hook, kind, name, move || run(task, &epoll, &own_stop, &end))?;
        Ok(Self { name: name.to_owned(), stop, ended, queues: None, thread: Some(thread) })
    }

    /// Tells the thread to take no new request and to end.
    pub fn stop_begin(&self) {
        // A full counter is a signal already.
        drop(self.stop.write(1));
    }

    /// Waits until the thread has ended.
    ///
    /// # Errors
    /// It still had requests in flight at `deadline` (call again), or it panicked.
    pub fn stop_finish(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let name = &self.name;
        match self.ended.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(queues) => self.queues = Some(queues),
            Err(RecvTimeoutError::Timeout) => {
                self.thread = Some(thread);
                return Err(DeviceError::new(format!("{name}: requests are still in flight")));
            }
            Err(RecvTimeoutError::Disconnected) => {}
        }
        // The thread has nothing left to do but end.
        thread.join().map_err(|_| DeviceError::new(format!("{name}: the thread panicked")))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop_begin();
            if let Err(error) = self.stop_finish(Instant::now() + DROP_LIMIT) {
                log::error!("{error}; its thread is left behind");
            }
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The threads of one device.
#[derive(Debug, Default)]
pub struct Workers(Vec<Worker>);

impl Workers {
    /// Whether the device is not started.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a thread. Threads give their queues back in the order in which they were added.
    ///
    /// # Errors
    /// As [`Worker::spawn`].
    pub fn spawn<T: Task>(
        &mut self,
        name: &str,
        hook: (&Arc<dyn ThreadHook>, ThreadKind),
        task: T,
    ) -> Result<(), DeviceError> {
        let worker = Worker::spawn(name, hook, task);
        self.0.push(worker.map_err(|e| DeviceError::caused(format!("cannot start the thread {name}"), e))?);
        Ok(())
    }

    /// Tells all threads to end.
    pub fn stop_begin(&self) {
        self.0.iter().for_each(Worker::stop_begin);
    }

    /// Waits for all threads and returns their queues.
    ///
    /// # Errors
    /// As [`Worker::stop_finish`]. No queue is lost by a missed deadline.
    pub fn stop_finish(&mut self, deadline: Instant) -> Result<Vec<Queue>, DeviceError> {
        for worker in &mut self.0 {
            worker.stop_finish(deadline)?;
        }
        Ok(std::mem::take(&mut self.0).iter_mut().filter_map(|w| w.queues.take()).flatten().collect())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // All of them, before the first is waited for.
        self.stop_begin();
    }
}

fn run<T: Task>(mut task: T, epoll: &Epoll, stop: &EventFd, end: &SyncSender<Vec<Queue>>) {
    let mut stopping = false;
    let mut events = [EpollEvent::default(); EVENTS];
    loop {
        let timeout = match task.work(stopping) {
            Next::Idle if stopping => break,
            Next::Idle | Next::Wait => -1,
            Next::WaitAtMost(time) => i32::try_from(time.as_millis()).unwrap_or(i32::MAX),
            Next::Again => 0,
        };
        match epoll.wait(timeout, &mut events) {
            Ok(count) => {
                for event in events.iter().take(count) {
                    if event.data() == STOP {
                        stopping = true;
                        drop(stop.read());
                    } else if let Ok(source) = usize::try_from(event.data()) {
                        task.wake(source);
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                // Cannot be, by epoll_wait(2). Without events the thread can only end.
                log::error!("a device thread cannot wait for events: {error}");
                stopping = true;
            }
        }
    }
    // The channel has room for it; the owner may have gone.
    drop(end.try_send(task.into_queues()));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Comes to its end only when as many as there are were told to.
    struct Together {
        told: Arc<AtomicU64>,
        counted: bool,
        ended: Arc<AtomicU64>,
    }

    const ALL: u64 = 3;

    impl Task for Together {
        fn sources(&self) -> Vec<RawFd> {
            Vec::new()
        }

        fn wake(&mut self, _: usize) {}

        fn work(&mut self, stopping: bool) -> Next {
            if stopping && !self.counted {
                self.counted = true;
                self.told.fetch_add(1, Ordering::SeqCst);
            }
            match stopping {
                true if self.told.load(Ordering::SeqCst) == ALL => Next::Idle,
                true => Next::WaitAtMost(Duration::from_millis(1)),
                false => Next::Wait,
            }
        }

        fn into_queues(self) -> Vec<Queue> {
            self.ended.fetch_add(1, Ordering::SeqCst);
            Vec::new()
        }
    }

    #[test]
    fn dropped_workers_are_all_told_before_any_is_waited_for() {
        let (told, ended) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let mut workers = Workers::default();
        let hook: Arc<dyn ThreadHook> = Arc::new(thread::Unconfined);
        for _ in 0..ALL {
            let task = Together { told: Arc::clone(&told), counted: false, ended: Arc::clone(&ended) };
            workers.spawn("together", (&hook, ThreadKind("test")), task).unwrap();
        }
        drop(workers);
        assert_eq!(ended.load(Ordering::SeqCst), ALL);
    }
    #[derive(Debug)]
    struct Refuses;

    impl ThreadHook for Refuses {
        fn begin(&self, _: ThreadKind) -> io::Result<()> {
            Err(io::Error::other("told to refuse"))
        }
    }

    #[test]
    fn a_thread_that_cannot_be_confined_does_not_work() {
        let (told, ended) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let task = Together { told, counted: false, ended: Arc::clone(&ended) };
        let hook: Arc<dyn ThreadHook> = Arc::new(Refuses);
        let error = Workers::default().spawn("worker", (&hook, ThreadKind("test")), task).unwrap_err();
        assert_eq!(error.to_string(), "cannot start the thread worker");
        assert_eq!(Arc::strong_count(&ended), 1, "the task is dropped");
    }
}
