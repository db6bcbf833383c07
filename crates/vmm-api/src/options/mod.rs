//! The command line's form of a configuration: one flag per object, `key=value,key=[1,2-4]` inside.
//!
//! The keys come from the tables of [`crate::config`], so that what JSON can say an option string can say. Sizes take
//! a suffix K, M, G or T, switches are `on` or `off`, lists are `[a,b]` with ranges for numbers, tuples are `1:2:1:1`
//! or `0@[1,2]`, and quotes protect what they enclose.
//!
//! ```
//! use vmm_api::options::VmFlags;
//!
//! let mut flags = VmFlags::new();
//! flags.add("kernel", "/boot/vmlinux")?;
//! flags.add("cpus", "boot=2")?;
//! flags.add("disk", "path=/images/root.raw,image_type=raw")?;
//! let parsed = flags.parse().map_err(|faults| format!("{faults:?}"))?;
//! assert_eq!(parsed.config.cpus.max_vcpus, 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod help;
mod text;
mod value;

use crate::config::json::Node;
use crate::config::reader::Reader;
use crate::config::table::{Shape, Table};
use crate::config::wire::{Walk, Wire};
use crate::config::{Bytes, Fault, FaultKind, Parsed, UnknownFields, VmConfig};

pub use help::help_for;
use value::OptionReader;

/// How often a flag may be given, and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Never followed by a value.
    Switch,
    /// At most once, with a value.
    Once,
    /// Any number of times, with one or more values each.
    Many,
}

/// One flag that sets a part of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// Its name without dashes.
    pub name: &'static str,
    /// Name of the value in help texts.
    pub value: &'static str,
    /// The field of the configuration that it sets.
    field: &'static [&'static str],
}

macro_rules! flags {
    ($($name:literal $value:literal => $($field:literal).+;)*) => {
        /// All flags that set a part of the configuration.
        pub const FLAGS: &[Flag] = &[$(Flag { name: $name, value: $value, field: &[$($field),+] },)*];
    };
}

flags! {
    "cpus" "OPTIONS" => "cpus";
    "memory" "OPTIONS" => "memory";
    "memory-zone" "OPTIONS" => "memory"."zones";
    "kernel" "PATH" => "payload"."kernel";
    "firmware" "PATH" => "payload"."firmware";
    "initramfs" "PATH" => "payload"."initramfs";
    "cmdline" "TEXT" => "payload"."cmdline";
    "igvm" "PATH" => "payload"."igvm";
    "host-data" "TEXT" => "payload"."host_data";
    "fw-cfg-config" "OPTIONS" => "payload"."fw_cfg_config";
    "rate-limit-group" "OPTIONS" => "rate_limit_groups";
    "disk" "OPTIONS" => "disks";
    "net" "OPTIONS" => "net";
    "rng" "OPTIONS" => "rng";
    "balloon" "OPTIONS" => "balloon";
    "fs" "OPTIONS" => "fs";
    "generic-vhost-user" "OPTIONS" => "generic_vhost_user";
    "pmem" "OPTIONS" => "pmem";
    "serial" "MODE" => "serial";
    "console" "MODE" => "console";
    "debug-console" "MODE" => "debug_console";
    "device" "OPTIONS" => "devices";
    "user-device" "OPTIONS" => "user_devices";
    "vdpa" "OPTIONS" => "vdpa";
    "vsock" "OPTIONS" => "vsock";
    "numa" "OPTIONS" => "numa";
    "watchdog" "" => "watchdog";
    "rtc" "OPTIONS" => "rtc";
    "pvpanic" "" => "pvpanic";
    "pci-segment" "OPTIONS" => "pci_segments";
    "platform" "OPTIONS" => "platform";
    "tpm" "OPTIONS" => "tpm";
    "ivshmem" "OPTIONS" => "ivshmem";
    "landlock" "" => "landlock_enable";
    "landlock-rules" "OPTIONS" => "landlock_rules";
}

impl Flag {
    /// The flag `name`, without dashes.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        FLAGS.iter().find(|flag| flag.name == name)
    }

    /// How often it may be given.
    #[must_use]
    pub fn arity(&self) -> Arity {
        match self.shape() {
            Shape::Bool => Arity::Switch,
            Shape::List(_) => Arity::Many,
            _ => Arity::Once,
        }
    }

    /// What it sets, in one sentence.
    #[must_use]
    pub fn doc(&self) -> &'static str {
        self.target().map_or("", |field| field.doc.trim())
    }

    /// The type of what it sets.
    fn shape(&self) -> Shape {
        self.target().map_or(Shape::Text, |field| (field.shape)())
    }

    /// The table of its keys, if its value is an option string.
    fn table(&self) -> Option<&'static Table> {
        match self.shape() {
            Shape::Object(table) => Some(table),
            Shape::List(element) => match element() {
                Shape::Object(table) => Some(table),
                _ => None,
            },
            _ => None,
        }
    }

    fn target(&self) -> Option<&'static crate::config::table::Field> {
        let (last, objects) = self.field.split_last()?;
        let mut table = VmConfig::TABLE;
        for name in objects {
            match (table.by_name(name)?.shape)() {
                Shape::Object(inner) => table = inner,
                _ => return None,
            }
        }
        table.by_name(last)
    }
}

