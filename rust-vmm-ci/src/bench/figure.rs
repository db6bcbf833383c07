//! What was measured, and the table of it.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// A figure as it is measured, and as it is written to the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// What it is.
    pub(crate) name: String,
    /// Of `ours` and `floor`.
    pub(crate) unit: String,
    /// The project's median.
    pub(crate) ours: f64,
    /// The median of what it is measured beside.
    pub(crate) floor: Option<f64>,
    /// Ours over the floor.
    pub(crate) ratio: Option<f64>,
    /// What should be at most or at least the target; absent for a figure that is here to be watched.
    pub(crate) goal: Option<Goal>,
    /// The target, of `ours` or of the ratio.
    pub(crate) target: Option<f64>,
    /// How it compares with its target; filled in for the report.
    #[serde(default)]
    pub(crate) verdict: String,
}

/// What a target is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Goal {
    /// Ours is at most the target.
    AtMost,
    /// The ratio is at most the target.
    RatioAtMost,
    /// The ratio is at least the target.
    RatioAtLeast,
}

impl Figure {
    /// With the verdict filled in.
    pub(crate) fn judged(self) -> Self {
        Self { verdict: self.verdict(), ..self }
    }

    fn verdict(&self) -> String {
        let (Some(goal), Some(target)) = (self.goal, self.target) else { return "-".to_owned() };
        let value = match goal {
            Goal::AtMost => Some(self.ours),
            Goal::RatioAtMost | Goal::RatioAtLeast => self.ratio,
        };
        match (goal, value) {
            (_, None) => "no value".to_owned(),
            (Goal::AtMost, Some(value)) if value > target => {
                format!("over by {} {}", number(value - target), self.unit)
            }
            (Goal::RatioAtMost, Some(value)) if value > target => format!("over by {:.2} x", value - target),
            (Goal::RatioAtLeast, Some(value)) if value < target => {
                format!("short by {:.2} x", target - value)
            }
            (_, Some(value)) if value.is_nan() => "no value".to_owned(),
            _ => "met".to_owned(),
        }
    }

    fn cells(&self) -> [String; 6] {
        let none = || "-".to_owned();
        let with_unit = |value| format!("{} {}", number(value), self.unit);
        let target = match (self.goal, self.target) {
            (Some(Goal::AtMost), Some(target)) => format!("<= {} {}", number(target), self.unit),
            (Some(Goal::RatioAtMost), Some(target)) => format!("<= {target} x"),
            (Some(Goal::RatioAtLeast), Some(target)) => format!(">= {target} x"),
            _ => none(),
        };
        [
            self.name.clone(),
            with_unit(self.ours),
            self.floor.map_or_else(none, with_unit),
            self.ratio.map_or_else(none, |ratio| format!("{ratio:.2}")),
            target,
            self.verdict.clone(),
        ]
    }
}

/// A Markdown table that also reads well on a terminal.
pub(crate) fn table(figures: &[Figure]) -> String {
    let head = ["what", "ours", "floor", "ratio", "target", "verdict"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(figures.iter().map(Figure::cells)).collect();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if index == 0 {
            widths.iter().for_each(|width| text += &format!("|{}", "-".repeat(width + 2)));
            text.push_str("|\n");
        }
    }
    text
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ours: f64, floor: Option<f64>, goal: Goal, target: f64) -> Figure {
        Figure {
            name: "n".to_owned(),
            unit: "us".to_owned(),
            ours,
            floor,
            ratio: floor.map(|floor| ours / floor),
            goal: Some(goal),
            target: Some(target),
            verdict: String::new(),
        }
    }

    #[test]
    fn verdicts_say_by_how_much_a_target_is_missed() {
        let verdict = |ours, floor, goal, target| figure(ours, floor, goal, target).judged().verdict;
        assert_eq!(verdict(4.0, None, Goal::AtMost, 4.0), "met");
        assert_eq!(verdict(160.0, None, Goal::AtMost, 150.0), "over by 10.0 us");
        assert_eq!(verdict(13.0, Some(10.0), Goal::RatioAtMost, 1.3), "met");
        assert_eq!(verdict(15.0, Some(10.0), Goal::RatioAtMost, 1.3), "over by 0.20 x");
        assert_eq!(verdict(7.0, Some(10.0), Goal::RatioAtLeast, 0.8), "short by 0.10 x");
        assert_eq!(verdict(9.0, Some(10.0), Goal::RatioAtLeast, 0.8), "met");
        assert_eq!(verdict(9.0, None, Goal::RatioAtLeast, 0.8), "no value");
        assert_eq!(verdict(f64::NAN, None, Goal::AtMost, 4.0), "no value");
        assert_eq!(Figure { goal: None, ..figure(1.0, None, Goal::AtMost, 0.0) }.judged().verdict, "-");
    }

    #[test]
    fn columns_of_the_table_are_aligned() {
        let text = table(&[figure(1234.5, Some(1.0), Goal::RatioAtMost, 1.3).judged()]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{text}");
        assert!(lines[2].starts_with("| n    | 1234 us | 1.00 us |"), "{text}");
    }

    #[test]
    fn json_has_the_goal_in_words() {
        let json = serde_json::to_value(figure(1.0, None, Goal::RatioAtMost, 2.0)).unwrap();
        assert_eq!(json["goal"], "ratio-at-most");
    }
}
