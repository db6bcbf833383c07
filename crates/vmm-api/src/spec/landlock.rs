//! Paths of the sandbox.

use super::check::Checker;
use super::{GrantedPath, LandlockSpec, PathAccess};
use crate::config::VmConfig;

pub(super) fn check(config: &VmConfig, checker: &mut Checker) -> LandlockSpec {
    let configs = config.landlock_rules.as_deref().unwrap_or_default();
    let mut rules = Vec::new();
    for (index, rule) in configs.iter().enumerate() {
        let path = format!("landlock_rules[{index}]");
        if rule.path.as_os_str().is_empty() {
            checker.invalid(format!("{path}.path"), "must not be empty");
        }
        match access(&rule.access) {
            Some(access) => rules.push(GrantedPath { path: rule.path.clone(), access }),
            None => checker
                .invalid(format!("{path}.access"), format!("expected r, w or rw, found {:?}", rule.access)),
        }
    }
    LandlockSpec { enable: config.landlock_enable, rules }
}

/// Each letter in any order and at least one, as in the contract.
fn access(word: &str) -> Option<PathAccess> {
    let known = !word.is_empty() && word.chars().all(|letter| matches!(letter, 'r' | 'w'));
    known.then(|| PathAccess { read: word.contains('r'), write: word.contains('w') })
}
