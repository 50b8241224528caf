use hat_core::chunk::ChunkPolicy;
use hat_core::cloud::{CloudCoreConfig, CloudFigures};
use hat_core::device::{DeviceConfig, DeviceWork, Verdict};
use hat_core::request::{Event, Request};
use hat_core::wire::{BundleFacts, hello};
use hat_transport::codec::Codec;
use hat_transport::message::Hello;

use super::*;

const HIDDEN: usize = 4096;

/// Nothing is computed but the text, which repeats itself.
struct Text;

impl Compute for Text {
    fn device(&mut self, _: usize, work: DeviceWork<'_>) -> Ran {
        if let DeviceWork::Head { verdict: Verdict::Argmax(argmax), .. } = work {
            *argmax = Some((300, 1.0));
        }
        Ran { took: Some(Duration::from_millis(1)), fault: None }
    }

    fn stage(&mut self, _: (usize, usize), _: &mut MiddleStep) -> Ran {
        Ran { took: Some(Duration::from_millis(5)), fault: None }
    }
}

/// Tokens of a request, and when the last one came.
fn run(stages: usize) -> (Vec<u32>, Duration) {
    let conditions =
        Conditions { latency_us: 20_000..=20_000, ns_per_byte: [100..=100, 50..=50], cuts: false };
    let mut bed: Bed<()> = Bed::new(conditions, 1);
    let own = Hello {
        row_budget: 128,
        stages: stages as u16,
        ..hello(Role::Cloud, [7; 32], HIDDEN, 1..4)
    };
    let config = CloudCoreConfig {
        sessions_max: 4,
        sessions_per_device_max: 4,
        context_max: 2000,
        idle_after: Duration::from_secs(10),
        step_within: Duration::from_secs(300),
    };
    let core = CloudCore::new(config, own, 100, CloudFigures::default());
    bed.begin_cloud(0, core, EndpointConfig::new(own), stages);
    let facts = BundleFacts {
        hidden_size: HIDDEN,
        context: 2000,
        layers: 1..4,
        model_id: [7; 32],
        has_tail: false,
    };
    let config = DeviceConfig {
        sessions_max: 4,
        kv_rows_max: 4096,
        step_rows_max: 512,
        chunks: ChunkPolicy::Auto,
        codec: Codec::Int8,
        reconnect: Duration::from_secs(30),
        cloud: "the cloud".to_owned(),
    };
    let core = DeviceCore::new(bed.now(), config, &facts, VOCAB, None, None);
    let own = hello(Role::Device, [7; 32], HIDDEN, 1..4);
    bed.begin_device(0, core, EndpointConfig::new(own), (0, None));
    let prompt: Vec<u32> = (0..150).map(|at| 300 + at % 7).collect();
    let request = Request::tokens(prompt.clone()).max_tokens(20);
    let prepared = Prepared::new(request, prompt, VOCAB, 2000).unwrap();
    let id = bed.submit(0, prepared);
    let mut tokens = Vec::new();
    while let Some(happened) = bed.next(&mut Text) {
        let Happened::News { id: of, event, .. } = happened else { continue };
        assert_eq!(of, id);
        match event {
            RequestEvent::Said(Event::Token { token, .. }) => tokens.push(token),
            RequestEvent::Done(_) => break,
            RequestEvent::Failed(error) => panic!("{error:?}"),
            _ => {}
        }
    }
    (tokens, bed.elapsed())
}

#[test]
fn a_request_runs_whole_in_virtual_time() {
    let (tokens, took) = run(1);
    assert_eq!(tokens, [300; 20]);
    // 150 rows of 8 KiB (int8: half of it) take some 65 ms up; a round takes two ways of 20 ms.
    assert!(took > Duration::from_millis(150) && took < Duration::from_secs(2), "{took:?}");
    assert_eq!(run(1), (tokens.clone(), took), "the same happens again");
    assert_eq!(run(2).0, tokens);
}
