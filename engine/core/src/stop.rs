//! Stop strings over streamed text.
//!
//! Text that may be the beginning of a stop string is held back until the next text decides, so
//! nothing of a stop string is ever shown, however tokens cut it. The result depends on the text
//! alone, not on how it is cut: of several stop strings the one that is complete first counts.

use crate::error::InputError;

/// Most stop strings of a request.
pub(crate) const STOP_STRINGS_MAX: usize = 64;
/// Most bytes of all stop strings of a request together.
pub(crate) const STOPS_BYTES_MAX: usize = 4096;
/// Longest stop string, in bytes.
pub(crate) const STOP_BYTES_MAX: usize = 256;

/// Watches a text for stop strings.
#[derive(Debug)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// The beginning of a stop string, perhaps; and while in `push`, the new text after it.
    held: String,
    /// Text that the last call returned.
    shown: String,
    stopped: bool,
}

impl StopStrings {
    /// Watches for these; none is fine.
    ///
    /// # Errors
    /// If there are more than [`STOP_STRINGS_MAX`], or one is empty or longer than
    /// [`STOP_BYTES_MAX`], or they have more than [`STOPS_BYTES_MAX`] together.
    pub(crate) fn new(stops: Vec<String>) -> Result<Self, InputError> {
        let wrong = |reason: String| Err(InputError::field("stop", reason));
        let strings = stops.len();
        if strings > STOP_STRINGS_MAX {
            return wrong(format!("{strings} strings is not in 0..={STOP_STRINGS_MAX} strings"));
        }
        for bytes in stops.iter().map(String::len) {
            if !(1..=STOP_BYTES_MAX).contains(&bytes) {
                let range = format!("1..={STOP_BYTES_MAX} bytes");
                return wrong(format!("a string of {bytes} bytes is not in {range}"));
            }
        }
        let bytes: usize = stops.iter().map(String::len).sum();
        if bytes > STOPS_BYTES_MAX {
            return wrong(format!("{bytes} bytes in all is not in 0..={STOPS_BYTES_MAX} bytes"));
        }
        Ok(Self { stops, held: String::new(), shown: String::new(), stopped: false })
    }

    /// Takes the next piece of the text; gives the text to show, which may be of earlier calls.
    /// After a stop string all further text is dropped.
    pub(crate) fn push(&mut self, text: &str) -> &str {
        self.shown.clear();
        if !self.stopped {
            self.held.push_str(text);
            let first = self
                .stops
                .iter()
                .filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)))
                .min();
            let show = match first {
                Some((_, start)) => start,
                None => self.held.len() - self.undecided(),
            };
            self.shown.push_str(&self.held[..show]);
            self.held.drain(..show);
            self.stopped = first.is_some();
        }
        &self.shown
    }

    /// Text that is held back when the text ends without a stop string; nothing after one.
    pub(crate) fn finish(&mut self) -> &str {
        self.shown.clear();
        if !self.stopped {
            self.shown.push_str(&self.held);
        }
        self.held.clear();
        &self.shown
    }

    /// True if a stop string is complete: the answer ends there.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes at the end of `held` that a stop string begins with; the most of them.
    fn undecided(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        (from..self.held.len())
            .filter_map(|at| self.held.get(at..))
            .find(|tail| self.stops.iter().any(|stop| stop.starts_with(tail)))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn watch(stops: &[&str]) -> StopStrings {
        StopStrings::new(stops.iter().map(ToString::to_string).collect()).unwrap()
    }

    /// All that is shown of these pieces, and whether it stopped.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = watch(stops);
        let mut all = String::new();
        for piece in pieces {
            all.push_str(watch.push(piece));
            if watch.is_stopped() {
                break;
            }
        }
        all.push_str(watch.finish());
        (all, watch.is_stopped())
    }

    #[test]
    fn nothing_of_a_stop_string_leaks() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), ("a ".into(), true));
        assert_eq!(run(&["END"], &["a E", "N", "X b"]), ("a ENX b".into(), false));
        assert_eq!(run(&["END"], &["a EN"]), ("a EN".into(), false));
        assert_eq!(run(&["🙂🙃"], &["x🙂", "🙂", "🙃y"]), ("x🙂".into(), true));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&[], &["as", " it is"]), ("as it is".into(), false));
        let mut watch = watch(&["\n\n"]);
        assert_eq!(watch.push("one\n"), "one");
        assert_eq!(watch.push("\ntwo"), "");
        assert_eq!(watch.push("three"), "");
        assert_eq!(watch.finish(), "");
    }

    #[test]
    fn the_first_to_be_complete_counts() {
        assert_eq!(run(&["abcd", "bc"], &["abcd"]), ("a".into(), true));
        assert_eq!(run(&["abcd", "bc"], &["a", "b", "c", "d"]), ("a".into(), true));
        assert_eq!(run(&["bc", "abc"], &["xabc"]), ("x".into(), true));
    }

    #[test]
    fn limits_are_named() {
        let refuse = |stops: Vec<String>| StopStrings::new(stops).unwrap_err().to_string();
        assert_eq!(refuse(vec!["a".into(); 65]), "stop: 65 strings is not in 0..=64 strings");
        let bytes = refuse(vec!["a".repeat(256); 17]);
        assert_eq!(bytes, "stop: 4352 bytes in all is not in 0..=4096 bytes");
        let empty = refuse(vec!["a".into(), String::new()]);
        assert_eq!(empty, "stop: a string of 0 bytes is not in 1..=256 bytes");
        assert!(refuse(vec!["x".repeat(1 << 20)]).contains("1048576 bytes"));
        assert!(StopStrings::new(vec!["é".repeat(128); 4]).is_ok());
    }

    proptest! {
        /// Any cuts of a text show the same: all before the stop that ends first.
        #[test]
        fn cuts_do_not_matter(
            text in "[abé🙂]{0,24}", stops in prop::collection::vec("[abé🙂]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..64, 0..6),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let ends = stops.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at)));
            let first = ends.min();
            let expected = (text[..first.map_or(text.len(), |f| f.1)].to_owned(), first.is_some());
            let mut cuts: Vec<usize> =
                cuts.into_iter().filter(|&at| text.is_char_boundary(at)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
            prop_assert_eq!(run(&stops, &pieces), expected);
        }
    }
}
