//! A planned chunk of a prompt is no longer than the time for which it may keep a cloud's stage
//! from other devices. The cloud is scripted, and so are the times that the plan is made from.
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::script::{self, Script};
use crate::support::{Bundles, long_prompt};
use hat_engine::options::{ChunkPolicy, Codec};
use hat_engine::{Engine, EngineConfig, Request};
use hat_transport::conn::FrameSink;
use hat_transport::endpoint::Event;
use hat_transport::message::{
    Arrivals, Computed, Message, Opened, SessionError, SessionErrorCode, Want,
};

/// A step of this many rows, as the cloud tells it: 100 ms and 1 ms a row. The fixed part makes
/// long chunks the better ones for the prompt alone.
fn step_us(rows: u32) -> u32 {
    100_000 + 1000 * rows
}

#[test]
fn a_planned_chunk_keeps_a_stage_for_a_bounded_time() {
    let bundles = Bundles::generated(1, 0);
    let chunks = Arc::new(Mutex::new(Vec::new()));
    let seen = chunks.clone();
    let mut begun = 0;
    let cloud = Script::start(script::hello(&bundles), move |cloud, event| {
        let Some(Event::Frame { connection, frame }) = event else { return };
        let answer = match Message::decode(frame.kind, &frame.body).unwrap() {
            Message::Open(_) => Message::Opened(Opened { pages: 0 }),
            Message::Rows(rows) if rows.head.more => {
                begun += u32::from(rows.head.count);
                return;
            }
            Message::Rows(rows) => {
                let count = std::mem::take(&mut begun) + u32::from(rows.head.count);
                seen.lock().unwrap().push(count);
                let end = rows.head.first_id + u32::from(rows.head.count);
                if rows.head.want == Want::None {
                    Message::Computed(Computed {
                        first_id: end - count,
                        count: u16::try_from(count).unwrap(),
                        queue_us: 0,
                        step_us: step_us(count),
                        step_rows: count,
                        arrivals: Arrivals { bytes: 1 << 20, us: 10_000 },
                    })
                } else {
                    let code = SessionErrorCode::Internal;
                    Message::SessionError(SessionError { code, text: "enough" })
                }
            }
            _ => return,
        };
        cloud.send_message(connection, frame.session, &answer).unwrap();
    });
    let mut config = EngineConfig::new(bundles.path.join("device"))
        .cloud(cloud.address.to_string())
        .chunks(ChunkPolicy::Auto);
    config.wire = Some(Codec::F32);
    config.reconnect = Duration::from_secs(3600);
    let engine = Engine::open(config).unwrap();
    // What the first prompt measures, the second one is planned by.
    for _ in 0..2 {
        chunks.lock().unwrap().clear();
        let request = Request::tokens(long_prompt(1500)).max_tokens(1);
        let error = engine.generate(request).unwrap().find_map(Result::err).unwrap();
        assert!(error.to_string().contains("enough"), "{error}");
    }
    let chunks = chunks.lock().unwrap();
    assert_eq!(chunks.iter().sum::<u32>(), 1500);
    let bound = |rows: &u32| step_us(*rows) <= 150_000 + 1000 * 16;
    assert!(chunks.iter().all(bound), "{chunks:?}");
}
