//! A look at the raw heads of requests, before hyper reads them. hyper takes lines that end in LF
//! alone, a length that stands twice, and a length beside chunks: two readers of such bytes, a
//! proxy in front and we, may see different requests in them. They are refused here.

/// A head that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A line ends without CR.
    BareLf,
    /// `Content-Length` stands more than once, or is no whole number.
    Length,
    /// `Content-Length` and `Transfer-Encoding` together.
    LengthAndChunks,
    /// The client speaks TLS.
    Tls,
}

impl Fault {
    /// The message for the client.
    pub(super) const fn message(self) -> &'static str {
        match self {
            Self::BareLf => "a line of the request's head ends in LF without CR",
            Self::Length => "Content-Length has to stand once, as one whole number",
            Self::LengthAndChunks => "Content-Length and Transfer-Encoding exclude each other",
            Self::Tls => "this address speaks plain HTTP: begin its URL with http://",
        }
    }
}

/// The place in the bytes of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Within a head.
    #[default]
    Head,
    /// Within a body, this many bytes before its end.
    Body(u64),
    /// Within a chunked body. The connection is closed after this request, so no head follows.
    Chunks,
}

/// Longest beginning of a line that is kept: names and numbers that matter are shorter.
const LINE_BYTES_MAX: usize = 48;

/// Follows the heads of one connection.
#[derive(Debug, Default)]
pub(super) struct Heads {
    place: Place,
    /// The beginning of the current line.
    line: Vec<u8>,
    /// Bytes of the current line.
    line_bytes: u64,
    last: u8,
    /// Lines of the current head.
    lines: u32,
    length: Option<u64>,
    chunks: bool,
}

impl Heads {
    /// True if a head has begun and not ended.
    pub(super) fn in_head(&self) -> bool {
        self.place == Place::Head && (self.lines > 0 || self.line_bytes > 0)
    }

    /// Takes the next bytes of the connection.
    ///
    /// # Errors
    /// The first fault; the connection can't go on.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            match &mut self.place {
                Place::Chunks => return Ok(()),
                Place::Body(left) => {
                    let skipped = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= skipped as u64;
                    bytes = &bytes[skipped..];
                    if *left == 0 {
                        self.place = Place::Head;
                    }
                }
                Place::Head => {
                    self.byte(bytes[0])?;
                    bytes = &bytes[1..];
                }
            }
        }
        Ok(())
    }

    fn byte(&mut self, byte: u8) -> Result<(), Fault> {
        if byte != b'\n' {
            if byte == 0x16 && self.lines == 0 && self.line_bytes == 0 {
                return Err(Fault::Tls);
            }
            if self.line.len() < LINE_BYTES_MAX {
                self.line.push(byte);
            }
            (self.line_bytes, self.last) = (self.line_bytes + 1, byte);
            return Ok(());
        }
        if self.last != b'\r' || self.line_bytes == 0 {
            return Err(Fault::BareLf);
        }
        let is_empty = self.line_bytes == 1;
        let field = self.field();
        self.line.clear();
        (self.line_bytes, self.last) = (0, 0);
        match (is_empty, self.lines) {
            (true, 0) => {} // empty lines before a request count for nothing
            (true, _) => self.end(),
            (false, 0) => self.lines = 1, // the request line
            (false, _) => {
                self.lines += 1;
                self.header(field)?;
            }
        }
        Ok(())
    }

    /// The header of the current line, if it is one that matters.
    fn field(&self) -> Option<Header> {
        let colon = self.line.iter().position(|byte| *byte == b':')?;
        let (name, value) = (&self.line[..colon], &self.line[colon + 1..]);
        if name.eq_ignore_ascii_case(b"transfer-encoding") {
            return Some(Header::Chunks);
        }
        if !name.eq_ignore_ascii_case(b"content-length") {
            return None;
        }
        let is_whole = self.line_bytes as usize == self.line.len();
        let digits = value.trim_ascii();
        let number = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
        let plain = is_whole && !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
        Some(Header::Length(number.filter(|_| plain)))
    }

    fn header(&mut self, field: Option<Header>) -> Result<(), Fault> {
        match field {
            None => return Ok(()),
            Some(Header::Chunks) => self.chunks = true,
            Some(Header::Length(None)) => return Err(Fault::Length),
            Some(Header::Length(Some(_))) if self.length.is_some() => return Err(Fault::Length),
            Some(Header::Length(length)) => self.length = length,
        }
        if self.chunks && self.length.is_some() {
            return Err(Fault::LengthAndChunks);
        }
        Ok(())
    }

    fn end(&mut self) {
        self.place = match (self.chunks, self.length.take()) {
            (true, _) => Place::Chunks,
            (false, None | Some(0)) => Place::Head,
            (false, Some(length)) => Place::Body(length),
        };
        (self.lines, self.chunks) = (0, false);
    }
}

enum Header {
    /// `Content-Length`, if its value is a number.
    Length(Option<u64>),
    /// `Transfer-Encoding`.
    Chunks,
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    const POST: &str = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n";

    /// The verdict is the same however the bytes are cut.
    fn verdict(text: &str) -> Result<bool, Fault> {
        let run = |size: usize| {
            let mut heads = Heads::default();
            text.as_bytes().chunks(size).try_for_each(|bytes| heads.take(bytes))?;
            Ok(heads.in_head())
        };
        let whole = run(text.len());
        for size in 1..8 {
            assert_eq!(run(size), whole, "{text:?} in pieces of {size}");
        }
        whole
    }

    #[test]
    fn plain_requests_pass_one_behind_the_other() {
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(9000));
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\na\nb\nc\r\n0\r\n";
        for text in [
            GET.to_owned(),
            format!("{POST}a\nb\nc"),
            format!("\r\n{POST}\n\n\n\n\n{GET}{POST}12345"),
            format!("{long}{GET}"),
            chunked.to_owned(),
        ] {
            assert_eq!(verdict(&text), Ok(false), "{text:?}");
        }
        assert_eq!(verdict("GET / HT"), Ok(true));
        assert_eq!(verdict("GET / HTTP/1.1\r\nHost: x\r\n"), Ok(true));
        assert_eq!(verdict(&format!("{POST}1234")), Ok(false), "that is the body");
    }

    #[test]
    fn bytes_with_two_readings_are_faults() {
        let with = |lines: &str| format!("POST / HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
        for (text, fault) in [
            (with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), Fault::LengthAndChunks),
            (with("transfer-encoding: x\r\ncontent-length: 5\r\n"), Fault::LengthAndChunks),
            (with("Content-Length: 5\r\nContent-Length: 5\r\n"), Fault::Length),
            (with("Content-Length: 5, 5\r\n"), Fault::Length),
            (with("Content-Length: +5\r\n"), Fault::Length),
            (with("Content-Length:\r\n"), Fault::Length),
            (with(&format!("Content-Length: {}5\r\n", "0".repeat(60))), Fault::Length),
            (with("X: y\n"), Fault::BareLf),
            ("GET / HTTP/1.1\nHost: x\n\n".to_owned(), Fault::BareLf),
            ("\nGET / HTTP/1.1\r\n".to_owned(), Fault::BareLf),
            (format!("{POST}12345GET / HTTP/1.1\n"), Fault::BareLf),
            ("\u{16}\u{3}\u{1}".to_owned(), Fault::Tls),
        ] {
            assert_eq!(verdict(&text), Err(fault), "{text:?}");
        }
    }
}
