//! `--draft`: who drafts, and when rows go up.

use crate::InputError;

/// Drafting mode of a request. The answer does not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DraftMode {
    /// Every drafter that there is, as far as it pays by what is measured; zero drafts if none do.
    #[default]
    Auto,
    /// No drafts: one row a round trip.
    Off,
    /// The trained drafter's likeliest token, and so on: a chain.
    Chain,
    /// The trained drafter's likeliest tokens and lookup in one tree.
    Tree,
    /// Lookup alone.
    Lookup,
    /// As `Tree`, and while its rows are away more go up, below what is likely or was right so
    /// far, where that pays by what is measured.
    Stream,
    /// As `Stream`, with as many rows away as there may be, whether it pays or not.
    All,
}

impl DraftMode {
    /// All modes.
    pub const ALL: [Self; 7] =
        [Self::Auto, Self::Off, Self::Chain, Self::Tree, Self::Lookup, Self::Stream, Self::All];

    /// The name in flags and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Chain => "chain",
            Self::Tree => "tree",
            Self::Lookup => "lookup",
            Self::Stream => "stream",
            Self::All => "all",
        }
    }

    /// True if rows may go up before earlier verdicts are back.
    #[must_use]
    pub const fn streams(self) -> bool {
        matches!(self, Self::Auto | Self::Stream | Self::All)
    }

    /// True if what followed the same words before is drafted; `has_trained` says if there is a
    /// trained drafter.
    #[must_use]
    pub const fn looks_up(self, has_trained: bool) -> bool {
        match self {
            Self::Off => false,
            Self::Chain => !has_trained,
            _ => true,
        }
    }

    /// True if the trained drafter is asked if there is one.
    #[must_use]
    pub const fn asks_trained(self) -> bool {
        !matches!(self, Self::Off | Self::Lookup)
    }

    /// True if it asks for a trained drafter by name.
    #[must_use]
    pub const fn wants_trained(self) -> bool {
        matches!(self, Self::Chain | Self::Tree | Self::Stream | Self::All)
    }
}

impl std::str::FromStr for DraftMode {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        // The others are for comparisons, and nobody is pointed to them.
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            InputError::field("draft", format!("{text:?} is none of auto, off, lookup"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_others_are_refused_by_name() {
        for mode in DraftMode::ALL {
            assert_eq!(mode.name().parse::<DraftMode>().unwrap(), mode);
        }
        let refused = |text: &str| text.parse::<DraftMode>().unwrap_err().to_string();
        assert!(refused("fast").ends_with("\"fast\" is none of auto, off, lookup"));
    }
}
