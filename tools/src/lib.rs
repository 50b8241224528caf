//! Parts shared by the tools: numbers of command lines, chance without state, figures over many
//! values, and one style of plots. No interface for others.

pub mod plot;
pub mod random;
pub mod statistics;

/// A number from `least` to `most`.
///
/// # Errors
/// The range, with its unit.
pub fn number(text: &str, least: f64, most: f64, unit: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("not a number of {unit}"))?;
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(format!("allowed are {least} to {most} {unit}"))
    }
}

/// The parser of a flag's number from `least` to `most`; see [`number`].
pub fn within(
    least: f64,
    most: f64,
    unit: &'static str,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync {
    move |text| number(text, least, most, unit)
}
