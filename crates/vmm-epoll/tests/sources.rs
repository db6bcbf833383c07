//! The loop's guarantees, one by one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "test code")]

use std::io::{Write, pipe};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;
use vmm_epoll::{ControlLoop, Input, LoopError, SourceId, mailbox};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the handlers did, in order.
type Log = Vec<String>;

fn new_loop() -> ControlLoop<Log> {
    let mut control_loop = ControlLoop::new(Log::new()).unwrap();
    control_loop.on_error(|log, error| log.push(format!("error {}: {}", error.name, error.source)));
    control_loop
}

fn event() -> (EventFd, EventFd) {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    (event.try_clone().unwrap(), event)
}

/// Handles what is ready now; the number of events, so that a test can see a loop that spins.
fn turn(control_loop: &mut ControlLoop<Log>) -> usize {
    control_loop.run_once(Some(Duration::ZERO)).unwrap()
}

/// Two turns without an event: nothing is left that would wake the loop.
fn assert_quiet(control_loop: &mut ControlLoop<Log>) {
    assert_eq!((turn(control_loop), turn(control_loop)), (0, 0), "the loop would spin");
}

fn add_event(control_loop: &mut ControlLoop<Log>, name: &'static str, event: EventFd) -> SourceId {
    control_loop
        .control(|_, control| {
            control.add_event(name, event, move |log, _, count| {
                log.push(format!("{name} {count}"));
                Ok(())
            })
        })
        .unwrap()
}

#[test]
fn an_eventfd_is_consumed_and_its_count_told() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    add_event(&mut control_loop, "reset", watched);
    signal.write(3).unwrap();
    assert_eq!(turn(&mut control_loop), 1);
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["reset 3"]);
}

#[test]
fn a_failing_handler_ends_nothing_and_spins_nothing() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    control_loop.control(|_, control| {
        control.add_event("activate", watched, |_, _, _| Err("bad virtqueue".into())).unwrap();
    });
    let (other_signal, other) = event();
    add_event(&mut control_loop, "other", other);
    for _ in 0..2 {
        signal.write(1).unwrap();
        other_signal.write(1).unwrap();
        assert_eq!(turn(&mut control_loop), 2);
        assert_quiet(&mut control_loop);
    }
    let mut log = control_loop.state().clone();
    log.sort();
    assert_eq!(log, ["error activate: bad virtqueue", "error activate: bad virtqueue", "other 1", "other 1"]);
}

#[test]
fn a_removed_source_never_fires_not_even_for_a_fetched_event() {
    let mut control_loop = new_loop();
    // Each handler removes the other source; both are ready in the same wait, so one of them is already fetched.
    let signals = [event(), event()].map(|(signal, watched)| {
        signal.write(1).unwrap();
        watched
    });
    let [first, second] = signals;
    control_loop.control(|_, control| {
        let ids = std::rc::Rc::new(std::cell::RefCell::new(Vec::<SourceId>::new()));
        for (name, watched) in [("a", first), ("b", second)] {
            let known = std::rc::Rc::clone(&ids);
            let id = control
                .add_event(name, watched, move |log, control, _| {
                    log.push(name.to_owned());
                    let own = control.current();
                    for id in known.borrow().iter().filter(|id| Some(**id) != own) {
                        assert!(control.remove(*id));
                    }
                    Ok(())
                })
                .unwrap();
            ids.borrow_mut().push(id);
        }
    });
    while turn(&mut control_loop) > 0 {}
    assert_eq!(control_loop.state().len(), 1);
}

#[test]
fn a_source_can_be_removed_and_added_again_in_its_own_handler() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    let again = watched.try_clone().unwrap();
    let mut again = Some(again);
    control_loop.control(|_, control| {
        let handler = move |log: &mut Log, control: &mut vmm_epoll::Control<'_, Log>, _| {
            let own = control.current().unwrap();
            assert!(control.remove(own));
            assert!(!control.remove(own), "it is gone");
            let id = control.add_event("second", again.take().unwrap(), |log: &mut Log, _, n| {
                log.push(format!("second {n}"));
                Ok(())
            })?;
            assert_ne!(id, own, "numbers are not used again");
            log.push("first".to_owned());
            Ok(())
        };
        control.add_event("first", watched, handler).unwrap();
    });
    for _ in 0..2 {
        signal.write(1).unwrap();
        turn(&mut control_loop);
    }
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["first", "second 1"]);
}

