//! Writes three frames into a stream and reads them back from pieces of seven bytes.
use vmm_migration_protocol::{Command, Decoder, Frame, FrameError};

fn main() -> Result<(), FrameError> {
    let mut stream = Vec::new();
    for (command, payload) in [(Command::Start, &b""[..]), (Command::Config, b"{}"), (Command::Complete, b"")]
    {
        stream.extend(Frame::new(command, payload.to_vec())?.encode());
    }
    println!("{} bytes sent", stream.len());

    let mut decoder = Decoder::new();
    for mut piece in stream.chunks(7) {
        while let Some(frame) = decoder.push(&mut piece)? {
            println!("{} with {} bytes of payload", frame.command(), frame.payload().len());
        }
    }
    decoder.finish()
}
