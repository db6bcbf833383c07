//! The table behind each object of the contract, and the macro that writes object and table at once.
//!
//! One declaration per object gives the wire type, its serde form, the reader with paths and hints, the keys of
//! its option string, its help text, and its part of the OpenAPI document.

use serde::Serialize;
use serde_json::Value;

/// The type of a value as the contract sees it.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// `true` or `false`; `on` or `off` in option strings.
    Bool,
    /// A whole number within bounds, both inclusive.
    Integer {
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: u64,
    },
    /// A number of bytes; option strings take a suffix K, M, G or T (powers of 1024).
    Bytes,
    /// A string.
    Text,
    /// A path on the host.
    Path,
    /// An IPv4 or IPv6 address.
    Address,
    /// One of several words.
    Choice(&'static Choice),
    /// An array.
    List(fn() -> Shape),
    /// An object with a table of its own.
    Object(&'static Table),
}

/// Several words, one of which is a value.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The contract's name of the type.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// The words.
    pub words: &'static [Word],
}

/// One word of a [`Choice`].
#[derive(Clone, Copy, Debug)]
pub struct Word {
    /// Spelling in JSON.
    pub json: &'static str,
    /// Spellings in option strings, in lower case, the usual one first.
    pub option: &'static [&'static str],
    /// What it means.
    pub doc: &'static str,
}

/// What this build does with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It has its effect.
    Current,
    /// It is accepted at its default and refused by name otherwise: its work is not built yet.
    Later,
}

/// When a field must be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Never: it has a default.
    Optional,
    /// In JSON; option strings have a default.
    InJson,
    /// Always.
    Always,
}

/// One field of an object.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// The contract's name in JSON.
    pub name: &'static str,
    /// Key in option strings; empty if they cannot set this field.
    pub key: &'static str,
    /// Older names, in JSON and in option strings.
    pub aliases: &'static [&'static str],
    /// What this build does with it.
    pub status: Status,
    /// When it must be given.
    pub need: Need,
    /// Whether null means that it is not given.
    pub nullable: bool,
    /// Least and greatest value of a number, where they are narrower than its type. Told here, held by the check.
    pub range: Option<(u64, u64)>,
    /// Its type.
    pub shape: fn() -> Shape,
    /// Its default as JSON; null where absence is the default.
    pub default: fn() -> Value,
    /// Its documentation.
    pub doc: &'static str,
}

/// A field of an older release that no longer exists.
#[derive(Clone, Copy, Debug)]
pub struct Retired {
    /// Its name, in JSON and in option strings.
    pub name: &'static str,
    /// The old default as JSON text, at which it is ignored; null is ignored too.
    pub default: &'static str,
    /// Why it is gone, or what replaces it.
    pub why: &'static str,
}

/// All that is known of an object of the contract.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// The contract's name of the object.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// Its fields, in the order of serialization.
    pub fields: &'static [Field],
    /// Fields that older releases had.
    pub retired: &'static [Retired],
}

impl Table {
    /// The field that JSON calls `name`, by its present or an older name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name || field.aliases.contains(&name))
    }

    /// The field that option strings call `key`, by its present or an older key.
    #[must_use]
    pub fn by_key(&self, key: &str) -> Option<&'static Field> {
        let known =
            |field: &&Field| !field.key.is_empty() && (field.key == key || field.aliases.contains(&key));
        self.fields.iter().find(known)
    }

    /// The retired field `name`.
    #[must_use]
    pub fn retired(&self, name: &str) -> Option<&'static Retired> {
        self.retired.iter().find(|retired| retired.name == name)
    }

    /// All fields that option strings can set.
    pub fn keys(&self) -> impl Iterator<Item = &'static Field> + use<> {
        self.fields.iter().filter(|field| !field.key.is_empty())
    }
}

/// `value` as JSON; null if it has no JSON form, which no wire type has. By way of its text, as which every type is written
/// anyhow: a second way would be as much code again.
pub(crate) fn json_of(value: &impl Serialize) -> Value {
    serde_json::to_vec(value).and_then(|text| serde_json::from_slice(&text)).unwrap_or(Value::Null)
}

