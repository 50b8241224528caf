//! Pages that the cloud may hold from earlier sessions: asked for when one opens, named when it
//! ends. What it holds is not sent, and not computed either if this device and its drafter have
//! their own pages of it still.

use hat_transport::conn::FrameSink;
use hat_transport::message::{End, Message};
use hat_transport::turn::ConnectionId;

use super::request::{Request, RequestId, Session};
use super::run::Device;
use super::violation::CloudViolation;
use crate::Error;
use crate::backend::{PAGE_SIZE, TokenId};
use crate::config::EngineConfig;
use crate::page::{PagePool, pages_for};
use crate::prefix::{PageNames, PrefixCache, PrefixScope, PrefixSecret};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use crate::wire::{BundleFacts, KV_TYPE_F16};

/// Names the pages of a device's paths.
pub(super) struct PageNamer {
    secret: PrefixSecret,
    model_id: [u8; 32],
    arithmetic_id: u32,
    scope: PrefixScope,
}

impl PageNamer {
    /// `None` if all rows go up. Tail layers need all rows that come back, so with them they do.
    ///
    /// # Errors
    /// [`Error::Io`] if the system gives no random bytes for a secret.
    pub(super) fn new(
        config: &EngineConfig,
        facts: &BundleFacts,
        arithmetic_id: u32,
    ) -> Result<Option<Self>, Error> {
        if !config.prefix || facts.has_tail {
            return Ok(None);
        }
        let secret = match config.prefix_secret {
            Some(known) => known,
            None => {
                let mut secret = [0; 32];
                getrandom::fill(&mut secret)
                    .map_err(|error| Error::io("making a secret for page names", error.into()))?;
                secret.into()
            }
        };
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        let scope = PrefixScope {
            entry_layer: layer(facts.layers.start),
            exit_layer: layer(facts.layers.end),
            codec: config.codec().id(),
            kv_type: KV_TYPE_F16,
            arithmetic_id: 0,
        };
        Ok(Some(Self { secret, model_id: facts.model_id, arithmetic_id, scope }))
    }

    /// This device's own layers compute in another arithmetic from now on.
    pub(super) fn computes_in(&mut self, arithmetic_id: u32) {
        self.arithmetic_id = arithmetic_id;
    }

    /// Names of the pages of `tokens` where the cloud computes in `cloud_arithmetic_id`.
    pub(super) fn names(&self, cloud_arithmetic_id: u32, tokens: &[TokenId]) -> PageNames {
        let scope = PrefixScope { arithmetic_id: cloud_arithmetic_id, ..self.scope };
        let mut names = PageNames::new(&self.secret, &self.model_id, self.arithmetic_id, scope);
        names.extend(tokens);
        names
    }
}

/// Pages of the device's own layers: those in use, and those kept from earlier requests.
pub(super) struct Pages {
    pool: PagePool,
    kept: PrefixCache,
    /// Names pages; `None` if all rows go up.
    pub(super) namer: Option<PageNamer>,
}

impl Pages {
    /// A store of pages, all of them free.
    pub(super) fn new(pages: usize, namer: Option<PageNamer>) -> Self {
        let pool = PagePool::new(u32::try_from(pages).expect("row counts are u32"));
        Self { pool, kept: PrefixCache::default(), namer }
    }

    /// Room for a request of `rows_max` rows; `None` if there is none now.
    pub(super) fn reserve(&mut self, rows_max: u32) -> Option<Sequence> {
        let wanted = pages_for(rows_max as usize + PENDING_ROWS_MAX);
        let (pages, _) = self.kept.admit(&mut self.pool, PrefixScope::ONE, &[], wanted)?;
        Some(Sequence::new(pages, rows_max))
    }

    /// A request is done with its pages.
    pub(super) fn give_back(&mut self, kv: Sequence) {
        self.pool.give_back(kv.into_pages());
    }
}

impl Device {
    /// `OPEN` was answered: the cloud holds so many of the pages that were named.
    pub(super) fn opened(&mut self, id: RequestId, pages: u16) -> Result<(), CloudViolation> {
        let now = self.start.shared.clock.now();
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.opened(pages, now)?;
        let Request { path, kv, drafting, .. } = &mut *request;
        let Some(names) = &path.names else { return Ok(()) };
        // What the cloud lacks has to be sent, and so computed.
        let names = names.of_rows(path.tokens.len() - 1, usize::from(pages));
        let mut pages = names.len();
        if let (Some(trained), Some(session)) = (&mut self.start.trained, drafting.session) {
            // The drafter takes each row once: those that it has, or begins behind.
            if drafting.fed == 0 {
                let rows = trained.begin_behind(session, names) * PAGE_SIZE;
                drafting.fed = u32::try_from(rows).expect("within the context");
            }
            pages = pages.min(drafting.fed as usize / PAGE_SIZE);
        }
        self.pages.kept.begin_behind(&mut self.pages.pool, kv, &names[..pages]);
        request.check();
        Ok(())
    }

    /// A request has its answer: the pages of its path may serve the next.
    pub(super) fn keep_pages(&mut self, id: RequestId) {
        let Some(Request { path, kv, drafting, .. }) = self.requests.get(&id) else { return };
        let names = path.pages_of(kv.committed() as usize);
        self.pages.kept.keep(&mut self.pages.pool, PrefixScope::ONE, names, kv.pages());
        if let (Some(trained), Some(session)) = (&mut self.start.trained, drafting.session) {
            trained.keep(session, path.pages_of(drafting.fed as usize));
        }
    }

    /// The KV store means nothing now.
    pub(super) fn forget_pages(&mut self) {
        self.cx.moves.clear();
        self.pages.kept.clear(&mut self.pages.pool);
        if let Some(trained) = &mut self.start.trained {
            trained.forget();
        }
    }

    /// Tells the cloud that a request is done with its session, and which pages may be kept. Frames
    /// that have not left are dropped: nobody waits for their rows.
    pub(super) fn end_session(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        is_whole: bool,
    ) {
        let Some(wire_id) = request.session.wire_id() else { return };
        let dropped = self.endpoint.discard(connection, wire_id);
        let commit = match &request.session {
            Session::Open(open) => open.last_commit(&request.kv, dropped > 0, is_whole),
            _ => 0,
        };
        let pages = request.path.pages_of(request.kv.committed() as usize);
        let commit = if pages.is_empty() { 0 } else { commit };
        let end = Message::End(End { commit, pages });
        if self.endpoint.send_message(connection, wire_id, &end).is_err() {
            // Without names it is shorter.
            let end = Message::End(End::default());
            let _ = self.endpoint.send_message(connection, wire_id, &end);
        }
    }
}
