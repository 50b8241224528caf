//! A cloud that follows a script, truthfully or not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hat_transport::clock::SystemClock;
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
use hat_transport::frame::FRAME_BYTES_MAX;
use hat_transport::link::LinkKind;
use hat_transport::message::{Hello, KvPages, Role};

use super::Bundles;

/// Interval at which an idle scripted cloud acts.
const TICK: Duration = Duration::from_millis(5);

/// A cloud on a thread of its own. Dropping it stops it.
pub struct Script {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// HELLO of an honest cloud of the generated model.
pub fn hello(bundles: &Bundles) -> Hello {
    let half = hat_loader::Bundle::open(&bundles.path.join("cloud")).unwrap();
    Hello {
        model_id: *half.model_id().as_bytes(),
        arithmetic_id: 1,
        hidden_size: 64,
        entry_layer: 1,
        exit_layer: 4,
        codecs: 0x71,
        row_budget: 512,
        rows_pending_max: 64,
        kv: KvPages { kv_type: 1, page_size: 32 },
        frame_bytes_max: u32::try_from(FRAME_BYTES_MAX).unwrap(),
        ..Hello::new(Role::Cloud)
    }
}

impl Script {
    /// A cloud that greets with `hello`. `act` hears of each event, and of none at each tick.
    pub fn start(
        hello: Hello,
        act: impl FnMut(&mut Endpoint, Option<Event>) + Send + 'static,
    ) -> Self {
        Self::start_with(EndpointConfig::new(hello), act)
    }

    /// As [`Script::start`], with queues and windows of any length.
    pub fn start_with(
        config: EndpointConfig,
        mut act: impl FnMut(&mut Endpoint, Option<Event>) + Send + 'static,
    ) -> Self {
        let any_port = Some(([127, 0, 0, 1], 0).into());
        let link = hat_transport::link::open(LinkKind::Mio, any_port).unwrap().link;
        let mut cloud = Endpoint::new(link, Arc::new(SystemClock), config);
        let address = cloud.local_address().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut events = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                cloud.poll(Some(TICK), &mut events).unwrap();
                events.drain(..).for_each(|event| act(&mut cloud, Some(event)));
                act(&mut cloud, None);
            }
        });
        Self { address, stop, thread: Some(thread) }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the script failed");
    }
}
