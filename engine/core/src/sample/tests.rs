use proptest::prelude::*;

use super::*;

fn sampled(seed: u64) -> SamplerConfig {
    SamplerConfig { temperature: 1.0, seed, ..SamplerConfig::default() }
}

fn sampler(config: &SamplerConfig, vocab: usize) -> Sampler {
    Sampler::new(config.clone(), vocab, 0).unwrap()
}

fn token(config: &SamplerConfig, logits: &[f32], position: u32) -> TokenId {
    sampler(config, logits.len()).choose(logits, position).unwrap().token
}

/// Logits like a model's: a few high, a long tail. Exact: integers over 256.
fn model_like(vocab: usize, seed: u32) -> Vec<f32> {
    (0..vocab as u32)
        .map(|id| {
            let words = noise::philox([id, 0, 0, 9], [seed, 7]);
            let height = u64::from(words[0] >> 20);
            (height.pow(4) >> 36) as f32 / 256.0 - (words[1] % 1024) as f32 / 256.0
        })
        .collect()
}

/// The definition, without shortcuts: rank all, cut, add noise, take the largest.
fn by_definition(config: &SamplerConfig, logits: &[f32], position: u32) -> TokenId {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    // Equal as numbers is equal: -0 ties with 0, which `total_cmp` would tell apart.
    let descending = |a: f64, b: f64| b.partial_cmp(&a).expect("no NaN");
    let logit = |id: u32| f64::from(logits[id as usize]);
    ids.sort_by(|&a, &b| descending(logit(a), logit(b)).then(a.cmp(&b)));
    let max = logit(ids[0]);
    let share = |id: u32| exp(logit(id) - max);
    if config.top_k > 0 {
        ids.truncate(config.top_k as usize);
    }
    let mut by_id = ids.clone();
    by_id.sort_unstable();
    let wanted = f64::from(config.top_p) * by_id.iter().map(|&id| share(id)).sum::<f64>();
    if config.top_p < 1.0 {
        let mut sum = 0.0;
        let enough = ids.iter().position(|&id| {
            sum += share(id);
            sum >= wanted
        });
        ids.truncate(enough.map_or(ids.len(), |at| at + 1));
    }
    if config.min_p > 0.0 {
        let floor = max + ln(f64::from(config.min_p));
        ids.retain(|&id| logit(id) >= floor);
    }
    let mut scores: Vec<(f64, u32)> = ids
        .iter()
        .map(|&id| {
            let noise = noise::gumbel(Noise::new(config.seed, 0, position).word(id));
            (logit(id) / f64::from(config.temperature) + noise, id)
        })
        .collect();
    scores.sort_by(|a, b| descending(a.0, b.0).then(a.1.cmp(&b.1)));
    scores[0].1
}

