//! A role's models, loaded as its configuration says.

use std::ops::Range;

use hat_compute::open::{self, ComputeConfig};
use hat_loader::{Bundle, DrafterFile};
use hat_plan::{DeviceForward, DraftForward, MiddleForward};

use crate::Error;
use crate::cloud::SHARED_MAX;
use crate::config::{CloudConfig, EngineConfig};

fn place(config: &EngineConfig) -> ComputeConfig {
    let EngineConfig { processor, weights, threads, nice, .. } = *config;
    ComputeConfig { processor, weights, threads, nice }
}

/// The device's layers on the backend of a configuration.
///
/// # Errors
/// As [`open::device`].
pub fn device(
    config: &EngineConfig,
    bundle: &Bundle,
    split_layer: usize,
    pages: usize,
) -> Result<Box<dyn DeviceForward>, Error> {
    let rows = config.limits.step_rows_max as usize;
    Ok(open::device(&place(config), bundle, split_layer, rows, pages)?)
}

/// A trained drafter for a device's bundle.
///
/// # Errors
/// As [`open::drafter`].
pub fn drafter(
    config: &EngineConfig,
    bundle: &Bundle,
    adapter: &DrafterFile,
    arithmetic_id: u32,
    rows: usize,
    pages: usize,
) -> Result<Box<dyn DraftForward>, Error> {
    Ok(open::drafter(&place(config), bundle, adapter, arithmetic_id, rows, pages)?)
}

/// All stages of a cloud's layers: `runs` are their layers.
///
/// # Errors
/// As [`open::middle`].
pub fn middle(
    config: &CloudConfig,
    bundle: &Bundle,
    runs: &[Range<usize>],
    threads: usize,
    pages: usize,
) -> Result<Vec<Box<dyn MiddleForward>>, Error> {
    let rows = config.limits.step_rows_max as usize;
    let CloudConfig { processor, weights, nice, .. } = *config;
    let place = ComputeConfig { processor, weights, threads, nice };
    Ok(open::middle(&place, &config.gpus, bundle, runs, rows, pages, SHARED_MAX)?)
}
