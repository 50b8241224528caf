//! Which backend computes, and what a bundle says about its tokenizer.

use hat_loader::Bundle;

use crate::Error;
use crate::backend::cpu::{CpuBackend, CpuConfig, Level};
use crate::config::Processor;
use crate::token::TokenSettings;

/// The CPU backend of a configuration.
///
/// # Errors
/// [`Error::Field`] if there are no threads, [`Error::Backend`] if the level is not there.
pub fn cpu(processor: Processor, threads: usize) -> Result<CpuBackend, Error> {
    if threads == 0 {
        return Err(Error::field("threads", "0 threads compute nothing; at least 1"));
    }
    let level = match processor {
        Processor::Auto => Level::Auto,
        Processor::Portable => Level::Portable,
    };
    Ok(CpuBackend::new(CpuConfig { threads, level })?)
}

/// What a device's bundle says about its tokenizer.
#[must_use]
pub fn token_settings(bundle: &Bundle) -> TokenSettings {
    let text = bundle.token_settings().cloned().unwrap_or_default();
    TokenSettings {
        vocab_size: bundle.config().vocab_size,
        chat_template: text.chat_template,
        bos_token: text.bos_token,
        eos_token: text.eos_token,
        eos_token_ids: bundle.config().eos_token_ids.clone(),
        add_bos: None, // tokenizer.json's post-processor knows
    }
}
