//! The model's chat template: a Jinja text from the checkpoint, run in a sandbox.
//!
//! Templates come with model files, which may be hostile, and run over text of users. They see no
//! file, no environment variable and no clock but the time that the caller passes; fuel bounds
//! their time and memory, and there is a limit on recursion and on the output. The globals and
//! whitespace rules are those that templates are written for: `raise_exception`, `strftime_now`,
//! `tojson` as Python writes it, `trim_blocks`, `lstrip_blocks`, Python's methods on strings.
//!
//! Fuel does not bound everything: minijinja's lists are lazy, so a template can double one sixty
//! times for next to nothing (`x + x`, `x * 99999999`) and then compare or print it, which takes
//! for ever. Messages are plain strings and can't do that, only the author of the model's files
//! can.
//! Therefore each rendering has a thread and a limit of its own (see [`super::limited`]).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hat_core::request::Message;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::guard::Guard;
use super::limited::{Limited, Unfinished};
use super::{TEMPLATE_BYTES_MAX, TEXT_BYTES, TEXT_BYTES_MAX, TokenError, python, within};

/// One unit pays for one instruction or 64 bytes: bounds time (tens of milliseconds) and memory.
const FUEL: u64 = 250_000;
const RECURSION_MAX: usize = 100;
/// Begins the message of an error that the template itself raised.
const RAISED: &str = "raise_exception: ";

/// Options of rendering a conversation.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// True if the prompt ends with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Seconds since 1970 (UTC), for templates that write the date.
    pub unix_seconds: u64,
    /// `chat_template_kwargs` of the request: `enable_thinking` (true or false) and `date_string`
    /// (a text) are known, others are refused.
    pub kwargs: serde_json::Map<String, serde_json::Value>,
}

impl ChatOptions {
    /// An answer is wanted, at this time.
    #[must_use]
    pub fn at(unix_seconds: u64) -> Self {
        Self { add_generation_prompt: true, unix_seconds, kwargs: serde_json::Map::new() }
    }
}

/// A parsed template. Compiled once, rendered by any number of threads.
pub(super) struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    limited: Limited,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    pub(super) fn new(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
        limit: Duration,
    ) -> Result<Self, TokenError> {
        within("chat template in bytes", source.len(), TEMPLATE_BYTES_MAX)?;
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TokenError::TemplateSyntax(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(python::call);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        environment.add_filter("tojson", to_json);
        environment.add_filter("join", python::join);
        environment.add_test("iterable", python::is_iterable);
        environment.add_test("sequence", python::is_sequence);
        environment
            .add_template_owned("chat_template", without_generation(source))
            .map_err(|e| TokenError::TemplateSyntax(describe(&e)))?;
        let owned = |token: Option<&str>| token.unwrap_or_default().to_owned();
        Ok(Self {
            environment: Arc::new(environment),
            limited: Limited::new(limit),
            bos_token: owned(bos_token),
            eos_token: owned(eos_token),
        })
    }

    /// The prompt, with control tokens in contents broken by `guard`.
    pub(super) fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
        guard: &Guard,
    ) -> Result<String, TokenError> {
        if messages.is_empty() {
            return Err(TokenError::NoMessages);
        }
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        within(TEXT_BYTES, bytes, TEXT_BYTES_MAX)?;
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                Value::from(BTreeMap::from([
                    ("role", Value::from(message.role.name())),
                    ("content", Value::from(guard.guard(&message.content))),
                ]))
            })
            .collect();
        let seconds = options.unix_seconds;
        let mut context = BTreeMap::from([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
            ("bos_token", Value::from(&self.bos_token)),
            ("eos_token", Value::from(&self.eos_token)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            (
                "strftime_now",
                Value::from_function(move |format: String| strftime(&format, seconds)),
            ),
        ]);
        add_kwargs(&mut context, options, guard)?;
        let environment = Arc::clone(&self.environment);
        self.limited.run(move || rendered(&environment, context)).map_err(|why| match why {
            Unfinished::Hangs => TokenError::TemplateHangs,
            Unfinished::Failed(reason) => TokenError::Template(reason),
        })?
    }
}

/// The template with each `generation` tag as an empty comment: it marks what a model is trained
/// on, says nothing of a prompt, and trims the same spaces.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        out.push_str(before);
        let tag = after.split_once("%}").filter(|(tag, _)| {
            matches!(tag.trim_matches(['-', '+', ' ']), "generation" | "endgeneration")
        });
        rest = match tag {
            Some((tag, behind)) => {
                let mark = |c: Option<char>| c.filter(|c| matches!(c, '-' | '+'));
                out.push_str("{#");
                out.extend(mark(tag.chars().next()));
                out.extend(mark(tag.chars().last()));
                out.push_str("#}");
                behind
            }
            None => {
                out.push_str("{%");
                after
            }
        };
    }
    out + rest
}

fn rendered(
    environment: &Environment<'_>,
    context: BTreeMap<&'static str, Value>,
) -> Result<String, TokenError> {
    let mut out = Bounded(Vec::new());
    let template = environment.get_template("chat_template").expect("added in new");
    match template.render_captured_to(context, &mut out) {
        Ok(_) => Ok(String::from_utf8(out.0).expect("templates write strings")),
        Err(error) => match error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
            Some(message) => Err(TokenError::Refused(short(message))),
            None => Err(TokenError::Template(describe(&error))),
        },
    }
}

