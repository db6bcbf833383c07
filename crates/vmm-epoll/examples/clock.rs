//! A timer ticks, another thread posts a message, the message ends the loop.

use std::time::Duration;
use vmm_epoll::{ControlLoop, mailbox};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (post, inbox) = mailbox::<String>()?;
    let mut control_loop = ControlLoop::new(0u64)?;
    control_loop.control(|_, control| {
        let ticker = control.add_timer("ticker", |ticks, _, count| {
            *ticks = ticks.saturating_add(count);
            println!("tick {ticks}");
            Ok(())
        })?;
        control.set_timer(ticker, Duration::from_millis(50), Some(Duration::from_millis(50)))?;
        control.add_mailbox("messages", inbox, |_, control, message| {
            println!("{message}");
            control.stop();
            Ok(())
        })
    })?;
    let poster = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(220));
        post.send("enough".to_owned())
    });
    control_loop.run()?;
    println!("{} ticks", control_loop.state());
    poster.join().map_err(|_| "the poster panicked")??;
    Ok(())
}
