//! The list of events as a page for people.

use std::fmt::Write as _;

use super::Event;

/// Every event as Markdown; `docs/events.md` is this text.
#[must_use]
pub fn events_markdown() -> String {
    let mut page = String::from(INTRODUCTION);
    for kind in Event::KINDS {
        // Writing to a String cannot fail.
        let _ = write!(page, "\n### {}/{}\n\n{}", kind.source, kind.event, kind.doc);
        let _ = match kind.monitor {
            None => writeln!(page, " Stream only."),
            Some(_) => writeln!(page),
        };
        if !kind.properties.is_empty() {
            page.push_str("\n| property | form | monitor | meaning |\n|---|---|---|---|\n");
        }
        for property in kind.properties {
            let told = kind.monitor.is_some_and(|told| told.contains(&property.name));
            let monitor = if told { "yes" } else { "no" };
            let _ =
                writeln!(page, "| `{}` | {} | {monitor} | {} |", property.name, property.form, property.doc);
        }
    }
    page
}

const INTRODUCTION: &str = r#"# Events

Generated from the types in `vmm-api`; do not edit.

An event says that something happened, when, and what of it matters. Events hold no guest data, no command lines and no
paths; a text of more than 256 bytes is cut and ends in `...`. A line is under 4096 bytes.

## The event monitor

`--event-monitor path=PATH` or `fd=NUMBER` writes the events of the contract in the contract's form, one object a line:

```json
{"timestamp":{"secs":0,"nanos":8166233},"source":"virtio-device","event":"activated","properties":{"id":"_disk0"}}
```

The timestamp is the time since the VMM started. `properties` is `null` where there are none; all values are texts.
Braces within texts are escaped, for readers count them. Nothing else is ever written there but `left-out`, below.

- A path is opened once, at the start. A file is made for this user only (0600), or emptied if it is there.
- A FIFO is opened for both directions and without blocking: it needs no reader at the start, its reader may go and another
  come, and the kernel keeps what is not read yet.
- A descriptor must be one that was passed to this process, above standard error's. It is set to not blocking.
- A reader that stops never stops the VMM: when pipe and journal are full, the oldest events are lost, and the log says
  so once. An event is written whole.
- A guest that resets again and again does not fill a disk: of what guests can repeat (boots, reboots, panics, devices that are
  activated and reset) 256 events are written at once, then 8 a second; the newest 16 wait for their time, older ones are left out.
  Whatever else happens is written at once, after those that wait.
- How many were left out, for either reason, is told before the next event:

```json
{"timestamp":{"secs":9,"nanos":81662330},"source":"vmm","event":"left-out","properties":{"events":"1204"}}
```

## The stream

`GET /api/v1/vmm.events` answers with all events, a JSON object a line (`application/x-ndjson`), and goes on until the
client leaves, sends something, or the VMM ends:

```json
{"seq":7,"time":{"secs":1764170133,"nanos":59338116},"source":"vm","event":"boot-stage","machine":1,"properties":{"duration_us":412,"stage":"memory"}}
```

- `seq` numbers the events of a VMM process from 1 without gaps. `time` is UTC since 1970. `machine` numbers the machines that
  were built: a reboot makes a new one; it is absent where the event is about none. `properties` is absent where there
  are none, and so is a property that is not known.
- `?from=N` begins with event N, so a reader that broke off resumes with the number after its last; `?from=next` begins with what
  comes next. Without it the stream begins with event 1. A number that is not reached yet is refused (400).
- `?follow=false` gives what is there, and ends.
- The VMM keeps the newest 4096 events, or 512 KiB of them. A reader that comes later or is too slow loses the oldest, and a
  line tells how many, and the number of the event that follows:

```json
{"lost":12,"next":20}
```

- A stream takes one of the server's connections. There may be 64 streams; the next is answered 503.
- Kinds and properties may be added; a reader skips what it does not know.

## Kinds

All of them but `vmm/left-out` are in the stream; those that are not marked are in the event monitor, too. What is not built yet
(resizing) does not happen yet.
"#;
