//! Rust, read as far as the rules need: a scan, not a parser. It knows comments, strings, braces,
//! attributes, `mod` and `fn`; it does not know macros, so a brace inside a macro's own syntax
//! counts like any other.

use std::ops::Range;

/// A file, taken apart. `code` and `comments` have the same offsets as the text: what does not
/// belong to them is blank.
pub(crate) struct Source {
    /// Without comments and without the contents of strings.
    pub(crate) code: String,
    /// Comments alone.
    pub(crate) comments: String,
    /// `mod name;`
    pub(crate) modules: Vec<Module>,
    /// `fn name .. { .. }`
    pub(crate) functions: Vec<Function>,
    /// Bodies of `#[cfg(test)] mod name { .. }`.
    pub(crate) tests: Vec<Range<usize>>,
}

/// A module that stands in a file of its own.
pub(crate) struct Module {
    /// Names of the inline modules around it, then its own.
    pub(crate) path: Vec<String>,
    pub(crate) offset: usize,
    /// The attributes in front, as written.
    pub(crate) attributes: String,
}

/// A function with a body.
pub(crate) struct Function {
    pub(crate) name: String,
    /// From `fn` to the closing brace.
    pub(crate) span: Range<usize>,
}

impl Source {
    pub(crate) fn new(text: &str) -> Self {
        let (code, comments) = mask(text);
        let mut source =
            Self { code, comments, modules: Vec::new(), functions: Vec::new(), tests: Vec::new() };
        source.find_items(text);
        source
    }

    /// True if an offset lies in an inline module of tests.
    pub(crate) fn is_test(&self, offset: usize) -> bool {
        self.tests.iter().any(|span| span.contains(&offset))
    }

    fn find_items(&mut self, text: &str) {
        let code = std::mem::take(&mut self.code);
        let mut attributes = String::new();
        // Inline modules that are open: name and end.
        let mut open: Vec<(String, usize)> = Vec::new();
        let mut at = 0;
        while let Some(token) = next_token(&code, at) {
            open.retain(|(_, end)| *end > token.start);
            at = token.end;
            match &code[token.clone()] {
                "#" if code[at..].starts_with('[') => {
                    let end = closing(&code, at).unwrap_or(code.len());
                    attributes.push_str(&text[token.start..end]);
                    at = end;
                    continue;
                }
                // What may stand between an attribute and its item.
                "pub" | "crate" | "super" | "in" | "(" | ")" | "unsafe" | "async" | "const"
                | "extern" => continue,
                word @ ("mod" | "fn") => {
                    let Some(name) = next_token(&code, at).filter(|name| is_word(&code, name))
                    else {
                        continue;
                    };
                    at = name.end;
                    let name = code[name].to_owned();
                    if word == "fn" {
                        self.add_function(&code, name, token.start);
                    } else {
                        self.add_module(&code, name, token.start, at, &attributes, &mut open);
                    }
                }
                _ => {}
            }
            attributes.clear();
        }
        self.code = code;
    }

    fn add_function(&mut self, code: &str, name: String, start: usize) {
        // The body begins at the first brace outside of parentheses; `;` means that there is none.
        let mut depth = 0usize;
        for (at, byte) in code.bytes().enumerate().skip(start) {
            match byte {
                b'(' | b'[' => depth += 1,
                b')' | b']' => depth = depth.saturating_sub(1),
                b';' if depth == 0 => return,
                b'{' if depth == 0 => {
                    let end = closing(code, at).unwrap_or(code.len());
                    self.functions.push(Function { name, span: start..end });
                    return;
                }
                _ => {}
            }
        }
    }