/// An object of the contract that an option string can say.
pub trait FromOptions: Sized {
    /// The object that `text` says, `path=/d,readonly=on` for a [`DiskConfig`]; `place` names the text in faults. What
    /// this build does not support is not refused.
    ///
    /// ```
    /// use vmm_api::config::DiskConfig;
    /// use vmm_api::options::FromOptions;
    ///
    /// assert!(DiskConfig::from_options("add-disk", "path=/d,readonly=on").unwrap().readonly);
    /// ```
    ///
    /// # Errors
    ///
    /// All faults, each with `place` and its key (`add-disk path`).
    ///
    /// [`DiskConfig`]: crate::config::DiskConfig
    fn from_options(place: &str, text: &str) -> Result<Self, Vec<Fault>>;

    /// The keys with their values and defaults, one a line.
    fn option_help() -> String;
}

impl<T: Wire> FromOptions for T {
    fn from_options(place: &str, text: &str) -> Result<Self, Vec<Fault>> {
        let mut faults = Vec::new();
        let node = match T::shape() {
            Shape::Object(table) => OptionReader::new(place.to_owned(), &mut faults).object(text, table),
            _ => Node::Text(text.to_owned()),
        };
        let mut reader = Reader::new(UnknownFields::Refuse);
        let value = T::read(&node, &mut reader);
        for fault in reader.finish().0 {
            let keys: Vec<&str> = fault.path.split('.').map(|name| key_of(T::shape(), name)).collect();
            let path = format!("{place} {}", keys.join(" "));
            // A text that could not be read leaves its field missing; that was said already.
            if !faults.iter().any(|known| known.path == path) {
                faults.push(Fault { path, ..fault });
            }
        }
        value.filter(|_| faults.is_empty()).ok_or(faults)
    }

    fn option_help() -> String {
        match T::shape() {
            Shape::Object(table) => help::keys(table),
            _ => String::new(),
        }
    }
}

/// The key of an option string that sets the field `name`.
fn key_of(shape: Shape, name: &str) -> &str {
    match shape {
        Shape::Object(table) => table
            .by_name(name)
            .map_or(name, |field| if field.key.is_empty() { field.name } else { field.key }),
        _ => name,
    }
}

/// A number of bytes with its suffix, `512M`; `None` if it is none.
///
/// ```
/// assert_eq!(vmm_api::options::size("512M"), Some(512 << 20));
/// ```
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    text::bytes(text)
}

/// A name that is not a flag of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no flag of the configuration is called --{name}")]
pub struct UnknownFlag {
    /// The name.
    pub name: String,
}

/// The flags of one command line.
#[derive(Clone, Debug, Default)]
pub struct VmFlags {
    given: Vec<(&'static Flag, String)>,
}

impl VmFlags {
    /// No flags.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the flag `name` (without dashes) with its value; a switch has an empty one.
    ///
    /// # Errors
    ///
    /// If there is no such flag.
    pub fn add(&mut self, name: &str, value: &str) -> Result<(), UnknownFlag> {
        let flag = Flag::by_name(name).ok_or_else(|| UnknownFlag { name: name.to_owned() })?;
        self.given.push((flag, value.to_owned()));
        Ok(())
    }

    /// Whether no flag was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    /// The configuration that the flags make up.
    ///
    /// # Errors
    ///
    /// All faults, each with its flag and key (`--disk[1] path`).
    pub fn parse(&self) -> Result<Parsed, Vec<Fault>> {
        let mut faults = Vec::new();
        let root = self.document(&mut faults);
        let mut reader = Reader::new(UnknownFields::Refuse);
        let config = VmConfig::read(&root, &mut reader).unwrap_or_default();
        let (read_faults, warnings) = reader.finish();
        for fault in read_faults.into_iter().chain(Walk::faults_of(&config)) {
            let path = self.name(&fault.path);
            // A text that could not be read leaves its field missing; that was said already.
            if !faults.iter().any(|known: &Fault| known.path == path) {
                faults.push(Fault { path, ..fault });
            }
        }
        if faults.is_empty() { Ok(Parsed { config, warnings }) } else { Err(faults) }
    }

