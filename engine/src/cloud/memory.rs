//! Memory that a cloud may come to hold, owner by owner.

use hat_core::cloud::SEND_QUEUE_BYTES_MAX;
use hat_loader::{Bundle, Submodel};
use hat_plan::{KvShape, PAGE_SIZE};
use hat_transport::endpoint::EndpointConfig;
use hat_transport::message::{Hello, Role};

use crate::config::CloudLimits;

/// Bytes of a session beside its pages; `engine/tests/sessions.rs` holds them to it.
const SESSION_BYTES: u64 = 1024;
/// Steps that are planned or run at once, a pipeline's further ones not counted.
const STEPS: u64 = 2;

impl CloudLimits {
    /// Bytes that a cloud with these bounds may come to hold of `bundle`'s model, one line for
    /// each owner. Weights stay in the bundle's file; what a kernel needs beside its rows is not
    /// in here.
    #[must_use]
    pub fn bytes_needed(&self, bundle: &Bundle) -> [(&'static str, u64); 5] {
        let model = bundle.config();
        let kv = KvShape {
            layers: bundle.split().layers(Submodel::Middle).len(),
            pages: self.pages(),
            kv_heads: model.num_key_value_heads,
            head_dim: model.head_dim,
        };
        debug_assert!(kv.bytes() >= PAGE_SIZE);
        let row = 4 * model.hidden_size as u64;
        let link = EndpointConfig::new(Hello::new(Role::Cloud)).pool.bytes();
        [
            ("keys and values", kv.bytes() as u64),
            ("rows of steps", STEPS * u64::from(self.step_rows_max) * row),
            ("sessions", SESSION_BYTES * u64::from(self.sessions_max)),
            ("frames of all connections", link as u64),
            (
                "outputs that nobody reads",
                u64::from(self.connections_max) * SEND_QUEUE_BYTES_MAX as u64,
            ),
        ]
    }
}
