//! Writes three messages and a page of memory into a stream, and reads them back from pieces of seven bytes.
use vmm_migration_protocol::{Bulk, Command, Decoder, Item, MemoryRange, Message, contents_checksum};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let page = [0x5a; 4096];
    let mut stream = Message::Config(b"{}".to_vec()).encode()?.encode();
    let bulk = Bulk::memory(MemoryRange::new(0x1000, 4096)?, 0, contents_checksum([&page[..]]))?;
    stream.extend(bulk.header());
    stream.extend(page);
    stream.extend(Message::Complete.encode()?.encode());
    stream.extend(Message::Ack(Command::Complete).encode()?.encode());
    println!("{} bytes sent", stream.len());

    let mut decoder = Decoder::new();
    // Of the bulk frame that is arriving: itself, and its contents so far.
    let mut landing: Option<(Bulk, Vec<u8>)> = None;
    for mut piece in stream.chunks(7) {
        while !piece.is_empty() {
            if let Some((bulk, contents)) = &mut landing {
                let missing = bulk.length().saturating_sub(contents.len());
                contents.extend(piece.split_off(..missing.min(piece.len())).unwrap_or_default());
                if contents.len() == bulk.length() {
                    bulk.check(contents_checksum([&contents[..]]))?;
                    println!("{} bytes of memory at {:#x}", contents.len(), bulk.range().gpa());
                    landing = None;
                }
                continue;
            }
            match decoder.push(&mut piece)? {
                Some(Item::Frame(frame)) => println!("{:?}", Message::decode(frame)?),
                Some(Item::Bulk(bulk)) => landing = Some((bulk, Vec::new())),
                None => {}
            }
        }
    }
    Ok(decoder.finish()?)
}
