//! A log record as a line of text or of JSON.

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use log::Record;
use log::kv::{Error, Key, Value, VisitSource, VisitValue};

use super::time::rfc3339;

/// When, where, and about which VM something was logged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment<'m> {
    pub(super) time: SystemTime,
    /// Since the start.
    pub(super) elapsed: Duration,
    pub(super) thread: &'m str,
    pub(super) vm: Option<&'m str>,
}

impl Moment<'_> {
    fn seconds(&self) -> impl fmt::Display {
        let elapsed = self.elapsed;
        fmt::from_fn(move |f| write!(f, "{}.{:06}", elapsed.as_secs(), elapsed.subsec_micros()))
    }
}

/// `vmm: 12.345678s: <vcpu0> WARN:vmm_pci::slots -- message key=value`.
pub(super) fn text(moment: &Moment<'_>, record: &Record<'_>) -> String {
    let mut line = String::with_capacity(128);
    // Writing to a String fails only if a Display of the message does.
    let _ = write!(
        line,
        "vmm: {}s: <{}> {}:{} -- ",
        moment.seconds(),
        moment.thread,
        record.level(),
        record.target(),
    );
    let _ = write!(Escaped(&mut line), "{}", record.args());
    let _ = record.key_values().visit(&mut TextFields(&mut line));
    if let Some(vm) = moment.vm {
        TextFields(&mut line).pair("vm", vm);
    }
    line.push('\n');
    line
}

/// An object with `timestamp`, `elapsed` (seconds), `level`, `thread`, `module`, `message` and the record's fields.
pub(super) fn json(moment: &Moment<'_>, record: &Record<'_>) -> String {
    let mut fields = JsonFields { line: String::with_capacity(256), keys: Vec::new() };
    fields.string("timestamp", &rfc3339(moment.time));
    fields.raw("elapsed", &moment.seconds().to_string());
    fields.string("level", record.level().as_str());
    fields.string("thread", moment.thread);
    fields.string("module", record.target());
    fields.string("message", &record.args().to_string());
    let _ = record.key_values().visit(&mut fields);
    if let Some(vm) = moment.vm {
        fields.string("vm", vm);
    }
    fields.line.push_str("}\n");
    fields.line
}

/// Escapes control characters, so that a message can neither forge a line nor drive a terminal.
struct Escaped<'s>(&'s mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if character.is_control() {
                self.0.extend(character.escape_default());
            } else {
                self.0.push(character);
            }
        }
        Ok(())
    }
}

/// Appends ` key=value`; a value that could be misread is in quotes.
struct TextFields<'s>(&'s mut String);

impl TextFields<'_> {
    fn pair(&mut self, key: &str, value: &str) {
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '"' | '=' | '\\');
        self.0.push(' ');
        let _ = Escaped(self.0).write_str(key);
        self.0.push('=');
        if !value.is_empty() && value.chars().all(plain) {
            self.0.push_str(value);
        } else {
            self.0.push('"');
            self.0.extend(value.chars().flat_map(|c| {
                // Quotes and backslashes, too, so that the end of the value is certain.
                let escaped = (c.is_control() || matches!(c, '"' | '\\')).then(|| c.escape_default());
                let kept = escaped.is_none().then_some(c);
                escaped.into_iter().flatten().chain(kept)
            }));
            self.0.push('"');
        }
    }
}

impl<'kvs> VisitSource<'kvs> for TextFields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        self.pair(key.as_str(), &value.to_string());
        Ok(())
    }
}

/// Writes the members of one object; a name that is taken is not written again.
struct JsonFields {
    line: String,
    keys: Vec<String>,
}

impl JsonFields {
    fn string(&mut self, key: &str, value: &str) {
        self.raw(key, &quoted(value));
    }

    fn raw(&mut self, key: &str, json: &str) {
        if !self.keys.iter().any(|taken| taken == key) {
            let before = if self.keys.is_empty() { '{' } else { ',' };
            self.keys.push(key.to_owned());
            let _ = write!(self.line, "{before}{}:{json}", quoted(key));
        }
    }
}

impl<'kvs> VisitSource<'kvs> for JsonFields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        let mut json = JsonValue(String::new());
        value.visit(&mut json)?;
        self.raw(key.as_str(), &json.0);
        Ok(())
    }
}

/// A value as JSON: numbers, booleans and nothing as what they are, all else as a string.
struct JsonValue(String);

impl VisitValue<'_> for JsonValue {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), Error> {
        self.0 = quoted(&value.to_string());
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), Error> {
        self.0 = "null".to_owned();
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), Error> {
        self.0 = value.to_string();
        Ok(())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), Error> {
        self.0 = value.to_string();
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), Error> {
        // JSON has neither infinities nor NaN.
        self.0 = if value.is_finite() { format!("{value:?}") } else { quoted(&value.to_string()) };
        Ok(())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), Error> {
        self.0 = value.to_string();
        Ok(())
    }
}

