//! Bounds of a device: requests that wait, and prompts that are longer than anything fits.
use std::time::Duration;

use crate::support::Bundles;
use hat_engine::options::{ErrorKind, InputError};
use hat_engine::{Engine, EngineConfig, Error, Request};

/// A device whose cloud is away, and whose requests wait for it.
fn waiting(bundles: &Bundles) -> EngineConfig {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = EngineConfig::new(bundles.path.join("device")).cloud(nobody.to_string());
    config.reconnect = Duration::from_secs(3600);
    config
}

#[test]
fn as_many_requests_wait_as_the_queue_holds() {
    let bundles = Bundles::generated(1, 0);
    for (sessions_max, queue_max) in [(1, 1), (1, 3), (2, 5), (4, 32)] {
        let mut config = waiting(&bundles);
        config.limits.sessions_max = sessions_max;
        config.limits.queue_max = queue_max;
        let engine = Engine::open(config).unwrap();
        let (mut kept, mut refused) = (Vec::new(), None);
        // The engine's thread takes a queue's worth out of the queue, in its own time.
        let most = (sessions_max + 2 * queue_max) as usize;
        while refused.is_none() && kept.len() <= most {
            match engine.generate(Request::chat("Hello")) {
                Ok(answer) => kept.push(answer),
                Err(error) => refused = Some(error),
            }
        }
        let error = refused.expect("a queue without an end");
        assert!(kept.len() >= queue_max as usize, "{} wait of {queue_max}", kept.len());
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.retry_after_ms().is_some());
        // Who gives up makes room.
        drop(kept);
        let begin = std::time::Instant::now();
        while engine.generate(Request::chat("Hello")).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(120), "no room is made");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_prompt_that_can_not_fit_is_not_tokenised() {
    const BYTES: usize = 100 << 20;
    let bundles = Bundles::generated(1, 0);
    let mut config = waiting(&bundles);
    config.limits.context_max = 64;
    let engine = Engine::open(config).unwrap();
    let refused = |request: Request| match engine.generate(request) {
        Ok(_) => panic!("it is taken"),
        Err(error) => error,
    };
    // The limit that is named stands in front of the tokenizer, which would name tokens.
    for request in [Request::text("a ".repeat(BYTES / 2)), Request::chat("a ".repeat(BYTES / 2))] {
        let error = refused(request);
        assert_eq!(error.kind(), ErrorKind::Input);
        let text = error.to_string();
        assert!(text.contains("bytes") && text.contains("104857600"), "{text}");
    }
    // Ids are counted before one of them is looked at.
    let error = refused(Request::tokens(vec![u32::MAX; BYTES / 4]));
    let Error::Input(InputError::ContextLength { context: 64, prompt }) = error else {
        panic!("{error}")
    };
    assert_eq!(prompt, BYTES / 4);
    let error = refused(Request::text("a ".repeat(400)));
    let is_long = matches!(error, Error::Input(InputError::ContextLength { context: 64, .. }));
    assert!(is_long, "{error}");
}
