//! The framed protocol between device and cloud, and the links that carry it.
//!
//! From the wire up: [`frame`] is the 32-byte header and cuts bytes into frames; [`message`] is
//! what stands in bodies, [`codec`] how rows are written there; [`conn`] is the protocol without a
//! socket, a clock or a thread; [`link`] moves bytes (in memory, over mio, over io_uring);
//! [`endpoint`] is the one place where link, clock and protocol meet. [`pool`] holds all memory,
//! [`clock`] the time, [`random`] the random numbers; [`log`] makes what a peer says fit for a log.
//! `docs/PROTOCOL.md` has the byte tables and the rules of sessions.
//!
//! The crate knows no tensor: rows are numbers of a width. It starts no thread, installs
//! no log subscriber, and logs no body.
//!
//! An application holds an [`endpoint::Endpoint`] and polls it:
//!
//! ```
//! use std::sync::Arc;
//! use hat_transport::clock::SystemClock;
//! use hat_transport::conn::FrameSink;
//! use hat_transport::link::memory::MemoryNet;
//! use hat_transport::message::{Hello, Message, Open, Role};
//! use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let net = MemoryNet::new();
//! let listen = net.link(Some("127.0.0.1:0".parse()?))?;
//! let config = EndpointConfig::new(Hello::new(Role::Cloud));
//! let mut cloud = Endpoint::new(Box::new(listen), Arc::new(SystemClock), config);
//! let config = EndpointConfig::new(Hello::new(Role::Device));
//! let mut device = Endpoint::new(Box::new(net.link(None)?), Arc::new(SystemClock), config);
//! let connection = device.dial(cloud.local_address().ok_or("it listens")?);
//!
//! let open = Open {
//!     entry_layer: 2, exit_layer: 30, codec: 1, kv_type: 1, arithmetic_id: 1, rows_max: 512,
//!     pages: &[],
//! };
//! let (mut seen, mut opened) = (Vec::new(), false);
//! while !opened {
//!     let pause = Some(std::time::Duration::from_millis(1));
//!     device.poll(pause, &mut seen)?;
//!     for event in seen.drain(..) {
//!         if let Event::Up { .. } = event {
//!             device.send_message(connection, 1, &Message::Open(open))?;
//!         }
//!     }
//!     cloud.poll(pause, &mut seen)?;
//!     for event in seen.drain(..) {
//!         if let Event::Frame { frame, .. } = event {
//!             opened = Message::decode(frame.kind, &frame.body)? == Message::Open(open);
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```

pub mod clock;
pub mod codec;
pub mod conn;
pub mod endpoint;
pub mod frame;
pub mod link;
pub mod log;
pub mod message;
pub mod planted;
#[expect(unsafe_code, reason = "page-aligned buffers, each reached through one slot")]
pub mod pool;
pub mod random;

/// The wire version that this crate speaks.
pub const WIRE_VERSION: u8 = 1;
