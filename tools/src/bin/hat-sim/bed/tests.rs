use hat_core::chunk::ChunkPolicy;
use hat_core::cloud::{CloudCoreConfig, CloudFigures};
use hat_core::device::{DeviceConfig, DeviceWork, Verdict};
use hat_core::draft::DraftMode;
use hat_core::request::{Event, Request};
use hat_core::wire::{BundleFacts, hello};
use hat_transport::codec::Codec;
use hat_transport::message::{Hello, Role};

use super::*;

const ROWS_MAX: u32 = 8192;
const VOCAB: usize = 512;

/// Nothing is computed but the text, which repeats itself; a computation takes so long, and a step.
struct Text {
    call: Duration,
    step: Duration,
}

impl Compute for Text {
    fn device(&mut self, _: Duration, _: usize, work: DeviceWork<'_>) -> Ran {
        if let DeviceWork::Head { verdict: Verdict::Argmax(argmax), .. } = work {
            *argmax = Some((300, 1.0));
        }
        Ran { took: Some(self.call), fault: None }
    }

    fn stage(&mut self, _: (usize, usize), _: &mut MiddleStep) -> Ran {
        Ran { took: Some(self.step), fault: None }
    }
}

/// A device that is asked for so many tokens, and its cloud, with rows of this width.
fn bed(
    conditions: Conditions,
    stages: usize,
    (tokens, width): (u32, usize),
) -> (Bed<()>, RequestId) {
    let mut bed: Bed<()> = Bed::new(conditions, 1);
    let own = Hello {
        row_budget: 128,
        stages: stages as u16,
        ..hello(Role::Cloud, [7; 32], width, 1..4)
    };
    let config = CloudCoreConfig {
        sessions_max: 4,
        sessions_per_device_max: 4,
        context_max: ROWS_MAX,
        idle_after: Duration::from_secs(10),
        step_within: Duration::from_secs(300),
    };
    let core = CloudCore::new(config, own, 400, CloudFigures::default());
    bed.begin_cloud(0, core, stages);
    bed.listen(0, EndpointConfig::new(own).into());
    let facts = BundleFacts {
        hidden_size: width,
        context: ROWS_MAX,
        layers: 1..4,
        model_id: [7; 32],
        has_tail: false,
    };
    let config = DeviceConfig {
        sessions_max: 4,
        kv_rows_max: ROWS_MAX as usize,
        step_rows_max: 512,
        chunks: ChunkPolicy::Auto,
        codec: Codec::Int8,
        reconnect: Duration::from_secs(30),
        cloud: "the cloud".to_owned(),
    };
    let core = DeviceCore::new(bed.now(), config, &facts, VOCAB, None, None);
    let own = hello(Role::Device, [7; 32], width, 1..4);
    bed.begin_device(0, core, EndpointConfig::new(own).into(), (0, 0));
    let prompt: Vec<u32> = (0..150).map(|at| 300 + at % 7).collect();
    let request = Request::tokens(prompt.clone()).max_tokens(tokens).draft(DraftMode::Off);
    let prepared = Prepared::new(request, prompt, VOCAB, ROWS_MAX).unwrap();
    let id = bed.submit(0, prepared, VOCAB);
    (bed, id)
}

/// Tokens of a request, and when the last one came.
fn run(stages: usize) -> (Vec<u32>, Duration) {
    let conditions =
        Conditions { latency_us: 20_000..=20_000, ns_per_byte: [100..=100, 50..=50], cuts: false };
    let (mut bed, id) = bed(conditions, stages, (20, 4096));
    let mut text = Text { call: Duration::from_millis(1), step: Duration::from_millis(5) };
    let mut tokens = Vec::new();
    while let Some(happened) = bed.next(&mut text) {
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

/// A world in which nothing takes any time: turn follows turn, and none of them waits.
#[test]
fn a_loop_that_waits_for_nothing_is_told() {
    let conditions = Conditions { latency_us: 0..=0, ns_per_byte: [0..=0, 0..=0], cuts: false };
    let (mut bed, _) = bed(conditions, 1, (8000, 32));
    let mut text = Text { call: Duration::ZERO, step: Duration::ZERO };
    let is_spin = |happened: &Happened<()>| matches!(happened, Happened::Spins { .. });
    let told = std::iter::from_fn(|| bed.next(&mut text)).find(is_spin);
    assert!(told.is_some());
    assert!(bed.elapsed() < Duration::from_secs(1));
}