fn add_kwargs(
    context: &mut BTreeMap<&'static str, Value>,
    options: &ChatOptions,
    guard: &Guard,
) -> Result<(), TokenError> {
    for (name, value) in &options.kwargs {
        let (field, value, expected) = match name.as_str() {
            "enable_thinking" => {
                ("enable_thinking", value.as_bool().map(Value::from), "true or false")
            }
            "date_string" => {
                let text = value.as_str().filter(|text| text.len() <= 64);
                ("date_string", text.map(|text| Value::from(guard.guard(text))), "short text")
            }
            _ => return Err(TokenError::UnknownOption(name.chars().take(64).collect())),
        };
        context.insert(field, value.ok_or(TokenError::OptionType { field, expected })?);
    }
    Ok(())
}

/// The error in one line. The template's own lines are not shown: they are of no use to the
/// person whose messages it fails on.
fn describe(error: &Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let kind = match error.kind() {
        ErrorKind::OutOfFuel => "takes too long or makes too much text".to_owned(),
        kind => kind.to_string(),
    };
    let detail = error.detail().map_or_else(String::new, |detail| format!(": {}", short(detail)));
    format!("{line}{kind}{detail}")
}

/// A template may raise megabytes.
fn short(message: &str) -> String {
    message.chars().take(500).collect()
}

/// Output with a limit.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(io::Error::other("the prompt grows over the limit"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `tojson` as templates expect it: Python's `json.dumps` without escapes for HTML or non-ASCII,
/// `", "` and `": "` between items on one line, `indent` by that many spaces.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.get::<Option<bool>>("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(value, indent.map(|width| width.min(16)), 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn write_json(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    let refuse = |reason: &str| Err(Error::new(ErrorKind::BadSerialization, reason.to_owned()));
    if depth > RECURSION_MAX || out.len() > TEXT_BYTES_MAX {
        return refuse("tojson: value too deep or too large");
    }
    let new_line = |depth: usize, out: &mut String| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            out.push_str(&serde_json::Value::from(text).to_string());
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut count = 0;
            for item in value.try_iter()? {
                out.push_str(if count > 0 { comma } else { "" });
                count += 1;
                new_line(depth + 1, out);
                write_json(&item, indent, depth + 1, out)?;
            }
            if count > 0 {
                new_line(depth, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            let mut count = 0;
            for key in value.try_iter()? {
                out.push_str(if count > 0 { comma } else { "" });
                count += 1;
                new_line(depth + 1, out);
                out.push_str(&serde_json::Value::from(key.to_string()).to_string());
                out.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, out)?;
            }
            if count > 0 {
                new_line(depth, out);
            }
            out.push('}');
        }
        _ => return refuse("tojson: value has no JSON form"),
    }
    Ok(())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// The directives of C's `strftime` that templates use, in UTC; others stay as they are.
fn strftime(format: &str, unix_seconds: u64) -> String {
    let days = unix_seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{:02}", unix_seconds % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day since 1970, by counting years and months.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    // Whole cycles of 400 years first, so any input ends soon.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use hat_core::request::Role;

    use super::*;

    #[test]
    fn dates_match_known_days() {
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(
            strftime("%A %e %B %Y %H:%M:%S %y%%", 951_827_696),
            "Tuesday 29 February 2000 12:34:56 00%"
        );
        assert_eq!(strftime("%Y-%m-%d %a %q%", 1_795_305_600), "2026-11-22 Sun %q%");
        assert_eq!(civil(146_097 * 3), (3170, 1, 1));
    }

    #[test]
    fn tags_of_training_are_left_out() {
        let render = |source: &str| {
            let template = ChatTemplate::new(source, None, None, Duration::from_secs(600)).unwrap();
            let messages = [Message::new(Role::User, "hi")];
            template.render(&messages, &ChatOptions::at(0), &Guard::new(BTreeMap::new())).unwrap()
        };
        let tagged = "{% for m in messages %}\n  {% generation %}\n<{{ m.content }}>\n\
                      {%- endgeneration -%}\n |{% endfor %}{%+ if true %}.{% endif %}";
        assert_eq!(render(tagged), "<hi>|.");
        assert_eq!(render("{{ 'a {% b' }}{%- set x = 1 -%} {{ x }}"), "a {% b1");
    }

    /// Each test's result is Jinja2's.
    #[test]
    fn tests_of_kinds_are_jinja_s() {
        let render = |source: &str| {
            let template = ChatTemplate::new(source, None, None, Duration::from_secs(600)).unwrap();
            let messages = [Message::new(Role::User, "hi")];
            template.render(&messages, &ChatOptions::at(0), &Guard::new(BTreeMap::new())).unwrap()
        };
        for (value, iterable, sequence) in [
            ("tools", "False", "False"),
            ("none", "False", "False"),
            ("1", "False", "False"),
            ("true", "False", "False"),
            ("'a'", "True", "True"),
            ("''", "True", "True"),
            ("[]", "True", "True"),
            ("messages", "True", "True"),
            ("{'a': 1}", "True", "True"),
        ] {
            let source = format!("{{{{ {value} is iterable }}}} {{{{ {value} is sequence }}}}");
            assert_eq!(render(&source), format!("{iterable} {sequence}"), "{value}");
        }
        let guarded = "{% if tools is iterable and tools | length > 0 %}t{% endif %}{{ 'x' }}";
        assert_eq!(render(guarded), "x");
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let env = Environment::new();
        let render = |source: &str| {
            let mut env = env.clone();
            env.add_filter("tojson", to_json);
            env.render_str(source, ()).map_err(|e| e.to_string())
        };
        assert_eq!(
            render(r#"{{ {"a": [1, 2.5, none, true], "b": "<é'\n\">", "c": {}} | tojson }}"#)
                .unwrap(),
            r#"{"a": [1, 2.5, null, true], "b": "<é'\n\">", "c": {}}"#
        );
        assert_eq!(
            render("{{ {'a': [1, {}], 'b': []} | tojson(indent=2) }}").unwrap(),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
        assert!(render("{{ 1 | tojson(sort=1) }}").is_err());
    }
}
