//! A large language model split between a *device* and a *cloud*, after HAT (arXiv 2503.18989).
//!
//! The device holds the embedding, the first decoder layers and the LM head; the cloud holds the
//! layers between, for many devices at once. Hidden states cross a framed protocol; text and
//! token ids are not transmitted. Whoever runs the cloud and has the model's weights can still
//! recover both from the hidden states: treat it as you would a server that gets your text.

#[doc(hidden)]
pub mod backend;
#[doc(hidden)]
pub mod metrics;
#[doc(hidden)]
pub mod pack;
#[doc(hidden)]
pub mod sample;
#[doc(hidden)]
pub mod stop;
#[doc(hidden)]
pub mod token;