/// Declares objects of the contract: `[current|later, need?; key = ".."; alias = ".."; range = 1 to 9] name:
/// Type = default`.
macro_rules! object {
    (
        $(#[doc = $struct_doc:literal])+
        $vis:vis struct $object:ident {
            $(
                $(#[doc = $doc:literal])+
                [$status:ident $(, $need:ident)? $(; key = $key:literal)? $(; alias = $($alias:literal)|+)? $(; range = $least:literal to $most:literal)?]
                $field:ident : $type:ty = $default:expr,
            )*
        }
        $(retired { $($retired:literal = $retired_default:literal, $why:literal;)* })?
    ) => {
        $(#[doc = $struct_doc])+
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $object {
            $($(#[doc = $doc])+ $vis $field: $type,)*
        }

        impl $object {
            /// The table of this object.
            $vis const TABLE: &'static $crate::config::table::Table = &$crate::config::table::Table {
                name: stringify!($object),
                doc: concat!($($struct_doc),+).trim_ascii(),
                fields: &[$($crate::config::table::Field {
                    name: stringify!($field),
                    key: $crate::config::table::object!(@key $field $($key)?),
                    aliases: &[$($($alias),+)?],
                    status: $crate::config::table::object!(@status $status),
                    need: $crate::config::table::object!(@need $($need)?),
                    range: $crate::config::table::object!(@range $($least $most)?),
                    nullable: <$type as $crate::config::wire::Wire>::NULLABLE,
                    shape: <$type as $crate::config::wire::Wire>::shape,
                    default: || {
                        let value: $type = $default;
                        $crate::config::table::json_of(&value)
                    },
                    doc: concat!($($doc),+),
                },)*],
                retired: &[$($($crate::config::table::Retired {
                    name: $retired,
                    default: $retired_default,
                    why: $why,
                },)*)?],
            };
        }

        impl Default for $object {
            /// Each field at its default; a required one at its empty value.
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        #[allow(unused_variables, reason = "an object may have no fields")]
        impl $crate::config::wire::Wire for $object {
            fn shape() -> $crate::config::table::Shape {
                $crate::config::table::Shape::Object(Self::TABLE)
            }

            fn read(
                node: &$crate::config::json::Node,
                reader: &mut $crate::config::reader::Reader,
            ) -> Option<Self> {
                let found = reader.object(node, Self::TABLE)?;
                Some(Self { $($field: reader.field(&found, stringify!($field), || $default),)* })
            }

            fn refuse_later(&self, walk: &mut $crate::config::wire::Walk) {
                $(
                    let default: $type = $default;
                    walk.field($crate::config::table::object!(@status $status), stringify!($field), &self.$field, &default);
                )*
            }
        }

        #[allow(unused_mut, reason = "an object may have no fields")]
        impl ::serde::Serialize for $object {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                use ::serde::ser::SerializeMap as _;
                let mut map = serializer.serialize_map(None)?;
                $(if !$crate::config::wire::Wire::is_absent(&self.$field) {
                    map.serialize_entry(stringify!($field), &self.$field)?;
                })*
                map.end()
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $object {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::config::reader::deserialize(deserializer)
            }
        }
    };
    (@key $field:ident) => { stringify!($field) };
    (@key $field:ident $key:literal) => { $key };
    (@range) => { None };
    (@range $least:literal $most:literal) => { Some(($least, $most)) };
    (@status current) => { $crate::config::table::Status::Current };
    (@status later) => { $crate::config::table::Status::Later };
    (@need) => { $crate::config::table::Need::Optional };
    (@need in_json) => { $crate::config::table::Need::InJson };
    (@need required) => { $crate::config::table::Need::Always };
}

/// An [`object!`] that is a PCI device: the four fields that all of them share are appended.
macro_rules! pci_object {
    (
        $(#[doc = $struct_doc:literal])+
        pub struct $object:ident { $($fields:tt)* }
        $($rest:tt)*
    ) => {
        $crate::config::table::object! {
            $(#[doc = $struct_doc])+
            pub struct $object {
                $($fields)*
                /// Name of the device, unique in the VM; chosen automatically if absent.
                [current] id: Option<String> = None,
                /// Put the device behind the virtual IOMMU.
                [later] iommu: bool = false,
                /// PCI segment of the device.
                [later] pci_segment: u16 = 0,
                /// Device number on the PCI bus, 1 to 31; chosen automatically if absent.
                [current] pci_device_id: Option<u8> = None,
            }
            $($rest)*
        }
    };
}

/// Declares a choice between words: `Variant = "Json" | "option" | ..`; the first is the default. `as` gives the
/// contract's name of the type where that is another.
macro_rules! choice {
    (
        $(#[doc = $enum_doc:literal])+
        pub enum $choice:ident $(as $name:literal)? {
            $(#[doc = $first_doc:literal])+
            $first:ident = $first_json:literal $(| $first_option:literal)+,
            $(
                $(#[doc = $doc:literal])+
                $variant:ident = $json:literal $(| $option:literal)+,
            )*
        }
    ) => {
        $(#[doc = $enum_doc])+
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub enum $choice {
            $(#[doc = $first_doc])+
            #[default]
            $first,
            $($(#[doc = $doc])+ $variant,)*
        }

        impl $choice {
            /// The words, in the order of the variants.
            pub const WORDS: &'static [$crate::config::table::Word] = &[
                $crate::config::table::Word { json: $first_json, option: &[$($first_option),+], doc: concat!($($first_doc),+).trim_ascii() },
                $($crate::config::table::Word { json: $json, option: &[$($option),+], doc: concat!($($doc),+).trim_ascii() },)*
            ];

            /// All that is known of this choice.
            pub const CHOICE: &'static $crate::config::table::Choice = &$crate::config::table::Choice {
                name: $crate::config::table::choice!(@name $choice $($name)?),
                doc: concat!($($enum_doc),+).trim_ascii(),
                words: Self::WORDS,
            };

            /// The contract's word for this value.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    Self::$first => $first_json,
                    $(Self::$variant => $json,)*
                }
            }
        }

        impl $crate::config::wire::Wire for $choice {
            fn shape() -> $crate::config::table::Shape {
                $crate::config::table::Shape::Choice(Self::CHOICE)
            }

            fn read(
                node: &$crate::config::json::Node,
                reader: &mut $crate::config::reader::Reader,
            ) -> Option<Self> {
                let text = reader.choice(node, Self::WORDS)?;
                match text {
                    $first_json => Some(Self::$first),
                    $($json => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }

        impl ::serde::Serialize for $choice {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.word())
            }
        }
    };
    (@name $choice:ident) => { stringify!($choice) };
    (@name $choice:ident $name:literal) => { $name };
}

pub(crate) use {choice, object, pci_object};
