//! The first lines of the commands, in plain words.

use std::ops::Range;

use hat_engine::Engine;
use hat_engine::options::Timings;
use hat_loader::Bundle;

/// The layers that a half of a model holds: `layers 0 to 1 of 30`.
pub(crate) fn layers(bundle: &Bundle) -> String {
    let all = bundle.config().num_hidden_layers;
    runs(&bundle.layers())
        .map_or(format!("none of {all} layers"), |runs| format!("{runs} of {all}"))
}

fn runs(runs: &[Range<usize>]) -> Option<String> {
    let word = |run: &Range<usize>| match run.len() {
        1 => format!("layer {}", run.start),
        _ => format!("layers {} to {}", run.start, run.end - 1),
    };
    let words: Vec<String> = runs.iter().filter(|run| !run.is_empty()).map(word).collect();
    (!words.is_empty()).then(|| words.join(" and "))
}

/// The answers of this many tokens that a role has room for at once.
pub(crate) fn room(answers: u32, context: u32) -> String {
    match answers {
        1 => format!("1 answer at once, of {context} tokens with its prompt"),
        count => format!("{count} answers at once, of {context} tokens each with its prompt"),
    }
}

/// The trained drafter of a device, or what it costs to have none.
pub(crate) fn drafter(engine: &Engine) -> String {
    let after = match engine.split_layer() {
        1 => "1 layer".to_owned(),
        count => format!("{count} layers"),
    };
    match engine.drafter_origin() {
        Some(origin) => format!("drafter: trained for this model after {after} ({origin})"),
        None => format!(
            "drafter: none was trained for {} after {after}, so drafts come from the prompt's own \
             words, and a round trip brings fewer tokens; hat-train makes one",
            engine.model_name()
        ),
    }
}

/// The pace of an answer. Several tokens come with one round trip, so the gaps between tokens say
/// nothing of the mean.
pub(crate) fn pace(timings: &Timings) -> String {
    let mean_ms = match timings.tokens_per_second {
        rate if rate > 0.0 => 1e3 / rate,
        _ => 0.0,
    };
    format!(
        "first token after {:.0} ms, then {mean_ms:.1} ms a token (gaps {:.1} ms p50, {:.1} p99)",
        timings.ttft_ms, timings.tbt_ms_p50, timings.tbt_ms_p99
    )
}

/// The rate and the round trip of a link, as far as they were measured: one that takes all bytes
/// at once shows no rate.
pub(crate) fn link(uplink_bytes_s: Option<f64>, rtt_s: Option<f64>) -> String {
    let rate = uplink_bytes_s
        .map_or("no rate was measured".to_owned(), |rate| format!("{:.1} MB/s up", rate / 1e6));
    let rtt = rtt_s.map_or("no round trip was measured".to_owned(), |rtt| {
        format!("round trip {:.2} ms", rtt * 1e3)
    });
    format!("{rate}, {rtt}")
}

#[cfg(test)]
mod tests {
    use hat_engine::options::{CloudLimits, DeviceLimits};

    use super::*;

    #[test]
    fn a_link_that_shows_no_rate_has_none() {
        assert_eq!(link(Some(12.34e6), Some(0.01)), "12.3 MB/s up, round trip 10.00 ms");
        assert_eq!(link(None, Some(0.01)), "no rate was measured, round trip 10.00 ms");
        assert_eq!(link(None, None), "no rate was measured, no round trip was measured");
    }

    #[test]
    fn runs_of_layers_are_counted_as_people_do() {
        assert_eq!(runs(&[0..2, 30..30]).as_deref(), Some("layers 0 to 1"));
        assert_eq!(runs(&[0..1, 28..30]).as_deref(), Some("layer 0 and layers 28 to 29"));
        assert_eq!(runs(&[0..0, 5..6]).as_deref(), Some("layer 5"));
        assert_eq!(runs(&[]), None);
    }

    #[test]
    fn the_room_of_both_roles_is_the_same_by_default() {
        let device = room(DeviceLimits::default().sessions_of(8192), 8192);
        assert_eq!(device, "4 answers at once, of 8192 tokens each with its prompt");
        assert_eq!(room(CloudLimits::default().sessions_of(8192), 8192), device);
        assert_eq!(room(1, 100), "1 answer at once, of 100 tokens with its prompt");
    }
}
