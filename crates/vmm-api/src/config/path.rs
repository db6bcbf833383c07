//! Where in a document a reader stands.

use std::fmt::Write as _;

/// The longest foreign name repeated in a path.
const MAX_NAME: usize = 64;

/// One step of a path.
#[derive(Clone, Debug)]
enum Step {
    Field(&'static str),
    Foreign(String),
    Item(usize),
}

/// The steps from the root to the value at hand.
#[derive(Clone, Debug, Default)]
pub(crate) struct Path {
    steps: Vec<Step>,
}

impl Path {
    pub(crate) fn enter_field(&mut self, name: &'static str) {
        self.steps.push(Step::Field(name));
    }

    pub(crate) fn enter_foreign(&mut self, name: &str) {
        let mut short: String = name.chars().take(MAX_NAME).collect();
        if short.len() < name.len() {
            short.push('…');
        }
        self.steps.push(Step::Foreign(short));
    }

    pub(crate) fn enter_item(&mut self, index: usize) {
        self.steps.push(Step::Item(index));
    }

    pub(crate) fn leave(&mut self) {
        self.steps.pop();
    }

    /// The path as text: `disks[1].path`, `$` for the root.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        for step in &self.steps {
            let name: &str = match step {
                Step::Field(name) => name,
                Step::Foreign(name) => name,
                Step::Item(index) => {
                    // Writing to a String cannot fail.
                    let _ = write!(text, "[{index}]");
                    continue;
                }
            };
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '…'));
            if !plain || name.is_empty() {
                let _ = write!(text, "[{name:?}]");
                continue;
            }
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(name);
        }
        if text.is_empty() { "$".into() } else { text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders() {
        let mut path = Path::default();
        assert_eq!(path.render(), "$");
        path.enter_field("disks");
        path.enter_item(1);
        path.enter_field("path");
        assert_eq!(path.render(), "disks[1].path");
        path.leave();
        path.enter_foreign("a b");
        assert_eq!(path.render(), "disks[1][\"a b\"]");
        path.leave();
        path.enter_foreign(&"x".repeat(5000));
        assert!(path.render().len() < 100);
    }
}
