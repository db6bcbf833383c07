//! What was measured, and how it is written down.

use serde_json::{Value, json};

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    /// Nothing: it is here to be watched.
    None,
    /// Ours over the floor's, at most.
    RatioAtMost(f64),
    /// Ours over the floor's, at least.
    RatioAtLeast(f64),
    /// Ours, at most.
    AtMost(f64),
}

/// A figure.
#[derive(Debug)]
pub(crate) struct Figure {
    name: &'static str,
    unit: &'static str,
    ours: f64,
    floor: Option<f64>,
    goal: Goal,
}

impl Figure {
    /// Ours beside the floor, each the median of its values.
    pub(crate) fn beside(
        name: &'static str,
        unit: &'static str,
        (mut ours, mut floor): (Vec<f64>, Vec<f64>),
        goal: Goal,
    ) -> Self {
        Self { name, unit, ours: median(&mut ours), floor: Some(median(&mut floor)), goal }
    }

    /// A figure that has no floor.
    pub(crate) fn alone(name: &'static str, unit: &'static str, ours: f64, goal: Goal) -> Self {
        Self { name, unit, ours, floor: None, goal }
    }

    /// One JSON object.
    pub(crate) fn json(&self) -> Value {
        let (goal, target) = match self.goal {
            Goal::None => (None, None),
            Goal::RatioAtMost(most) => (Some("ratio-at-most"), Some(most)),
            Goal::RatioAtLeast(least) => (Some("ratio-at-least"), Some(least)),
            Goal::AtMost(most) => (Some("at-most"), Some(most)),
        };
        json!({
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours,
            "floor": self.floor,
            "ratio": self.floor.map(|floor| self.ours / floor),
            "goal": goal,
            "target": target,
        })
    }
}

/// The middle value; not a number if there is none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which `part` of the values are.
pub(crate) fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() as f64 * part) as usize;
    values.get(index.min(values.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