#[test]
fn a_masked_source_waits_without_spinning() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    let id = add_event(&mut control_loop, "stdin", watched);
    control_loop.control(|_, control| control.mask(id).unwrap());
    control_loop.control(|_, control| control.mask(id).unwrap());
    signal.write(5).unwrap();
    assert_quiet(&mut control_loop);
    control_loop.control(|_, control| control.unmask(id).unwrap());
    assert_eq!(turn(&mut control_loop), 1);
    assert_eq!(*control_loop.state(), ["stdin 5"]);
    control_loop.control(|_, control| {
        control.mask(id).unwrap();
        assert!(control.remove(id));
        assert!(matches!(control.unmask(id), Err(LoopError::NoSource(_))));
    });
}

#[test]
fn a_reader_gets_bytes_then_its_end_once() {
    let mut control_loop = new_loop();
    let (reader, mut writer) = pipe().unwrap();
    control_loop.control(|_, control| {
        let handler = |log: &mut Log, control: &mut vmm_epoll::Control<'_, Log>, input: Input<'_>| {
            log.push(match input {
                Input::Data(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                Input::End(error) => format!("end {error:?} {}", control.current().is_some()),
            });
            Ok(())
        };
        control.add_reader("pty", reader, handler).unwrap();
    });
    writer.write_all(b"root\n").unwrap();
    turn(&mut control_loop);
    drop(writer);
    turn(&mut control_loop);
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["root\n", "end None true"]);
}

#[test]
fn a_plain_file_is_refused_by_name() {
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let mut control_loop = new_loop();
    let refused = control_loop.control(|_, control| control.add_reader("stdin", file, |_, _, _| Ok(())));
    let Err(LoopError::Watch { name, source }) = refused else { panic!("must be refused: {refused:?}") };
    assert_eq!((name, source.raw_os_error()), ("stdin", Some(libc::EPERM)));
}

#[test]
fn a_hung_up_descriptor_is_told_once_and_dropped() {
    let mut control_loop = new_loop();
    // The write end of a pipe without readers: EPOLLERR for ever, never EPOLLIN.
    let (reader, writer) = pipe().unwrap();
    control_loop.control(|_, control| {
        let handler = |log: &mut Log,
                       _: &mut vmm_epoll::Control<'_, Log>,
                       _: &mut _,
                       readiness: vmm_epoll::Readiness| {
            log.push(format!("{readiness:?}"));
            Ok(())
        };
        control.add_fd("writer", writer, handler).unwrap();
    });
    assert_quiet(&mut control_loop);
    drop(reader);
    assert_eq!(turn(&mut control_loop), 1);
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["Readiness { readable: false, hung_up: true }"]);
}

