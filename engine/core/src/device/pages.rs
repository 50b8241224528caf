//! Names of the pages that the cloud may hold from earlier sessions: it is asked for them when one
//! opens, and told them when one ends.

use hat_plan::TokenId;
use hat_transport::codec::Codec;
use hat_transport::message::KV_F16;

use crate::prefix::{PageNames, PrefixScope, PrefixSecret};
use crate::wire::BundleFacts;

/// Names the pages of a device's paths.
pub struct PageNamer {
    secret: PrefixSecret,
    model_id: [u8; 32],
    /// The arithmetic of the device's own layers.
    pub(super) arithmetic_id: u32,
    scope: PrefixScope,
}

impl PageNamer {
    /// `None` if all rows go up. Tail layers need all rows that come back, so with them they do.
    pub fn new(
        codec: Codec,
        facts: &BundleFacts,
        arithmetic_id: u32,
        secret: PrefixSecret,
    ) -> Option<Self> {
        if facts.has_tail {
            return None;
        }
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        let scope = PrefixScope {
            entry_layer: layer(facts.layers.start),
            exit_layer: layer(facts.layers.end),
            codec: codec.id(),
            kv_type: KV_F16,
            arithmetic_id: 0,
        };
        Some(Self { secret, model_id: facts.model_id, arithmetic_id, scope })
    }

    /// Names of the pages of `tokens`, which become at most `rows_max`, where the cloud computes in
    /// `cloud_arithmetic_id`.
    pub(super) fn names(
        &self,
        cloud_arithmetic_id: u32,
        tokens: &[TokenId],
        rows_max: u32,
    ) -> PageNames {
        let scope = PrefixScope { arithmetic_id: cloud_arithmetic_id, ..self.scope };
        let mut names = PageNames::new(&self.secret, &self.model_id, self.arithmetic_id, scope);
        names.reserve(rows_max as usize);
        names.extend(tokens);
        names
    }
}
