//! Sizes of a prompt's chunks, chosen so that device, uplink and cloud work at the same time.
//!
//! A chunk passes three places: the device's own layers, the uplink, and the cloud's step, which
//! may be a pipeline of `P` stages. [`Ahead`] is the recurrence of that flow shop. With times
//! `d`, `u`, `q` of a chunk at device, uplink and one stage:
//!
//! ```text
//! device  D_k = D_{k-1} + d_k
//! uplink  U_k = max(U_{k-1}, D_k) + u_k
//! first   A_k = max(A_{k-1}, U_k + latency + wait) + q_k
//! last    C_k = max(C_{k-1} + q_k, A_k + (P - 1) q_k)
//! ```
//!
//! All stages take the same time for one chunk, and then the finish of the last stage needs no
//! stage between: a job that meets a slower one ahead of it is held up in front of one stage or
//! of all. `tests` compare with all stages written out.
//!
//! [`ChunkPolicy::Auto`] searches over the prefixes of the prompt (`search`). Every quantity only
//! grows with those before it, so of two ways to the same prefix one may be forgotten if it is
//! later everywhere. Related: TeraPipe (arXiv 2102.07988) and HPipe (NAACL 2024) enumerate the
//! slowest stage and know no link; PipeSD (arXiv 2605.13319) plans draft tokens over a link and
//! knows no pipeline; SGLang and others equalise the cloud's steps. The published rule of HAT,
//! one size from one balance, is [`ChunkPolicy::Paper`].
//!
//! Pure: numbers in, numbers out.

mod search;
#[cfg(test)]
mod tests;

use self::search::Search;
use crate::InputError;

/// Rows of a prompt chunk while nothing is known of device and link.
pub const CHUNK_ROWS_DEFAULT: u32 = 128;
/// Rows between the places where [`ChunkPolicy::Auto`] may cut.
pub const GRAIN_DEFAULT: u32 = 32;
/// The longest prompt that is planned.
pub const ROWS_MAX: u32 = 1 << 20;
/// Seconds for which a chunk keeps one of the cloud's stages from others at most: what this cloud
/// cuts its steps to by itself, and another may not.
pub const STEP_S_MAX: f64 = 0.15;
/// Stand-in for infinite estimates, in seconds.
const FOREVER_S: f64 = 1e9;

/// Policy that cuts a prompt into chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChunkPolicy {
    /// The whole prompt at once, up to the cloud's row budget.
    Off,
    /// Chunks of this many rows.
    Fixed(u32),
    /// One size for all, as HAT chooses it: the upload of a chunk takes as long as the cloud's
    /// wait and its share of a step.
    Paper,
    /// Sizes that make the last chunk's end the earliest, by what was measured.
    #[default]
    Auto,
}

impl std::str::FromStr for ChunkPolicy {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        match text {
            "off" => Ok(Self::Off),
            "paper" => Ok(Self::Paper),
            "auto" => Ok(Self::Auto),
            _ => match text.parse::<u32>() {
                Ok(rows) if rows > 0 => Ok(Self::Fixed(rows)),
                _ => {
                    let reason = format!("{text:?} is neither a row count nor auto");
                    Err(InputError::field("chunks", reason))
                }
            },
        }
    }
}

impl std::fmt::Display for ChunkPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Fixed(rows) => rows.fmt(f),
            Self::Paper => f.write_str("paper"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// Seconds of a step of some layers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCost {
    /// Seconds of a step, whatever its size.
    pub fixed: f64,
    /// Seconds of each row.
    pub per_row: f64,
    /// Seconds of each row for each row that it attends to.
    pub per_row_context: f64,
}

impl StepCost {
    /// Seconds of `rows` rows behind `prefix` rows. A row of a chunk sees, on average, half of the
    /// chunk beside the prefix.
    #[must_use]
    pub fn seconds(&self, rows: u32, prefix: u32) -> f64 {
        let rows = f64::from(rows);
        let context = f64::from(prefix) + rows / 2.0;
        self.fixed + rows * (self.per_row + self.per_row_context * context)
    }
}

