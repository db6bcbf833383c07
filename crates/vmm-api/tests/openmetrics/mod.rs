//! A strict reader of the part of OpenMetrics 1.0 that a server of this kind writes: no timestamps, no exemplars.

use std::collections::BTreeMap;

/// A metric family.
#[derive(Debug, Default)]
pub(crate) struct Metric {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) unit: String,
    pub(crate) help: String,
    pub(crate) samples: Vec<Sample>,
}

/// A line of a family.
#[derive(Debug, PartialEq)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) value: f64,
}

type Result<T> = std::result::Result<T, String>;

/// The families of `text`.
pub(crate) fn read(text: &str) -> Result<Vec<Metric>> {
    let body = text.strip_suffix("# EOF\n").ok_or("no end mark")?;
    if !body.is_empty() && !body.ends_with('\n') {
        return Err("the end mark is no line of its own".into());
    }
    let mut metrics: Vec<Metric> = Vec::new();
    for line in body.split_terminator('\n') {
        match line.strip_prefix("# ") {
            Some(described) => describe(described, &mut metrics)?,
            None => {
                let sample = sample(line)?;
                let metric = metrics.last_mut().ok_or("a sample before its family")?;
                if metric.samples.iter().any(|s| s.name == sample.name && s.labels == sample.labels) {
                    return Err(format!("twice: {line}"));
                }
                metric.samples.push(sample);
            }
        }
    }
    metrics.iter().try_for_each(check)?;
    Ok(metrics)
}

fn describe(line: &str, metrics: &mut Vec<Metric>) -> Result<()> {
    let mut words = line.splitn(3, ' ');
    let mut word = || words.next().ok_or(format!("cut short: {line}"));
    let (what, name, value) = (word()?, word()?, word()?);
    if metrics.last().is_none_or(|metric| metric.name != name) {
        if metrics.iter().any(|metric| metric.name == name) {
            return Err(format!("{name} comes twice"));
        }
        is_name(name)?;
        metrics.push(Metric { name: name.to_owned(), ..Metric::default() });
    }
    let metric = metrics.last_mut().unwrap();
    if !metric.samples.is_empty() {
        return Err(format!("after the samples: {line}"));
    }
    let place = match what {
        "TYPE" => &mut metric.kind,
        "UNIT" => &mut metric.unit,
        "HELP" => &mut metric.help,
        _ => return Err(format!("neither TYPE nor UNIT nor HELP: {line}")),
    };
    if !place.is_empty() {
        return Err(format!("twice: {line}"));
    }
    *place = unescape(value)?;
    Ok(())
}

fn sample(line: &str) -> Result<Sample> {
    let end = line.find(['{', ' ']).ok_or(format!("no value: {line:?}"))?;
    let (name, rest) = line.split_at(end);
    is_name(name)?;
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = value.strip_prefix(' ').ok_or(format!("no space before the value: {line}"))?;
    Ok(Sample { name: name.to_owned(), labels, value: number(value)? })
}

/// Labels up to their brace, and what follows it.
fn labels(mut rest: &str) -> Result<(Vec<(String, String)>, &str)> {
    let mut labels: Vec<(String, String)> = Vec::new();
    loop {
        let (name, after) = rest.split_once("=\"").ok_or("no label")?;
        is_name(name)?;
        let mut escaped = false;
        let end = after.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let (value, after) = after.split_at(end.ok_or("a label without an end")?);
        if name.starts_with("__") || labels.iter().any(|(other, _)| other == name) {
            return Err(format!("label {name}"));
        }
        labels.push((name.to_owned(), unescape(value)?));
        match after[1..].split_at_checked(1) {
            Some((",", after)) => rest = after,
            Some(("}", after)) => return Ok((labels, after)),
            _ => return Err("after a label is neither comma nor brace".into()),
        }
    }
}

fn unescape(text: &str) -> Result<String> {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        plain.push(match c {
            '"' | '\n' => return Err(format!("not escaped: {text}")),
            '\\' => match characters.next() {
                Some('n') => '\n',
                Some(c @ ('"' | '\\')) => c,
                other => return Err(format!("escape of {other:?}")),
            },
            c => c,
        });
    }
    Ok(plain)
}

fn is_name(name: &str) -> Result<()> {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    let good = name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit());
    good.then_some(()).ok_or(format!("no name: {name:?}"))
}

fn number(text: &str) -> Result<f64> {
    match text {
        "+Inf" => Ok(f64::INFINITY),
        "-Inf" => Ok(f64::NEG_INFINITY),
        "NaN" => Ok(f64::NAN),
        _ if text.bytes().all(|c| c.is_ascii_digit() || b"+-.e".contains(&c)) => {
            text.parse().map_err(|_| format!("no number: {text:?}"))
        }
        _ => Err(format!("no number: {text:?}")),
    }
}

fn check(metric: &Metric) -> Result<()> {
    let Metric { name, kind, unit, .. } = metric;
    if !unit.is_empty() && !name.ends_with(&format!("_{unit}")) {
        return Err(format!("{name} does not end with {unit}"));
    }
    let suffixes: &[&str] = match kind.as_str() {
        "counter" => &["_total"],
        "gauge" => &[""],
        "info" if unit.is_empty() => &["_info"],
        "histogram" => return check_histogram(metric),
        _ => return Err(format!("{name} is a {kind:?} with unit {unit:?}")),
    };
    for sample in &metric.samples {
        if !suffixes.iter().any(|suffix| sample.name == format!("{name}{suffix}")) {
            return Err(format!("{} is no sample of {kind} {name}", sample.name));
        }
        let value = sample.value;
        match kind.as_str() {
            "counter" if value.is_nan() || value < 0.0 => return Err(format!("{name} counts {value}")),
            "info" if value != 1.0 => return Err(format!("{name} is {value}")),
            _ => {}
        }
    }
    Ok(())
}

/// Every set of labels has ascending buckets whose numbers do not fall, the last one without a bound, a count which is the
/// last bucket's number, and a sum: together and in this order.
fn check_histogram(metric: &Metric) -> Result<()> {
    let name = &metric.name;
    let mut sets: BTreeMap<Vec<(String, String)>, Vec<&Sample>> = BTreeMap::new();
    for sample in &metric.samples {
        let key = sample.labels.iter().filter(|(label, _)| label != "le").cloned().collect();
        sets.entry(key).or_default().push(sample);
    }
    for samples in sets.values() {
        let [buckets @ .., count, sum] = samples.as_slice() else {
            return Err(format!("{name} is cut short"));
        };
        let mut last = (f64::NEG_INFINITY, 0.0);
        for bucket in buckets {
            let le =
                bucket.labels.iter().find(|(label, _)| label == "le").ok_or("a bucket without a bound")?;
            let next = (number(&le.1)?, bucket.value);
            if bucket.name != format!("{name}_bucket") || next.0 <= last.0 || next.1 < last.1 {
                return Err(format!("{name}: bucket {bucket:?} after {last:?}"));
            }
            last = next;
        }
        let named = count.name == format!("{name}_count") && sum.name == format!("{name}_sum");
        if !named || last.0 != f64::INFINITY || last.1 != count.value {
            return Err(format!("{name}: {last:?}, {count:?}, {sum:?}"));
        }
    }
    Ok(())
}
