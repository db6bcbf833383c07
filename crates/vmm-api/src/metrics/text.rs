//! Checked metrics as text.

use std::fmt::{self, Write as _};

use super::{Group, Labels, Number, Value};

pub(super) fn write(groups: &[Group]) -> String {
    let mut text = String::with_capacity(4096);
    // Writing to a String does not fail.
    let _ = groups.iter().try_for_each(|group| write_group(&mut text, group));
    text.push_str("# EOF\n");
    text
}

fn write_group(text: &mut String, group: &Group) -> fmt::Result {
    let family = &group.family;
    let name = &family.name;
    writeln!(text, "# TYPE {name} {}", family.kind.name())?;
    if !family.unit.is_empty() {
        writeln!(text, "# UNIT {name} {}", family.unit)?;
    }
    writeln!(text, "# HELP {name} {}", Escaped(&family.help))?;
    for (labels, value) in &group.samples {
        let mut line = |suffix: &str, le: Option<f64>, number: Number| {
            let (labels, number) = (LabelSet { labels, le }, Shown(number));
            writeln!(text, "{name}{suffix}{labels} {number}")
        };
        match value {
            Value::Counter(number) => line("_total", None, *number)?,
            Value::Gauge(number) => line("", None, *number)?,
            Value::Info => line("_info", None, Number::Int(1))?,
            Value::Histogram { bounds, counts, sum } => {
                let mut total = 0_u64;
                for (bound, count) in bounds.iter().chain([&f64::INFINITY]).zip(counts) {
                    total = total.saturating_add(*count);
                    line("_bucket", Some(*bound), Number::Int(total))?;
                }
                line("_count", None, Number::Int(total))?;
                line("_sum", None, Number::Float(*sum))?;
            }
        }
    }
    Ok(())
}

/// Labels in braces; nothing where there are none.
struct LabelSet<'l> {
    labels: &'l Labels,
    /// The bound of a bucket.
    le: Option<f64>,
}

impl fmt::Display for LabelSet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = '{';
        for (name, value) in self.labels {
            write!(f, "{before}{name}=\"{}\"", Escaped(value))?;
            before = ',';
        }
        if let Some(le) = self.le {
            write!(f, "{before}le=\"{}\"", Shown(Number::Float(le)))?;
            before = ',';
        }
        if before == ',' { f.write_char('}') } else { Ok(()) }
    }
}

/// Backslash, quote and line feed escaped, as the format has it for labels and help alike.
struct Escaped<'t>(&'t str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            _ => f.write_char(c),
        })
    }
}

struct Shown(Number);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Number::Int(number) => number.fmt(f),
            Number::Float(number) => canonical(number, f),
        }
    }
}

/// The canonical form ("Considerations: Canonical Numbers"): the shortest digits that read back the same; with an exponent
/// of at least two digits below 1e-4 and from 1e6 on, else with a point.
fn canonical(number: f64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if number.is_nan() {
        return f.write_str("NaN");
    }
    if number.is_infinite() {
        return f.write_str(if number > 0.0 { "+Inf" } else { "-Inf" });
    }
    let size = number.abs();
    if size == 0.0 || (1e-4..1e6).contains(&size) {
        return write!(f, "{number:?}");
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
    write!(f, "{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_canonical() {
        // The list of the specification, and what lies between.
        for (number, text) in [
            (0.0, "0.0"),
            (0.001, "0.001"),
            (0.25, "0.25"),
            (1.0, "1.0"),
            (10.0, "10.0"),
            (9.999, "9.999"),
            (1e-10, "1e-10"),
            (1e-5, "1e-05"),
            (5e-6, "5e-06"),
            (1.5e-7, "1.5e-07"),
            (1e-4, "0.0001"),
            (1e5, "100000.0"),
            (999_999.5, "999999.5"),
            (1e6, "1e+06"),
            (1_234_567.0, "1.234567e+06"),
            (1e10, "1e+10"),
            (1e300, "1e+300"),
            (-2.5, "-2.5"),
            (-1e7, "-1e+07"),
            (f64::INFINITY, "+Inf"),
            (f64::NEG_INFINITY, "-Inf"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(Shown(Number::Float(number)).to_string(), text);
        }
        assert_eq!(Shown(Number::Int(u64::MAX)).to_string(), "18446744073709551615");
    }
}