#[test]
fn a_descriptor_whose_handler_fails_is_masked() {
    let mut control_loop = new_loop();
    let path = std::env::temp_dir().join(format!("vmm-epoll-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let id = control_loop
        .control(|_, control| {
            let mut fail_first = true;
            control.add_fd("console", listener, move |log, _, listener: &mut UnixListener, _| {
                if std::mem::take(&mut fail_first) {
                    return Err("no descriptors left".into());
                }
                listener.accept()?;
                log.push("accepted".to_owned());
                Ok(())
            })
        })
        .unwrap();
    let _client = UnixStream::connect(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(turn(&mut control_loop), 1);
    assert_quiet(&mut control_loop);
    control_loop.control(|_, control| control.unmask(id).unwrap());
    assert_eq!(turn(&mut control_loop), 1);
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["error console: no descriptors left", "accepted"]);
}

#[test]
fn a_timer_fires_and_a_reset_one_forgets_its_expiry() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    let timer = control_loop
        .control(|_, control| {
            control.add_timer("refill", |log, _, count| {
                log.push(format!("refill {}", count > 0));
                Ok(())
            })
        })
        .unwrap();
    // Expired before the loop looks, and reset from a handler of the same turn or from outside: it must not block.
    control_loop.control(|_, control| {
        control
            .add_event("reset", watched, move |_, control, _| {
                control.set_timer(timer, Duration::from_secs(3600), None)?;
                Ok(())
            })
            .unwrap();
        control.set_timer(timer, Duration::ZERO, Some(Duration::from_millis(1))).unwrap();
    });
    control_loop.run_once(None).unwrap();
    assert_eq!(control_loop.state()[0], "refill true");
    std::thread::sleep(Duration::from_millis(3));
    control_loop.control(|_, control| control.clear_timer(timer).unwrap());
    assert_quiet(&mut control_loop);
    // The eventfd is ready first, so its handler resets a timer whose expiry the loop has fetched.
    signal.write(1).unwrap();
    control_loop.control(|_, control| control.set_timer(timer, Duration::from_nanos(1), None).unwrap());
    std::thread::sleep(Duration::from_millis(3));
    let before = control_loop.state().len();
    assert_eq!(turn(&mut control_loop), 2);
    assert_quiet(&mut control_loop);
    assert_eq!(control_loop.state().len(), before, "the forgotten expiry is not told");
    let gone = control_loop.control(|_, control| {
        control.remove(timer);
        control.set_timer(timer, Duration::ZERO, None)
    });
    assert!(matches!(gone, Err(LoopError::NoSource(_))));
}

#[test]
fn a_mailbox_hands_over_everything_at_one_wake_up() {
    let mut control_loop = new_loop();
    let (post, inbox) = mailbox::<u32>().unwrap();
    control_loop.control(|_, control| {
        control
            .add_mailbox("api", inbox, |log, _, n| {
                log.push(format!("request {n}"));
                if n == 2 { Err("client has gone".into()) } else { Ok(()) }
            })
            .unwrap();
    });
    (1..=3).for_each(|n| post.send(n).unwrap());
    assert_eq!(turn(&mut control_loop), 1);
    assert_quiet(&mut control_loop);
    let expected = ["request 1", "request 2", "error api: client has gone", "request 3"];
    assert_eq!(*control_loop.state(), expected);
}

#[test]
fn a_mailbox_masked_in_the_middle_of_a_batch_keeps_the_rest() {
    let mut control_loop = new_loop();
    let (post, inbox) = mailbox::<u32>().unwrap();
    let id = control_loop
        .control(|_, control| {
            control.add_mailbox("api", inbox, |log, control, n| {
                log.push(n.to_string());
                if n == 1 {
                    let own = control.current().unwrap();
                    control.mask(own)?;
                }
                Ok(())
            })
        })
        .unwrap();
    (1..=2).for_each(|n| post.send(n).unwrap());
    turn(&mut control_loop);
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["1"]);
    control_loop.control(|_, control| control.unmask(id).unwrap());
    turn(&mut control_loop);
    assert_quiet(&mut control_loop);
    assert_eq!(*control_loop.state(), ["1", "2"]);
    control_loop.control(|_, control| control.remove(id));
    assert!(post.send(3).is_err(), "a removed mailbox has no reader");
}

#[test]
fn stop_comes_from_a_handler_or_another_thread_and_the_loop_can_run_again() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    control_loop.control(|_, control| {
        control
            .add_event("exit", watched, |log, control, _| {
                log.push("exit".to_owned());
                control.stop();
                Ok(())
            })
            .unwrap();
    });
    signal.write(1).unwrap();
    control_loop.run().unwrap();
    let stopper = control_loop.stopper();
    let thread = std::thread::spawn(move || stopper.stop());
    control_loop.run().unwrap();
    thread.join().unwrap();
    assert_eq!(*control_loop.state(), ["exit"]);
}

#[test]
fn a_removed_source_is_unwatched_though_its_descriptor_lives_on_elsewhere() {
    let mut control_loop = new_loop();
    let (signal, watched) = event();
    let id = add_event(&mut control_loop, "exit", watched);
    assert!(control_loop.control(|_, control| control.remove(id)));
    signal.write(1).unwrap();
    assert_quiet(&mut control_loop);
}
