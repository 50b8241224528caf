//! Pages that the cloud may hold from earlier sessions: asked for when one opens, named when it
//! ends. What it holds is not sent, and not computed either if this device and its drafter have
//! their own pages of it still.

use hat_plan::{PAGE_SIZE, TokenId};
use hat_transport::codec::Codec;

use super::DeviceCore;
use super::request::{Request, RequestId};
use crate::prefix::{PageNames, PrefixScope, PrefixSecret};
use crate::wire::{BundleFacts, KV_TYPE_F16};

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
            kv_type: KV_TYPE_F16,
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

impl DeviceCore {
    /// `OPEN` was answered: the cloud holds so many of the pages that were named.
    pub(super) fn begin_behind_pages(&mut self, id: RequestId, pages: u16) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Request { path, kv, drafting, .. } = &mut *request;
        let Some(names) = &path.names else { return };
        // What the cloud lacks has to be sent, and so computed.
        let names = names.of_rows(path.tokens.len() - 1, usize::from(pages));
        let mut pages = names.len();
        if let (Some(drafter), Some(session)) = (&mut self.drafter, drafting.session) {
            // The drafter takes each row once: those that it has, or begins behind.
            if drafting.fed == 0 {
                let rows = drafter.begin_behind(session, names) * PAGE_SIZE;
                drafting.fed = u32::try_from(rows).expect("within the context");
            }
            pages = pages.min(drafting.fed as usize / PAGE_SIZE);
        }
        self.pages.begin_behind(kv, &names[..pages]);
        request.check();
    }

    /// A request has its answer: the pages of its path may serve the next.
    pub(super) fn keep_pages(&mut self, id: RequestId) {
        let Some(Request { path, kv, drafting, .. }) = self.requests.get(&id) else { return };
        let names = path.pages_of(kv.committed() as usize);
        self.pages.keep(PrefixScope::ONE, names, kv.pages());
        if let (Some(drafter), Some(session)) = (&mut self.drafter, drafting.session) {
            drafter.keep(session, path.pages_of(drafting.fed as usize));
        }
    }

    /// The KV store means nothing now.
    pub(super) fn forget_pages(&mut self) {
        self.cx.moves.clear();
        self.pages.clear();
        if let Some(drafter) = &mut self.drafter {
            drafter.forget();
        }
    }
}