#[test]
fn greedy_takes_the_argmax_and_the_lowest_id_among_equals() {
    let greedy = SamplerConfig::default();
    assert!(greedy.is_plain_greedy());
    assert_eq!(token(&greedy, &[1.0, 3.0, 3.0, -1.0], 0), 1);
    assert_eq!(token(&greedy, &[-0.0, 0.0, f32::NEG_INFINITY], 5), 0);
    let first_only = SamplerConfig { top_p: 0.0, ..sampled(0) };
    assert_eq!(token(&first_only, &[-0.0, 0.0], 0), 0);
    assert_eq!(token(&greedy, &[f32::NEG_INFINITY, -1e30], 5), 1);
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [0.0f32, 1.0, 2.0, -1.0, 0.5, 3.0, -3.0, 1.5];
    for temperature in [0.5f32, 1.0, 2.0] {
        let config = SamplerConfig { temperature, ..sampled(11) };
        let mut sampler = sampler(&config, logits.len());
        let draws = 20_000u32;
        let mut counts = [0u32; 8];
        for position in 0..draws {
            counts[sampler.choose(&logits, position).unwrap().token as usize] += 1;
        }
        let shares = logits.map(|logit| (f64::from(logit) / f64::from(temperature)).exp());
        let mass: f64 = shares.iter().sum();
        let chi_square: f64 = counts
            .iter()
            .zip(shares)
            .map(|(&count, share)| {
                let expected = f64::from(draws) * share / mass;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        // 7 degrees of freedom: 24.3 is passed once in a thousand. The seed is fixed.
        assert!(chi_square < 24.3, "T {temperature}: {chi_square}, {counts:?}");
        assert!(chi_square > 0.3, "suspiciously even: {chi_square}");
    }
}

#[test]
fn filters_keep_what_they_say() {
    // Probabilities 0.5, 0.25, 0.125, 0.125 by construction.
    let ln2 = std::f32::consts::LN_2;
    let logits = [-2.0 * ln2, 0.0, -2.0 * ln2, -ln2];
    let reach = |edit: &dyn Fn(&mut SamplerConfig)| {
        let mut config = SamplerConfig { temperature: 100.0, ..sampled(3) };
        edit(&mut config);
        let mut sampler = sampler(&config, 4);
        let mut seen: Vec<u32> =
            (0..400).map(|at| sampler.choose(&logits, at).unwrap().token).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    };
    assert_eq!(reach(&|_| ()), [0, 1, 2, 3]);
    assert_eq!(reach(&|c| c.top_k = 1), [1]);
    assert_eq!(reach(&|c| c.top_k = 3), [0, 1, 3], "of equals the lower id");
    assert_eq!(reach(&|c| c.top_k = 9), [0, 1, 2, 3]);
    assert_eq!(reach(&|c| c.top_p = 0.0), [1]);
    assert_eq!(reach(&|c| c.top_p = 0.49), [1]);
    assert_eq!(reach(&|c| c.top_p = 0.6), [1, 3]);
    assert_eq!(reach(&|c| c.top_p = 0.76), [0, 1, 3]);
    assert_eq!(reach(&|c| (c.top_k, c.top_p) = (2, 0.66)), [1], "share of what top_k leaves");
    assert_eq!(reach(&|c| c.min_p = 1.0), [1]);
    assert_eq!(reach(&|c| c.min_p = 0.4), [1, 3]);
    assert_eq!(reach(&|c| c.min_p = 0.24), [0, 1, 2, 3]);
}

#[test]
fn penalties_and_bias() {
    let logits = [2.0f32, 1.9, -1.0, -1.2];
    let with = |edit: &dyn Fn(&mut SamplerConfig), path: &[u32]| {
        let mut config = SamplerConfig::default();
        edit(&mut config);
        assert!(!config.is_plain_greedy());
        let mut sampler = sampler(&config, 4);
        path.iter().for_each(|&token| sampler.accept(token));
        sampler.choose(&logits, 9).unwrap()
    };
    assert_eq!(with(&|c| c.repetition_penalty = 2.0, &[0]), Choice { token: 1, logit: 1.9 });
    assert_eq!(with(&|c| c.repetition_penalty = 4.0, &[0, 1]), Choice { token: 0, logit: 0.5 });
    assert_eq!(with(&|c| c.presence_penalty = 0.5, &[0, 0]), Choice { token: 1, logit: 1.9 });
    let once = with(&|c| c.frequency_penalty = 0.06, &[0]);
    assert_eq!(once.token, 0, "once is not enough");
    assert_eq!(with(&|c| c.frequency_penalty = 0.06, &[0, 0]).token, 1, "twice is");
    assert_eq!(with(&|c| c.logit_bias = vec![(3, 100.0)], &[]), Choice { token: 3, logit: 98.8 });
    let windowed = |n: u32, path: &[u32]| {
        with(&|c| (c.repetition_penalty, c.penalty_last_n) = (2.0, n), path).token
    };
    assert_eq!(windowed(2, &[0, 2, 3]), 0, "out of the window");
    assert_eq!(windowed(3, &[0, 2, 3]), 1);
    assert_eq!(windowed(u32::MAX, &[0, 2, 3, 2, 3, 2]), 1);
}

#[test]
fn what_is_no_number_is_refused() {
    for config in [SamplerConfig::default(), sampled(0)] {
        let mut sampler = sampler(&config, 3);
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(
                sampler.choose(&[0.0, bad, 1.0], 6),
                Err(SampleError::NotFinite { token: 1, position: 6 })
            );
        }
        assert_eq!(
            sampler.choose(&[f32::NEG_INFINITY; 3], 6),
            Err(SampleError::Empty { position: 6 })
        );
        let only = [f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY];
        assert_eq!(sampler.choose(&only, 6).unwrap().token, 1);
    }
}

#[test]
fn fields_out_of_range_are_named() {
    let check = |edit: &dyn Fn(&mut SamplerConfig)| {
        let mut config = SamplerConfig::default();
        edit(&mut config);
        Sampler::new(config, 10, 0).err().expect("refused").to_string()
    };
    assert_eq!(check(&|c| c.temperature = -1.0), "temperature: -1 is not in 0..=100");
    assert_eq!(check(&|c| c.temperature = f32::NAN), "temperature: NaN is not in 0..=100");
    assert!(check(&|c| c.temperature = f32::INFINITY).starts_with("temperature: inf"));
    assert!(check(&|c| c.top_p = -1.0).starts_with("top_p"));
    assert!(check(&|c| c.top_p = 1.01).starts_with("top_p"));
    assert!(check(&|c| c.min_p = 2.0).starts_with("min_p"));
    assert!(check(&|c| c.repetition_penalty = 0.0).starts_with("repetition_penalty"));
    assert!(check(&|c| c.presence_penalty = 1e9).starts_with("presence_penalty"));
    assert!(check(&|c| c.frequency_penalty = -1e9).starts_with("frequency_penalty"));
    assert_eq!(check(&|c| c.logit_bias = vec![(10, 0.0)]), "logit_bias: token 10 is not in 0..10");
    assert!(check(&|c| c.logit_bias = vec![(9, 101.0)]).starts_with("logit_bias: 101"));
    assert!(check(&|c| c.logit_bias = vec![(0, 0.0); 1025]).contains("1025 entries"));
}

/// Frozen: a change here changes what a seed means to users. The numbers come from a second
/// implementation of the definition, in another language.
#[test]
fn choices_are_frozen() {
    let logits = model_like(1000, 1);
    let all = sampled(42);
    let filtered =
        SamplerConfig { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.02, ..sampled(42) };
    let run = |config: &SamplerConfig| -> Vec<u32> {
        (0..8).map(|position| token(config, &logits, position)).collect()
    };
    assert_ne!(run(&sampled(43)), run(&all));
    assert_eq!(run(&all), [118, 781, 118, 816, 263, 994, 664, 816]);
    assert_eq!(run(&filtered), [118, 118, 118, 816, 263, 994, 664, 816]);
    let second = Sampler::new(all, 1000, 1).unwrap().choose(&logits, 0).unwrap();
    assert_eq!(second.token, 118);
}

#[test]
fn log_probabilities_are_those_of_the_softmax() {
    let mut out = Vec::new();
    let logits = [1.0f32, 4.0, 2.0, 4.0, f32::NEG_INFINITY];
    let mass: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let expect = |l: f32| (f64::from(l) - mass.ln()) as f32;
    let chosen = log_probabilities(&logits, 0, 2, 3, &mut out).unwrap();
    assert!((chosen - expect(2.0)).abs() < 1e-6);
    assert_eq!(out.iter().map(|entry| entry.0).collect::<Vec<_>>(), [1, 3, 2]);
    assert!((out[0].1 - expect(4.0)).abs() < 1e-6 && out[2].1 == chosen);
    log_probabilities(&logits, 0, 2, 0, &mut out).unwrap();
    assert!(out.is_empty());
    log_probabilities(&logits, 0, 2, 20, &mut out).unwrap();
    assert_eq!(out.len(), 5);
    assert!(log_probabilities(&[f32::NAN], 3, 0, 1, &mut out).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Partial selection and passing over hopeless tokens change nothing.
    #[test]
    fn shortcuts_equal_the_definition(
        seed in any::<u64>(), kind in 0u32..1000, vocab in 1usize..700, position in any::<u32>(),
        top_k in 0u32..200, top_p in 0.0f32..=1.2, min_p in 0.0f32..0.3,
        temperature in 0.05f32..3.0,
        coarse in any::<bool>(),
    ) {
        let mut logits = model_like(vocab, kind);
        if coarse {
            // Many equal logits.
            logits.iter_mut().for_each(|logit| *logit = logit.round());
        }
        let config = SamplerConfig {
            temperature, top_k, top_p: top_p.min(1.0), min_p, seed, ..SamplerConfig::default()
        };
        let expected = by_definition(&config, &logits, position);
        prop_assert_eq!(token(&config, &logits, position), expected);
    }

    /// A path before the window says nothing.
    #[test]
    fn a_long_path_chooses_as_its_last_tokens_do(
        path in prop::collection::vec(0u32..6, 0..60),
        last_n in 0u32..8,
    ) {
        let config = SamplerConfig {
            repetition_penalty: 1.3, presence_penalty: 0.1, frequency_penalty: 0.2,
            penalty_last_n: last_n, ..sampled(5)
        };
        let (mut whole, mut window) = (sampler(&config, 6), sampler(&config, 6));
        path.iter().for_each(|&token| whole.accept(token));
        path.iter().rev().take(last_n as usize).for_each(|&token| window.accept(token));
        let logits = [0.3f32, 0.2, 0.1, -0.1, 0.0, 0.25];
        for position in 0..20 {
            let expected = window.choose(&logits, position).unwrap();
            prop_assert_eq!(whole.choose(&logits, position).unwrap(), expected);
        }
    }
}
