//! Whether metrics are as the format wants them.

use std::collections::HashSet;

use super::{Group, Kind, Labels, MetricsError, MetricsFault, Number, Value};

/// Every suffix that means something to a reader. As no family's name ends with one, samples of two families never have
/// the same name.
const RESERVED: [&str; 8] = ["_total", "_created", "_bucket", "_count", "_sum", "_info", "_gcount", "_gsum"];

pub(super) fn all(groups: &[Group]) -> Result<(), MetricsError> {
    let fail = |group: &Group| {
        let name = group.family.name.clone().into_owned();
        move |fault| MetricsError { name, fault }
    };
    groups.iter().try_for_each(|group| one(group).map_err(fail(group)))
}

fn one(group: &Group) -> Result<(), MetricsFault> {
    let family = &group.family;
    if !is_name(&family.name) {
        return Err(MetricsFault::Name);
    }
    if let Some(suffix) = RESERVED.iter().find(|suffix| family.name.ends_with(*suffix)) {
        return Err(MetricsFault::Suffix(suffix));
    }
    if !family.unit.is_empty() {
        if family.kind == Kind::Info {
            return Err(MetricsFault::InfoUnit);
        }
        let stem = family.name.strip_suffix(&*family.unit);
        if !stem.is_some_and(|stem| stem.ends_with('_')) {
            return Err(MetricsFault::Unit(family.unit.clone().into_owned()));
        }
    }
    let mut seen = HashSet::new();
    for (own, value) in &group.samples {
        if value.kind() != family.kind {
            return Err(MetricsFault::Kind(value.kind().name()));
        }
        labels(own, family.kind)?;
        // In whatever order they come.
        let mut told: Vec<_> = own.iter().collect();
        told.sort_unstable();
        if !seen.insert(told) {
            return Err(MetricsFault::SampleTwice);
        }
        number(value)?;
    }
    Ok(())
}

fn labels(labels: &Labels, kind: Kind) -> Result<(), MetricsFault> {
    for (i, (name, _)) in labels.iter().enumerate() {
        let taken = kind == Kind::Histogram && name == "le";
        if taken || name.starts_with("__") || !is_name(name) {
            return Err(MetricsFault::Label(name.clone().into_owned()));
        }
        if labels.iter().take(i).any(|(other, _)| other == name) {
            return Err(MetricsFault::LabelTwice(name.clone().into_owned()));
        }
    }
    Ok(())
}

fn number(value: &Value) -> Result<(), MetricsFault> {
    match value {
        Value::Counter(Number::Float(count)) if count.is_nan() || *count < 0.0 => {
            Err(MetricsFault::Count(count.to_string()))
        }
        Value::Histogram { bounds, counts, sum } => {
            let ascending = bounds.is_sorted_by(|a, b| a < b) && bounds.iter().all(|bound| bound.is_finite());
            // A sum with negative values would not only grow, and a reader could not rely on it.
            let positive = *sum >= 0.0 && bounds.first().is_none_or(|bound| *bound >= 0.0);
            let fits = ascending && positive && counts.len() == bounds.len() + 1;
            if fits { Ok(()) } else { Err(MetricsFault::Ranges) }
        }
        Value::Counter(_) | Value::Gauge(_) | Value::Info => Ok(()),
    }
}

fn is_name(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit())
}