/// Seconds that a chunk of a prompt takes on its way. Estimates that are not numbers or negative
/// count as nothing, infinite ones as very long.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CostModel {
    /// The device's own layers, the context left out of account.
    pub device: StepCost,
    /// A chunk on the uplink, whatever its size.
    pub frame_s: f64,
    /// A row on the uplink: its bytes over the rate.
    pub row_up_s: f64,
    /// The way up for one byte.
    pub up_latency_s: f64,
    /// The whole middle submodel; a stage takes `1 / stages` of it.
    pub cloud: StepCost,
    /// Pipeline stages of the cloud; 0 counts as 1.
    pub stages: u32,
    /// Wait for a step of a chunk that meets no chunk of its own prompt: others' load.
    pub cloud_wait_s: f64,
    /// From the last step's end to the first token: downlink, tail, head.
    pub return_s: f64,
}

impl CostModel {
    /// The same with finite numbers from 0 up only.
    fn sane(&self) -> Self {
        let sane = |seconds: f64| if seconds > 0.0 { seconds.min(FOREVER_S) } else { 0.0 };
        let step = |cost: StepCost| StepCost {
            fixed: sane(cost.fixed),
            per_row: sane(cost.per_row),
            per_row_context: sane(cost.per_row_context),
        };
        Self {
            device: step(self.device),
            frame_s: sane(self.frame_s),
            row_up_s: sane(self.row_up_s),
            up_latency_s: sane(self.up_latency_s),
            cloud: step(self.cloud),
            stages: self.stages.max(1),
            cloud_wait_s: sane(self.cloud_wait_s),
            return_s: sane(self.return_s),
        }
    }

    /// Seconds of one stage.
    fn stage(&self, rows: u32, prefix: u32) -> f64 {
        self.cloud.seconds(rows, prefix) / f64::from(self.stages)
    }
}

/// Limits that a plan must keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Rows of one step in the cloud, and so of one chunk.
    pub rows_max: u32,
    /// Seconds that one chunk may keep a stage from others; infinite for no bound. Bounds
    /// [`ChunkPolicy::Auto`] alone, which cuts no finer than the grain for it.
    pub step_s_max: f64,
    /// [`ChunkPolicy::Auto`] cuts at multiples of this.
    pub grain: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { rows_max: 512, step_s_max: STEP_S_MAX, grain: GRAIN_DEFAULT }
    }
}

/// End of the work that device, uplink and cloud have already, in seconds from now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ahead {
    /// The device.
    pub device_s: f64,
    /// The uplink.
    pub uplink_s: f64,
    /// The first stage.
    pub stage_s: f64,
    /// The last stage.
    pub last_s: f64,
}

impl Ahead {
    /// The same, seen so many seconds later.
    #[must_use]
    pub fn later(self, seconds: f64) -> Self {
        let later = |time: f64| (time - seconds).max(0.0);
        Self {
            device_s: later(self.device_s),
            uplink_s: later(self.uplink_s),
            stage_s: later(self.stage_s),
            last_s: later(self.last_s),
        }
    }

    /// The same with one more chunk of `rows` rows, which comes behind `prefix` rows.
    #[must_use]
    pub fn behind(mut self, costs: &CostModel, rows: u32, prefix: u32) -> Self {
        self.push(&costs.sane(), rows, prefix);
        self
    }