    /// The place on this command line that a JSON path means: `--disk[1] path` for `disks[1].path`.
    #[must_use]
    pub fn name(&self, json_path: &str) -> String {
        let steps: Vec<&str> = json_path.split('.').collect();
        let names: Vec<&str> = steps.iter().map(|step| step.split('[').next().unwrap_or(step)).collect();
        let flag =
            FLAGS.iter().filter(|flag| names.starts_with(flag.field)).max_by_key(|flag| flag.field.len());
        let Some(flag) = flag else {
            // No flag sets all of the payload.
            return if json_path == "payload" { "--kernel".into() } else { json_path.into() };
        };
        let last = steps.get(flag.field.len() - 1).copied().unwrap_or_default();
        let several = self.given.iter().filter(|(given, _)| given.name == flag.name).count() > 1;
        let index = last.find('[').filter(|_| several).and_then(|at| last.get(at..)).unwrap_or_default();
        let mut name = format!("--{}{index}", flag.name);
        let mut table = flag.table();
        for (step, field) in steps.iter().zip(&names).skip(flag.field.len()) {
            let known = table.and_then(|table| table.by_name(field));
            let key = known.map_or(*field, |known| if known.key.is_empty() { known.name } else { known.key });
            name = format!("{name} {key}{}", step.get(field.len()..).unwrap_or_default());
            table = known.and_then(|known| match (known.shape)() {
                Shape::Object(table) => Some(table),
                _ => None,
            });
        }
        name
    }

    /// The document that the flags stand for.
    fn document(&self, faults: &mut Vec<Fault>) -> Node {
        let mut root = Vec::new();
        for flag in FLAGS {
            let values: Vec<&str> = self
                .given
                .iter()
                .filter(|(given, _)| given.name == flag.name)
                .map(|(_, value)| value.as_str())
                .collect();
            let Some(first) = values.first() else {
                continue;
            };
            let node = match flag.arity() {
                Arity::Switch => Node::Bool(true),
                Arity::Many => Node::List(self.objects(flag, &values, faults)),
                Arity::Once => {
                    if values.len() > 1 {
                        faults.push(Fault::new(
                            format!("--{}", flag.name),
                            FaultKind::Invalid,
                            "given twice",
                        ));
                    }
                    one(flag, format!("--{}", flag.name), first, faults)
                }
            };
            place(&mut root, flag.field, node);
        }
        if self.lacks_memory_size() {
            place(&mut root, &["memory", "size"], Node::Unsigned(0));
        }
        Node::Object(root)
    }

    fn objects(&self, flag: &Flag, values: &[&str], faults: &mut Vec<Fault>) -> Vec<Node> {
        let name = |index: usize| match values.len() {
            1 => format!("--{}", flag.name),
            _ => format!("--{}[{index}]", flag.name),
        };
        values.iter().enumerate().map(|(index, text)| one(flag, name(index), text, faults)).collect()
    }

    /// Whether only zones say how much memory there is.
    fn lacks_memory_size(&self) -> bool {
        let given = |name: &str| self.given.iter().find(|(flag, _)| flag.name == name);
        given("memory-zone").is_some() && given("memory").is_none_or(|(_, text)| !says_size(text))
    }
}

fn says_size(memory: &str) -> bool {
    text::split(memory, ',').is_ok_and(|pieces| pieces.iter().any(|piece| piece.starts_with("size=")))
}

/// The value of one flag.
fn one(flag: &Flag, name: String, text: &str, faults: &mut Vec<Fault>) -> Node {
    match flag.table() {
        Some(table) => OptionReader::new(name, faults).object(text, table),
        None => Node::Text(text.to_owned()),
    }
}

/// Puts `node` at `field` into the object `entries`; objects on the way are made, and a value there is replaced.
fn place(entries: &mut Vec<(String, Node)>, field: &[&str], node: Node) {
    let Some((name, rest)) = field.split_first() else {
        return;
    };
    let at = entries.iter().position(|(given, _)| given == name).unwrap_or_else(|| {
        // Beside `zones`, an object made on the way says what the flag's absence says.
        let size = Node::Unsigned(Bytes::mib(512).get());
        let made = if *name == "memory" { vec![("size".to_owned(), size)] } else { Vec::new() };
        entries.push(((*name).to_owned(), Node::Object(made)));
        entries.len() - 1
    });
    match entries.get_mut(at) {
        Some((_, Node::Object(inner))) if !rest.is_empty() => place(inner, rest, node),
        Some((_, slot)) => *slot = node,
        None => {}
    }
}
