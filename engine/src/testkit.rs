//! Roles on models of the caller's own, for tests that plant faults and benches that plant times.

use hat_core::draft::drafter::Drafter;
use hat_loader::Bundle;
use hat_plan::{DeviceForward, MiddleForward, TokenId};

pub use crate::cloud::{open_bundle as open_cloud_bundle, pool_pages};
use crate::{Cloud, CloudConfig, Engine, EngineConfig, Error, Request};

impl Engine {
    /// Serves a model that is already loaded. Its KV store holds the pages that `config.limits`
    /// asks for.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn serve(
        config: EngineConfig,
        bundle: &Bundle,
        model: Box<dyn DeviceForward>,
    ) -> Result<Self, Error> {
        Self::serve_loaded(config, bundle, model, None)
    }

    /// As [`Engine::serve`], with a trained drafter.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn serve_drafting(
        config: EngineConfig,
        bundle: &Bundle,
        model: Box<dyn DeviceForward>,
        drafter: Option<Box<dyn Drafter>>,
    ) -> Result<Self, Error> {
        Self::serve_loaded(config, bundle, model, drafter)
    }

    /// The ids that a request's prompt has now, to ask another model the same.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn prompt_ids(&self, request: Request) -> Result<Vec<TokenId>, Error> {
        Ok(self.prepare(request)?.0.prompt)
    }
}

impl Cloud {
    /// Serves a model that is already loaded.
    ///
    /// # Errors
    /// As [`Cloud::start`].
    pub fn serve(
        config: CloudConfig,
        bundle: &Bundle,
        model: Box<dyn MiddleForward>,
        pages: u32,
    ) -> Result<Self, Error> {
        Self::serve_loaded(config, bundle, vec![model], pages)
    }

    /// As [`Cloud::serve`], for a model whose runs of layers, in order, are each a stage of a
    /// pipeline.
    ///
    /// # Errors
    /// As [`Cloud::start`].
    pub fn serve_stages(
        config: CloudConfig,
        bundle: &Bundle,
        stages: Vec<Box<dyn MiddleForward>>,
        pages: u32,
    ) -> Result<Self, Error> {
        Self::serve_loaded(config, bundle, stages, pages)
    }
}
