//! One cloud: the engine's core, as a policy and a cost file have it.

use std::time::Duration;

use hat_core::cloud::{CloudCore, CloudCoreConfig, CloudFigures};
use hat_core::page::pages_for;
use hat_core::wire;
use hat_engine::options::CloudLimits;
use hat_transport::message::{Hello, Role};

use crate::costs::CostFile;
use crate::device::facts;
use crate::policy::Policy;
use crate::simulation::UNCUT_ROWS_MAX;

/// Sessions of whole contexts that a cloud of a testbed has pages for.
const SESSIONS: usize = 256;

/// The HELLO of a cloud.
pub(crate) fn hello(file: &CostFile, policy: &Policy) -> Hello {
    let facts = facts(file);
    Hello {
        row_budget: if policy.is_uncut() { UNCUT_ROWS_MAX } else { file.cloud.rows_max },
        stages: u16::try_from(file.cloud.stages).expect("stages are few"),
        ..wire::hello(Role::Cloud, facts.model_id, facts.hidden_size, facts.layers)
    }
}

/// A cloud that nobody has dialled.
pub(crate) fn core(file: &CostFile, policy: &Policy) -> CloudCore {
    let limits = CloudLimits::default();
    let config = CloudCoreConfig {
        sessions_max: limits.sessions_max,
        sessions_per_device_max: limits.sessions_per_device_max,
        context_max: limits.context_max.max(file.workload.context_max),
        idle_after: Duration::from_secs(3600),
        step_within: Duration::from_secs(3600),
    };
    let pages = SESSIONS * pages_for(limits.context_max as usize);
    let pages = u32::try_from(pages).expect("pages are few");
    let mut core = CloudCore::new(config, hello(file, policy), pages, CloudFigures::default());
    if let Some(bound) = policy.bound() {
        core.bound_by(bound);
    }
    core
}