    fn add_module(
        &mut self,
        code: &str,
        name: String,
        offset: usize,
        after: usize,
        attributes: &str,
        open: &mut Vec<(String, usize)>,
    ) {
        let Some(token) = next_token(code, after) else {
            return;
        };
        match &code[token.clone()] {
            ";" => {
                let mut path: Vec<String> = open.iter().map(|(name, _)| name.clone()).collect();
                path.push(name);
                self.modules.push(Module { path, offset, attributes: attributes.to_owned() });
            }
            "{" => {
                let end = closing(code, token.start).unwrap_or(code.len());
                if attributes.contains("cfg(test)") {
                    self.tests.push(token.start..end);
                }
                open.push((name, end));
            }
            _ => {}
        }
    }
}

/// The next word or single other character.
fn next_token(code: &str, from: usize) -> Option<Range<usize>> {
    let start = from + code[from..].find(|c: char| !c.is_whitespace())?;
    let rest = &code[start..];
    let word = rest.find(|c: char| !is_word_char(c)).unwrap_or(rest.len());
    let first = rest.chars().next().map_or(1, char::len_utf8);
    Some(start..start + word.max(first))
}

fn is_word(code: &str, token: &Range<usize>) -> bool {
    code[token.clone()].starts_with(is_word_char)
}

pub(crate) fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The offset after the bracket that closes the one at `open`.
fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// The line of an offset, from 1.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count()
}

/// Code and comments, each with blanks in place of the other; strings keep their quotes only.
fn mask(text: &str) -> (String, String) {
    let bytes = text.as_bytes();
    let blank = |byte: u8| if byte == b'\n' { b'\n' } else { b' ' };
    let mut code: Vec<u8> = bytes.to_vec();
    let mut comments: Vec<u8> = bytes.iter().map(|&byte| blank(byte)).collect();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let (kind, length) = if rest.starts_with("//") {
            (Kind::Comment, rest.find('\n').unwrap_or(rest.len()))
        } else if rest.starts_with("/*") {
            (Kind::Comment, block_comment(rest))
        } else if let Some(length) = literal(text, at) {
            (Kind::Literal, length)
        } else {
            (Kind::Code, rest.chars().next().map_or(1, char::len_utf8))
        };
        let span = at..at + length;
        match kind {
            Kind::Comment => {
                comments[span.clone()].copy_from_slice(&bytes[span.clone()]);
                code[span].iter_mut().for_each(|byte| *byte = blank(*byte));
            }
            Kind::Literal => {
                let inner = span.start + 1..span.end.saturating_sub(1).max(span.start + 1);
                code[inner].iter_mut().for_each(|byte| *byte = blank(*byte));
            }
            Kind::Code => {}
        }
        at += length;
    }
    let text = |bytes| String::from_utf8(bytes).expect("whole characters are blanked");
    (text(code), text(comments))
}

enum Kind {
    Code,
    Comment,
    Literal,
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while at < rest.len() {
        if rest.as_bytes()[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.as_bytes()[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of the string or character at `at`, if one begins there.
fn literal(text: &str, at: usize) -> Option<usize> {
    let rest = &text[at..];
    match rest.as_bytes()[0] {
        b'"' => Some(quoted(rest, '"')),
        b'\'' => {
            let mut chars = rest[1..].chars();
            let first = chars.next()?;
            // A lifetime has no quote after its first character.
            (first == '\\' || chars.next() == Some('\'')).then(|| quoted(rest, '\''))
        }
        b'r' => {
            let before = text[..at].chars().next_back();
            // `br".."` begins at its `b`; anything else before makes it the end of a word.
            if before.is_some_and(|c| is_word_char(c) && c != 'b' && c != 'c') {
                return None;
            }
            let hashes = rest[1..].bytes().take_while(|&byte| byte == b'#').count();
            if rest.as_bytes().get(1 + hashes) != Some(&b'"') {
                return None;
            }
            let end = format!("\"{}", "#".repeat(hashes));
            let body = 2 + hashes;
            Some(rest[body..].find(&end).map_or(rest.len(), |found| body + found + end.len()))
        }
        _ => None,
    }
}

/// The length of a literal that begins and ends with `quote`, escapes passed over.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}