/// A JSON string (RFC 8259, section 7) without any control character as itself.
fn quoted(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    json.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => json.extend(['\\', character]),
            '\n' => json.push_str("\\n"),
            // All of them are below U+00A0.
            _ if character.is_control() => {
                let _ = write!(json, "\\u{:04x}", u32::from(character));
            }
            _ => json.push(character),
        }
    }
    json.push('"');
    json
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use log::Level;
    use serde_json::{Value as Json, json};

    use super::*;

    const MOMENT: Moment<'static> =
        Moment { time: UNIX_EPOCH, elapsed: Duration::new(12, 345_678_900), thread: "vcpu0", vm: None };

    type Pairs<'p> = &'p [(&'p str, Value<'p>)];

    fn with<R>(message: &str, pairs: Pairs<'_>, work: impl FnOnce(&Record<'_>) -> R) -> R {
        let mut builder = Record::builder();
        builder.level(Level::Warn).target("vmm_pci::slots").key_values(&pairs);
        work(&builder.args(format_args!("{message}")).build())
    }

    fn text_of(message: &str, pairs: Pairs<'_>) -> String {
        with(message, pairs, |record| text(&MOMENT, record))
    }

    fn json_of(message: &str, pairs: Pairs<'_>) -> Json {
        let line = with(message, pairs, |record| json(&MOMENT, record));
        assert!(line.ends_with("}\n") && !line.trim_end().contains(char::is_control), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn a_line_has_time_thread_level_and_target() {
        let expected = "vmm: 12.345678s: <vcpu0> WARN:vmm_pci::slots -- slot 3 is taken\n";
        assert_eq!(text_of("slot 3 is taken", &[]), expected);
        let whole = with("slot 3 is taken", &[("device", "_disk0".into())], |r| json(&MOMENT, r));
        assert_eq!(
            whole,
            "{\"timestamp\":\"1970-01-01T00:00:00.000000Z\",\"elapsed\":12.345678,\"level\":\"WARN\",\
             \"thread\":\"vcpu0\",\"module\":\"vmm_pci::slots\",\"message\":\"slot 3 is taken\",\
             \"device\":\"_disk0\"}\n"
        );
    }

    #[test]
    fn a_message_is_one_line() {
        let line = text_of("a\nvmm: forged\r\u{1b}[2J\u{85}ü", &[("k\n", "v\n\u{9b}".into())]);
        assert!(line.ends_with("-- a\\nvmm: forged\\r\\u{1b}[2J\\u{85}ü k\\n=\"v\\n\\u{9b}\"\n"), "{line}");
        assert_eq!(line.lines().count(), 1);
        let hostile = "a\n\"}\\\r\u{1b}\u{85}\u{7f}\0ü\u{2028}";
        let object = json_of(hostile, &[(hostile, hostile.into())]);
        assert_eq!((&object["message"], &object[hostile]), (&json!(hostile), &json!(hostile)));
    }

    #[test]
    fn fields_keep_their_types_in_json_and_are_pairs_in_text() {
        let pairs: Pairs<'_> = &[
            ("device", "_disk0".into()),
            ("vcpu", 3_u32.into()),
            ("offset", (-5_i64).into()),
            ("ratio", 0.5_f64.into()),
            ("odd", f64::NAN.into()),
            ("on", true.into()),
            ("nothing", Value::null()),
            ("said", "a \"b\"".into()),
            ("empty", "".into()),
        ];
        let line = text_of("m", pairs);
        let fields = line.split_once("-- m ").unwrap().1;
        assert_eq!(
            fields,
            "device=_disk0 vcpu=3 offset=-5 ratio=0.5 odd=NaN on=true nothing=None said=\"a \\\"b\\\"\" empty=\"\"\n"
        );
        let object = json_of("m", pairs);
        let expected = json!({
            "device": "_disk0", "vcpu": 3, "offset": -5, "ratio": 0.5, "odd": "NaN", "on": true,
            "nothing": null, "said": "a \"b\"", "empty": "",
        });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&object[key], value, "{key}");
        }
    }

    #[test]
    fn the_vm_is_in_each_line_and_no_member_is_there_twice() {
        let moment = Moment { vm: Some("web 1"), ..MOMENT };
        let line = with("m", &[("job", 7_u64.into())], |record| text(&moment, record));
        assert!(line.ends_with("-- m job=7 vm=\"web 1\"\n"), "{line}");
        let pairs: Pairs<'_> = &[("level", "mine".into()), ("vm", "other".into())];
        let line = with("m", pairs, |record| json(&moment, record));
        assert_eq!((line.matches("\"level\":").count(), line.matches("\"vm\":").count()), (1, 1), "{line}");
        assert_eq!(serde_json::from_str::<Json>(&line).unwrap()["level"], "WARN");
    }
}
