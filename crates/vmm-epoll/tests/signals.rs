//! A signal in the middle of a wait is not an event and not an error. Alone in its process: signals are process-wide.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::time::Duration;
use vmm_epoll::ControlLoop;
use vmm_sys_util::signal::{Killable, register_signal_handler};

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn an_interrupted_wait_is_repeated() {
    register_signal_handler(libc::SIGUSR1, nothing).unwrap();
    let (stoppers, stopper) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut control_loop = ControlLoop::new(()).unwrap();
        stoppers.send(control_loop.stopper()).unwrap();
        control_loop.run()
    });
    let stopper = stopper.recv().unwrap();
    for _ in 0..20 {
        thread.kill(libc::SIGUSR1).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(!thread.is_finished(), "a signal must not end the loop");
    stopper.stop();
    thread.join().unwrap().unwrap();
}
