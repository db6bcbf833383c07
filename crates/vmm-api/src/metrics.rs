//! Metrics as OpenMetrics 1.0 text (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
//!
//! An [`Exposition`] collects samples in any order and writes them family by family. It checks what the format asks for,
//! so that what comes out is right or nothing comes out: one wrong name would make a scraper drop all.

mod check;
mod text;

use std::borrow::Cow;

use vmm_device_model::metrics as devices;

/// The media type of [`Exposition::text`].
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Metrics that mean the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name, without the suffix that the kind's samples have; it ends with the unit, if there is one.
    pub name: Cow<'static, str>,
    /// What it says, for people.
    pub help: Cow<'static, str>,
    /// A base unit such as `seconds` or `bytes`; empty for plain numbers.
    pub unit: Cow<'static, str>,
    /// The kind of its samples.
    pub kind: Kind,
}

impl Family {
    /// A family of static texts.
    #[must_use]
    pub const fn of(kind: Kind, name: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self { name: Cow::Borrowed(name), help: Cow::Borrowed(help), unit: Cow::Borrowed(unit), kind }
    }

    /// The name that a query asks for: of a counter with `_total`, of an info with `_info`, else the family's.
    #[must_use]
    pub fn series(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.name),
            Kind::Info => format!("{}_info", self.name),
            Kind::Gauge | Kind::Histogram => self.name.clone().into_owned(),
        }
    }
}

/// The kind of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What only grows while the process lives; reset by its start.
    Counter,
    /// What goes up and down.
    Gauge,
    /// How often values fell into ranges.
    Histogram,
    /// Facts that do not change, all in labels.
    Info,
}

impl Kind {
    /// Its word in the text.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
        }
    }
}

/// A number: whole ones are written without a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// A whole one.
    Int(u64),
    /// Any other.
    Float(f64),
}

/// The value of a sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of a [`Kind::Counter`]; not negative.
    Counter(Number),
    /// Of a [`Kind::Gauge`].
    Gauge(Number),
    /// Of a [`Kind::Histogram`].
    Histogram {
        /// Upper bounds of the ranges but the last, which has none; inclusive, ascending.
        bounds: Vec<f64>,
        /// Values per range, not added up: one more than there are bounds.
        counts: Vec<u64>,
        /// Sum of all values.
        sum: f64,
    },
    /// Of a [`Kind::Info`].
    Info,
}

impl Value {
    /// The kind of family that it belongs to.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Counter(_) => Kind::Counter,
            Self::Gauge(_) => Kind::Gauge,
            Self::Histogram { .. } => Kind::Histogram,
            Self::Info => Kind::Info,
        }
    }

    /// A counter's whole number.
    #[must_use]
    pub const fn count(count: u64) -> Self {
        Self::Counter(Number::Int(count))
    }

    /// A gauge's whole number.
    #[must_use]
    pub const fn gauge(value: u64) -> Self {
        Self::Gauge(Number::Int(value))
    }
}

/// Names and values that tell samples of a family apart; values may hold any characters.
pub type Labels = Vec<(Cow<'static, str>, String)>;

/// Samples of many families.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exposition {
    groups: Vec<Group>,
}

/// A family and its samples, which are together in the text.
#[derive(Clone, Debug, PartialEq)]
struct Group {
    family: Family,
    samples: Vec<(Labels, Value)>,
}

impl Exposition {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a sample of `family`.
    pub fn sample(&mut self, family: &Family, labels: &[(&'static str, &str)], value: Value) {
        let labels = labels.iter().map(|(name, text)| (Cow::Borrowed(*name), (*text).to_owned())).collect();
        self.add(family, Some((labels, value)));
    }

    /// Adds a family, which is shown even if no sample follows.
    pub fn family(&mut self, family: &Family) {
        self.add(family, None);
    }

    /// Adds what devices and vCPUs told.
    pub fn devices(&mut self, samples: impl IntoIterator<Item = devices::Sample>) {
        for sample in samples {
            let labels = sample.labels.into_iter().map(|(name, text)| (Cow::Borrowed(name), text)).collect();
            self.add(&sample.family.into(), Some((labels, sample.value.into())));
        }
    }

    /// The families, in the order of the text.
    pub fn families(&self) -> impl Iterator<Item = &Family> {
        self.groups.iter().map(|group| &group.family)
    }

    /// The text, with its end mark.
    ///
    /// # Errors
    /// Something in it is not as the format wants it.
    pub fn text(&self) -> Result<String, MetricsError> {
        check::all(&self.groups)?;
        Ok(text::write(&self.groups))
    }

    fn add(&mut self, family: &Family, sample: Option<(Labels, Value)>) {
        match self.groups.iter_mut().find(|group| group.family.name == family.name) {
            Some(group) => group.samples.extend(sample),
            None => self.groups.push(Group { family: family.clone(), samples: sample.into_iter().collect() }),
        }
    }
}

impl From<&devices::Family> for Family {
    fn from(family: &devices::Family) -> Self {
        let kind = match family.kind {
            devices::Kind::Counter => Kind::Counter,
            devices::Kind::Gauge => Kind::Gauge,
            devices::Kind::Histogram => Kind::Histogram,
        };
        Self::of(kind, family.name, family.unit, family.help)
    }
}

impl From<devices::Value> for Value {
    fn from(value: devices::Value) -> Self {
        match value {
            devices::Value::Counter(count) => Self::count(count),
            devices::Value::Gauge(value) => Self::gauge(value),
            devices::Value::Histogram { bounds, counts, sum } => {
                Self::Histogram { bounds: bounds.to_vec(), counts, sum }
            }
        }
    }
}

/// Metrics that have no text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("metric {name:?}: {fault}")]
pub struct MetricsError {
    /// The family.
    pub name: String,
    /// What is wrong with it.
    pub fault: MetricsFault,
}

/// What may be wrong with a family.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsFault {
    /// A letter or `_` at first, then also digits. Colons are for who aggregates.
    #[error("not a name of a metric")]
    Name,
    /// Such suffixes are for names of samples.
    #[error("the name ends with {0:?}, which samples of some kind add")]
    Suffix(&'static str),
    /// The unit is the end of the name.
    #[error("the name does not end with the unit {0:?}")]
    Unit(String),
    /// An info is no quantity.
    #[error("an info has no unit")]
    InfoUnit,
    /// Letters, digits and `_`, no `__` at first, and none that the kind uses itself.
    #[error("{0:?} is no name for a label here")]
    Label(String),
    /// A label is there twice.
    #[error("label {0:?} is there twice")]
    LabelTwice(String),
    /// Two samples cannot be told apart.
    #[error("two samples have the same labels")]
    SampleTwice,
    /// A sample is of another kind.
    #[error("a sample is a {0}")]
    Kind(&'static str),
    /// A counter's value is negative or not a number.
    #[error("{0} is not a count")]
    Count(String),
    /// Bounds are finite and ascend, and there is one count more.
    #[error("the ranges of a histogram do not fit together")]
    Ranges,
}