    /// One more chunk of `rows` rows behind `prefix` rows. Costs are sane.
    #[inline]
    fn push(&mut self, costs: &CostModel, rows: u32, prefix: u32) {
        self.device_s += costs.device.seconds(rows, 0);
        let up_s = costs.frame_s + costs.row_up_s * f64::from(rows);
        self.uplink_s = self.uplink_s.max(self.device_s) + up_s;
        let stage_s = costs.stage(rows, prefix);
        let arrival = self.uplink_s + costs.up_latency_s + costs.cloud_wait_s;
        self.stage_s = self.stage_s.max(arrival) + stage_s;
        let others = f64::from(costs.stages - 1) * stage_s;
        self.last_s = (self.last_s + stage_s).max(self.stage_s + others);
    }
}

/// Chunks of a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan<'a> {
    /// Rows of each; none is 0, together all rows.
    pub sizes: &'a [u32],
    /// From now to the first token, seconds.
    pub finish_s: f64,
}

/// Time of the first token, in seconds from the start of the first chunk, if a prompt with `cached`
/// rows in place is cut into `sizes`, which come behind what is on its way already.
fn finish_s(costs: &CostModel, ahead: Ahead, cached: u32, sizes: &[u32]) -> f64 {
    let costs = costs.sane();
    let (mut at, mut prefix) = (ahead, cached);
    for &rows in sizes {
        at.push(&costs, rows, prefix);
        prefix = prefix.saturating_add(rows);
    }
    at.last_s + costs.return_s
}

/// Cuts prompts. Keeps its buffers: no allocation after the first plan of a size.
#[derive(Debug, Default)]
pub struct Planner {
    search: Search,
    sizes: Vec<u32>,
}

impl Planner {
    /// Cuts `rows` rows that come behind `cached` rows, and behind what is on its way already.
    ///
    /// # Panics
    /// If `rows` exceeds [`ROWS_MAX`].
    pub fn plan(
        &mut self,
        policy: ChunkPolicy,
        costs: &CostModel,
        limits: &Limits,
        ahead: Ahead,
        cached: u32,
        rows: u32,
    ) -> Plan<'_> {
        assert!(rows <= ROWS_MAX, "a prompt of {rows} rows; at most {ROWS_MAX} are planned");
        let costs = costs.sane();
        let rows_max = limits.rows_max.max(1);
        let size = match policy {
            ChunkPolicy::Off => rows_max,
            ChunkPolicy::Fixed(size) => size.clamp(1, rows_max),
            ChunkPolicy::Paper => balanced_rows(&costs, limits),
            ChunkPolicy::Auto => {
                let finish_s =
                    self.search.run(&costs, limits, ahead, cached, rows, &mut self.sizes);
                return Plan { sizes: &self.sizes, finish_s };
            }
        };
        self.sizes.clear();
        self.sizes.extend(equal(rows, size));
        let finish_s = finish_s(&costs, ahead, cached, &self.sizes);
        Plan { sizes: &self.sizes, finish_s }
    }

    /// Chunks whose times the last [`ChunkPolicy::Auto`] plan looked at: its cost, countable.
    #[must_use]
    pub fn evaluated(&self) -> u64 {
        self.search.evaluated
    }
}

/// `rows` rows in chunks of `size`; the last one has the rest.
fn equal(rows: u32, size: u32) -> impl Iterator<Item = u32> {
    let rest = Some(rows % size).filter(|rest| *rest > 0);
    std::iter::repeat_n(size, (rows / size) as usize).chain(rest)
}

/// The published balance: upload of a chunk = wait + step / stages, the prefix left out of
/// account. At least a grain; where a row is computed slower than it is uploaded there is no
/// balance, and nothing is cut.
fn balanced_rows(costs: &CostModel, limits: &Limits) -> u32 {
    let stages = f64::from(costs.stages);
    let left = costs.cloud_wait_s + costs.cloud.fixed / stages;
    let slope = costs.row_up_s - costs.cloud.per_row / stages;
    let rows_max = limits.rows_max.max(1);
    if slope <= 0.0 {
        return rows_max;
    }
    let rows = (left / slope).round().min(f64::from(rows_max)) as u32;
    rows.clamp(limits.grain.clamp(1, rows_max), rows_max)
}
