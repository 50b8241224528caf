//! Helpers for logs and errors about a peer: its words made harmless, and its repetitions counted.

use std::fmt::{self, Write as _};
use std::time::{Duration, Instant};

/// Characters of a peer's text that are shown.
pub const UNTRUSTED_CHARS_MAX: usize = 200;

/// Text that a peer chose, for people: what could move a cursor, end a line, hide or reorder other
/// text is escaped as Rust writes it, and text beyond [`UNTRUSTED_CHARS_MAX`] characters is cut.
#[derive(Clone, Copy, Debug)]
pub struct Untrusted<'a>(pub &'a str);

impl fmt::Display for Untrusted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        for character in chars.by_ref().take(UNTRUSTED_CHARS_MAX) {
            if is_harmless(character) {
                f.write_char(character)?;
            } else {
                write!(f, "{}", character.escape_unicode())?;
            }
        }
        if chars.next().is_some() { f.write_str("...") } else { Ok(()) }
    }
}

/// Neither a control (C0, DEL, C1), nor a mark of direction, nor a separator of lines, nor one of
/// the characters that take no room.
fn is_harmless(character: char) -> bool {
    !character.is_control()
        && !matches!(character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// Rate limit of one kind of message: a burst, and then one in each period, with
/// the number of those that were left out. It knows no clock.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    period: Duration,
    /// Messages that may be written at once.
    left: u32,
    /// The time from which `left` grows.
    since: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// `burst` messages at once, and one more in each `period`.
    #[must_use]
    pub const fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, left: burst, since: None, suppressed: 0 }
    }

    /// A message at `now`: the number of messages that were left out before it if it is to be
    /// written, `None` if it is left out too.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let periods = now.saturating_duration_since(since).as_nanos() / self.period.as_nanos();
        if periods > 0 {
            let grown = u128::from(self.left).saturating_add(periods);
            self.left = u32::try_from(grown).unwrap_or(u32::MAX).min(self.burst);
            let whole = u32::try_from(periods).unwrap_or(u32::MAX);
            self.since = Some(self.period.checked_mul(whole).map_or(now, |time| since + time));
        }
        if self.left == 0 {
            self.suppressed += 1;
            return None;
        }
        if self.left == self.burst {
            self.since = Some(now);
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// Ten at once, one more in ten seconds: for what a peer can bring about as often as it likes.
impl Default for RateLimit {
    fn default() -> Self {
        Self::new(10, Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_text_can_neither_move_a_cursor_nor_end_a_line() {
        let text = "\u{1b}[2J\u{1b}[31mred\r\n2026 ERROR forged\u{9b}1m \u{202e}txet\u{2069}\u{7f}";
        let shown = Untrusted(text).to_string();
        let expected = "\\u{1b}[2J\\u{1b}[31mred\\u{d}\\u{a}2026 ERROR forged\\u{9b}1m \
                        \\u{202e}txet\\u{2069}\\u{7f}";
        assert_eq!(shown, expected);
        for code in (0..=0x20_u32).chain(0x7f..=0x9f).chain(0x2028..=0x202e).chain(0x2066..=0x2069)
        {
            let character = char::from_u32(code).unwrap();
            let shown = Untrusted(character.encode_utf8(&mut [0; 4])).to_string();
            assert_eq!(shown.contains(character), character == ' ', "{code:x}: {shown}");
        }
        assert_eq!(Untrusted("Grüße, 世界 \\").to_string(), "Grüße, 世界 \\");
    }

    #[test]
    fn a_peers_text_is_cut() {
        let long = "\n".repeat(5000);
        let shown = Untrusted(&long).to_string();
        assert_eq!(shown.matches("\\u{a}").count(), UNTRUSTED_CHARS_MAX);
        assert!(shown.ends_with("..."), "{shown}");
        let fits = "x".repeat(UNTRUSTED_CHARS_MAX);
        assert_eq!(Untrusted(&fits).to_string(), fits);
    }

    #[test]
    fn a_flood_is_counted_and_not_written() {
        let mut limit = RateLimit::new(3, Duration::from_secs(10));
        let start = Instant::now();
        let written = (0..1000).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(written, 3);
        assert_eq!(limit.admit(start + Duration::from_secs(9)), None);
        assert_eq!(limit.admit(start + Duration::from_secs(10)), Some(998));
        assert_eq!(limit.admit(start + Duration::from_secs(11)), None);
        // A quiet hour brings back the burst, and no more.
        let later = start + Duration::from_secs(3600);
        let written = (0..1000).filter(|_| limit.admit(later).is_some()).count();
        assert_eq!(written, 3);
    }
}
