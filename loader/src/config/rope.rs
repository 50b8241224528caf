//! Rotary frequencies and their scaling. Pure: no IO.

use std::f32::consts::PI;

use super::{ConfigError, RopeScaling};

/// `theta^(-2i / head_dim)`, scaled; see [`super::LlamaConfig::inv_freq`].
pub(super) fn inv_freq(theta: f32, head_dim: usize, scaling: Option<&RopeScaling>) -> Vec<f32> {
    let mut inv_freq: Vec<f32> = (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            let power = f64::from(theta).powf(f64::from(exponent)) as f32;
            1.0 / power
        })
        .collect();
    match scaling {
        None => {}
        Some(RopeScaling::Linear { factor }) => {
            for f in &mut inv_freq {
                *f /= factor;
            }
        }
        Some(RopeScaling::Factors { factors }) => {
            for (f, factor) in inv_freq.iter_mut().zip(factors) {
                *f /= factor;
            }
        }
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => {
            let bounds = (*low_freq_factor, *high_freq_factor);
            for f in &mut inv_freq {
                *f = llama3(*f, *factor, bounds, *original_max_position_embeddings);
            }
        }
    }
    inv_freq
}

/// One frequency of the Llama 3 scaling. The order of operations, and which of them are rounded
/// to f32, are those of transformers' `_compute_llama3_parameters`.
fn llama3(inv_freq: f32, factor: f32, (low, high): (f32, f32), context: usize) -> f32 {
    let low_wavelength = (context as f64 / f64::from(low)) as f32;
    let high_wavelength = (context as f64 / f64::from(high)) as f32;
    let wavelength = 2.0 * PI / inv_freq;
    if wavelength > low_wavelength {
        inv_freq / factor
    } else if wavelength < high_wavelength {
        inv_freq
    } else {
        let width = (f64::from(high) - f64::from(low)) as f32;
        let smooth = (context as f32 / wavelength - low) / width;
        (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
    }
}

/// Checks the numbers of a scaling.
pub(super) fn check(scaling: Option<&RopeScaling>, head_dim: usize) -> Result<(), ConfigError> {
    let at_least_one = |key: &str, value: f32| {
        if value >= 1.0 && value.is_finite() {
            return Ok(());
        }
        let reason = format!("{value} is not a finite number of at least 1");
        Err(ConfigError::new(format!("rope_scaling.{key}"), reason))
    };
    match scaling {
        None => Ok(()),
        Some(RopeScaling::Linear { factor }) => at_least_one("factor", *factor),
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: context,
        }) => {
            at_least_one("factor", *factor)?;
            if !(*low > 0.0 && *high > *low && high.is_finite()) {
                let reason = format!("{high} is not above low_freq_factor = {low} > 0");
                return Err(ConfigError::new("rope_scaling.high_freq_factor", reason));
            }
            let key = "rope_scaling.original_max_position_embeddings";
            super::in_range(key, *context, super::POSITIONS_MAX)
        }
        Some(RopeScaling::Factors { factors }) => {
            if factors.len() != head_dim / 2 {
                let reason =
                    format!("{} numbers, expected head_dim / 2 = {}", factors.len(), head_dim / 2);
                return Err(ConfigError::new("rope_freqs.weight", reason));
            }
            match factors.iter().position(|f| !(f.is_finite() && *f > 0.0)) {
                None => Ok(()),
                Some(i) => {
                    let reason =
                        format!("number {i} is {}, expected a finite one above 0", factors[i]);
                    Err(ConfigError::new("rope_freqs.weight", reason))
                }
            }
        }
    }
}
