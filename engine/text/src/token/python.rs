//! Python's methods on strings and lists, as chat templates call them, under fuel.
//!
//! The methods are minijinja-contrib's, which charge for their result after it is made. A few
//! small arguments can ask for gigabytes (`' '.join(['a' * 100000] * 99999)`), so what a call
//! reads and makes is charged here before.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one unit of fuel pays for, as minijinja counts.
const BYTES_PER_FUEL: usize = 64;

/// Calls a method that the value's own type does not have.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), method) {
        (Some(separator), "join") => match args {
            [list] => return join(state, list, Some(separator)),
            _ => {
                return Err(Error::new(ErrorKind::InvalidOperation, "join: one list is needed"));
            }
        },
        (Some(text), _) => charge_text(state, text, method, args)?,
        (None, "count") => charge_items(state, value, args)?,
        // Methods of maps make lazy views, whose items are charged as they are visited.
        (None, _) => {}
    }
    unknown_method_callback(state, value, method, args)
}

/// Python's `iter` takes it: not `none`, which minijinja's own test lets through.
pub(super) fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}

/// Python's `len` and `[]` take it: texts and maps too.
pub(super) fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Bytes, Map, Seq, String, Undefined};
    matches!(value.kind(), Bytes | Map | Seq | String | Undefined)
}

fn charge_text(state: &State, text: &str, method: &str, args: &[Value]) -> Result<(), Error> {
    let arg = |index: usize| args.get(index).and_then(Value::as_str);
    let read: usize =
        text.len() + args.iter().filter_map(Value::as_str).map(str::len).sum::<usize>();
    charge(state, 1, read)?;
    match (method, arg(0)) {
        ("strip" | "lstrip" | "rstrip", Some(chars)) => {
            charge(state, 0, text.len().saturating_mul(chars.len()))
        }
        ("replace", Some(old)) => {
            let new = arg(1).map_or(0, str::len);
            charge(state, 0, text.matches(old).count().saturating_mul(new))
        }
        ("split", Some(separator)) => charge(state, text.matches(separator).count(), 0),
        ("split", None) => charge(state, text.split_whitespace().count(), 0),
        // Every number in it may be a width.
        ("format", _) => {
            let widths = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
            let width = widths.map(|part| part.parse().unwrap_or(usize::MAX)).max();
            charge(state, 0, width.unwrap_or(0))
        }
        ("splitlines", _) => charge(state, text.lines().count(), 0),
        ("startswith" | "endswith", None) => {
            args.first().map_or(Ok(()), |list| charge_length(state, list))
        }
        _ => Ok(()),
    }
}

/// `list.count(x)`: compares each item, so neither may hide another list.
fn charge_items(state: &State, list: &Value, args: &[Value]) -> Result<(), Error> {
    if args.iter().any(|arg| arg.as_object().is_some()) {
        return Err(Error::new(ErrorKind::InvalidOperation, "count: only of strings and numbers"));
    }
    charge_length(state, list)
}

fn charge_length(state: &State, list: &Value) -> Result<(), Error> {
    let items = list.len().ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, "a list of known length is needed")
    })?;
    charge(state, items, 0)
}

/// The method and the filter `join`. As Python's: only of strings.
pub(super) fn join(state: &State, list: &Value, separator: Option<&str>) -> Result<Value, Error> {
    let separator = separator.unwrap_or_default();
    let mut out = String::new();
    for (index, item) in list.try_iter()?.enumerate() {
        let item = item.as_str().ok_or_else(|| {
            Error::new(ErrorKind::InvalidOperation, "join: only strings can be joined")
        })?;
        charge(state, 1, separator.len() + item.len())?;
        if index > 0 {
            out.push_str(separator);
        }
        out.push_str(item);
    }
    Ok(Value::from(out))
}

fn charge(state: &State, steps: usize, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((steps + bytes / BYTES_PER_FUEL) as u64)
}
