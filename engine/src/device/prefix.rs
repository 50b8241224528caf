//! Pages that the cloud may hold from earlier sessions: asked for when one opens, named when it
//! ends. What it holds is not sent, and not computed either if this device and its drafter have
//! their own pages of it still.

use hat_transport::frame::HEADER_BYTES;
use hat_transport::message::{End, Message};
use hat_transport::turn::ConnectionId;

use super::Shared;
use super::active::{Active, Phase};
use super::run::Device;
use super::violation::CloudViolation;
use crate::Error;
use crate::answer::Prepared;
use crate::backend::{PAGE_SIZE, TokenId};
use crate::chunk::CHUNK_ROWS_DEFAULT;
use crate::config::EngineConfig;
use crate::prefix::{PageId, PageNames, PrefixScope, PrefixSecret};
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

impl Active {
    /// Names of the full pages of the path's first `rows` rows.
    fn pages_of(&self, rows: usize) -> &[PageId] {
        self.names.as_ref().map_or(&[], |names| names.of_rows(rows, self.names_max))
    }

    /// Names of the pages that a session may find: all that are full without the last row, which
    /// decides a token and is always computed.
    pub(super) fn pages_to_find(&self) -> &[PageId] {
        self.pages_of(self.tokens.len() - 1)
    }

    /// The cloud holds so many of the pages that were named.
    fn opened(&mut self, pages: u16) -> Result<(), CloudViolation> {
        let asked = self.pages_to_find().len();
        if usize::from(pages) > asked {
            return Err(CloudViolation::PagesBeyond { held: usize::from(pages), named: asked });
        }
        self.phase = Phase::Open;
        self.deadline = None;
        self.held = u32::from(pages) * u32::try_from(PAGE_SIZE).expect("32");
        self.meter.counts.pages_reused += u32::from(pages);
        Ok(())
    }

    /// Rows that the cloud holds and that are to be computed next; 0 if there are none left. Others
    /// are not kept waiting by all of them.
    pub(super) fn held_left(&self) -> u32 {
        self.held.saturating_sub(self.computed()).min(CHUNK_ROWS_DEFAULT)
    }

    /// A message of `bytes` bytes went up.
    pub(super) fn note_message(&mut self, bytes: usize) {
        self.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
    }
}

impl Active {
    /// The answer has ended: the next turn of its conversation goes on from the same ids.
    pub(super) fn note_turn(&self, shared: &Shared) {
        let Prepared { rendered: Some(rendered), prompt, .. } = &self.job.prepared else { return };
        let (answer, text) = (self.answer.tokens(), self.answer.text());
        shared.turns().note(rendered, prompt, answer, text, &shared.tokenizer);
    }
}

impl Device {
    /// `OPEN` was answered: the cloud holds so many of the pages that were named.
    pub(super) fn opened(&mut self, index: usize, pages: u16) -> Result<(), CloudViolation> {
        let active = &mut self.actives[index];
        active.opened(pages)?;
        active.heard = self.start.shared.clock.now();
        let Active { names, tokens, sequence, fed, .. } = active;
        let Some(names) = names else { return Ok(()) };
        // What the cloud lacks has to be sent, and so computed.
        let names = names.of_rows(tokens.len() - 1, usize::from(pages));
        let mut pages = names.len();
        if let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) {
            // The drafter takes each row once: those that it has, or begins behind.
            if *fed == 0 {
                let rows = trained.begin_behind(session, names) * PAGE_SIZE;
                *fed = u32::try_from(rows).expect("within the context");
            }
            pages = pages.min(*fed as usize / PAGE_SIZE);
        }
        self.prefixes.begin_behind(&mut self.pages, sequence, &names[..pages]);
        Ok(())
    }

    /// A request has its answer: the pages of its path may serve the next.
    pub(super) fn keep_pages(&mut self, index: usize) {
        let active = &self.actives[index];
        let names = active.pages_of(active.sequence.committed() as usize);
        let pages = active.sequence.pages();
        self.prefixes.keep(&mut self.pages, PrefixScope::ONE, names, pages);
        if let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) {
            trained.keep(session, active.pages_of(active.fed as usize));
        }
    }

    /// The KV store means nothing now.
    pub(super) fn forget_pages(&mut self) {
        self.prefixes.clear(&mut self.pages);
        if let Some(trained) = &mut self.start.trained {
            trained.forget();
        }
    }

    /// Tells the cloud that a request is done with its session, and which pages may be kept.
    pub(super) fn end_session(&mut self, connection: ConnectionId, active: &Active) {
        let pages = active.pages_of(active.sequence.committed() as usize);
        let commit = if pages.is_empty() { 0 } else { active.commit };
        let end = Message::End(End { commit, pages });
        if self.endpoint.send_message(connection, active.wire_id, &end).is_err() {
            // Without names it is shorter.
            let end = Message::End(End::default());
            let _ = self.endpoint.send_message(connection, active.wire_id, &end);
        }
    }
}
