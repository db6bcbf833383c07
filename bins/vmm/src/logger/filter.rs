//! Levels of single modules.

use std::str::FromStr;

use log::LevelFilter;

/// Levels of modules, which go before the level of all the others: `vmm_pci=debug,vmm_api::http=trace`. A module
/// stands for those below it, too; the longest name that fits decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// The longest names first.
    modules: Vec<(String, LevelFilter)>,
}

impl Filter {
    /// The level of `module`, if it is one of those.
    pub(super) fn level_of(&self, module: &str) -> Option<LevelFilter> {
        let fits = |name: &str| {
            module.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        self.modules.iter().find(|(name, _)| fits(name)).map(|(_, level)| *level)
    }

    /// The most that any of them logs.
    pub(super) fn most(&self) -> LevelFilter {
        self.modules.iter().map(|(_, level)| *level).max().unwrap_or(LevelFilter::Off)
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let mut modules = text.split(',').map(parse).collect::<Result<Vec<_>, _>>()?;
        modules.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        Ok(Self { modules })
    }
}

fn parse(part: &str) -> Result<(String, LevelFilter), FilterError> {
    let wrong = || FilterError(part.to_owned());
    let (name, level) = part.split_once('=').ok_or_else(wrong)?;
    let is_name =
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | ':'));
    let level = level.parse().ok().filter(|_| is_name).ok_or_else(wrong)?;
    Ok((name.to_owned(), level))
}

/// This is not a module and its level.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected MODULE=LEVEL with a level of off, error, warn, info, debug or trace, found {0:?}")]
pub struct FilterError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_module_that_fits_decides() {
        let filter: Filter = "vmm=error,vmm_pci=debug,vmm_pci::msix=trace,vmm_api=Off".parse().unwrap();
        for (module, level) in [
            ("vmm_pci", Some(LevelFilter::Debug)),
            ("vmm_pci::slots", Some(LevelFilter::Debug)),
            ("vmm_pci::msix", Some(LevelFilter::Trace)),
            ("vmm_pci::msix::x", Some(LevelFilter::Trace)),
            ("vmm_pci::msix2", Some(LevelFilter::Debug)),
            ("vmm_pcie", None),
            ("vmm", Some(LevelFilter::Error)),
            ("vmm::run", Some(LevelFilter::Error)),
            ("vmm_api::http", Some(LevelFilter::Off)),
            ("", None),
        ] {
            assert_eq!(filter.level_of(module), level, "{module}");
        }
        assert_eq!(filter.most(), LevelFilter::Trace);
        assert_eq!(Filter::default().most(), LevelFilter::Off);
    }

    #[test]
    fn what_is_no_filter_is_refused_by_name() {
        for text in ["", "vmm_pci", "vmm_pci=", "vmm_pci=loud", "=debug", "a b=debug", "vmm_pci=debug,"] {
            let part = text.rsplit(',').next().unwrap();
            assert_eq!(text.parse::<Filter>(), Err(FilterError(part.to_owned())), "{text}");
        }
    }
}
