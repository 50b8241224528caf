//! Invariants of any simulation, and the exact times of one device alone.

use super::*;
use crate::figures::Figures;
use crate::policy::{ABLATION, Proposer};

const ALL: [&str; 6] =
    ["u-sarathi", "u-medusa", "lookup", "auto", "cloud-only", "cloud-only+drafts"];

fn file(name: &str) -> CostFile {
    CostFile::open(name).unwrap()
}

fn run(policy: &str, seed: u64, rate: f64, requests: usize) -> Run {
    Run { rate, requests, ..Run::of(&Policy::named(policy).unwrap(), seed) }
}

fn lived<'a>(file: &'a CostFile, predictability: &Predictability, run: Run) -> Simulation<'a> {
    let mut simulation = Simulation::new(file, predictability, run);
    simulation.simulate(&mut |_| {});
    assert_eq!(simulation.failed, [""; 0]);
    simulation
}

impl Simulation<'_> {
    /// True if nothing is on its way, and nothing is held.
    fn is_quiet(&self) -> bool {
        let runs = |device: &crate::bed::Device| device.core.running() + device.core.waiting() > 0;
        let mut clouds = self.bed.clouds.iter();
        let (small, large) = self.pool.free();
        // Each end of a connection has a buffer for PING and its like, and one to receive into.
        let all = (1 << 12) + SMALL_EACH as usize * self.kinds.len();
        let held = (all - small) + (LARGE as usize - large);
        !self.bed.devices.iter().any(runs)
            && clouds.all(|cloud| cloud.is_idle() && cloud.core.figures().sessions == 0)
            && held <= 4 * self.dialled.len()
    }
}

fn figures(file: &CostFile, policy: &str, seed: u64, rate: f64, requests: usize) -> Figures {
    let predictability = Predictability::fit(&file.drafters);
    Figures::of(&lived(file, &predictability, run(policy, seed, rate, requests)))
}

/// One device of the first kind, whose link and prompts are all alike.
fn alone() -> CostFile {
    let mut file = file("specbench-7b");
    file.devices.truncate(1);
    file.devices[0].count = 1;
    file.workload.prompts.truncate(1);
    file.workload.prompts[0].sigma = 1e-9;
    file
}

#[test]
fn every_request_ends_with_its_text_under_every_policy() {
    let mut file = file("specbench-7b");
    file.workload.new_tokens = 40;
    let predictability = Predictability::fit(&file.drafters);
    for policy in ABLATION.into_iter().chain(ALL) {
        let simulation = lived(&file, &predictability, run(policy, 3, 6.0, 40));
        assert_eq!(simulation.over, 40, "{policy}");
        for request in simulation.requests() {
            let timings = request.timings.as_ref().unwrap();
            assert_eq!((request.emitted, timings.predicted_n), (40, 40), "{policy}");
            let sent: u32 = timings.chunks.iter().sum();
            let known = timings.pages_reused * 32;
            assert_eq!(sent + known, request.ask.prompt_rows, "{policy}");
            assert!(known == 0 || simulation.run.policy.prefix, "{policy}");
            if simulation.run.policy.draft == hat_engine::options::DraftMode::Off {
                assert_eq!((request.rows_up, timings.rounds), (39, 39), "{policy}");
            }
            assert!(timings.rounds <= 39, "{policy}");
            assert!(request.ask.at_s < request.first_s && request.first_s < request.last_s);
        }
        let reused = simulation.requests().iter().filter_map(|request| request.timings.as_ref());
        let reused: u32 = reused.map(|timings| timings.pages_reused).sum();
        assert_eq!(reused > 0, simulation.run.policy.prefix, "{policy}");
        assert!(simulation.is_quiet(), "{policy}");
    }
}

#[test]
fn a_seed_fixes_everything_and_another_changes_it() {
    let file = file("specbench-7b");
    let first = figures(&file, "ours", 1, 6.0, 40);
    assert_eq!(first, figures(&file, "ours", 1, 6.0, 40));
    assert_ne!(first.ttft_ms, figures(&file, "ours", 2, 6.0, 40).ttft_ms);
}

#[test]
fn one_device_alone_takes_the_sum_of_its_parts() {
    let mut file = alone();
    file.link.up_mb_s = [6.0, 6.0];
    file.link.down_mb_s = [12.0, 12.0];
    file.link.one_way_ms = 3.0;
    let predictability = Predictability::fit(&file.drafters);
    let simulation = lived(&file, &predictability, run("u-shape", 1, 0.01, 3));
    let device = file.device(&file.devices[0], Place::Device);
    let row_bytes = simulation.run.policy.codec.row_bytes(file.model.hidden_size) as f64;
    let stages = f64::from(file.cloud.stages);
    let server = file.server(&simulation.run.policy);
    // A frame has 56 bytes beside its rows, seven of which fit one.
    let trip = |rows: u32, context: u32| {
        device.layers.seconds(rows as usize)
            + (f64::from(rows) * row_bytes + 56.0 * (f64::from(rows) / 7.0).ceil()) / 6e6
            + stages * server.rows_seconds(rows as usize, context as usize)
            + (row_bytes + 56.0) / 12e6
            + 2.0 * 3e-3
            + device.head.seconds(1)
    };
    // A session is opened first.
    let open_s = 2.0 * 3e-3 + 150.0 / 6e6;
    for request in simulation.requests() {
        let rows = request.ask.prompt_rows;
        let (took_s, expected_s) = (request.first_s - request.ask.at_s, open_s + trip(rows, 0));
        assert!((took_s / expected_s - 1.0).abs() < 1e-3, "{took_s} s, {expected_s} s expected");
        let expected_s: f64 = (0..127).map(|token| trip(1, rows + token)).sum();
        let took_s = request.last_s - request.first_s;
        assert!((took_s / expected_s - 1.0).abs() < 1e-3, "{took_s} s, {expected_s} s expected");
    }
}

/// The chunk sizer's recurrence and the world agree, once a device has measured its world.
#[test]
fn a_prompt_in_chunks_takes_what_the_planner_says() {
    let mut file = alone();
    // Arithmetic alone, so that times are lines; no waiting for a step.
    file.model.layer_bytes = 1.0;
    file.model.kv_bytes = 0.0;
    file.link.up_mb_s = [7.5, 7.5];
    file.link.down_mb_s = [12.5, 12.5];
    file.workload.prompts[0].mean_rows = 1000.0;
    file.workload.new_tokens = 4;
    let predictability = Predictability::fit(&file.drafters);
    for policy in ["hat+auto", "hat"] {
        let simulation = lived(&file, &predictability, run(policy, 1, 0.01, 8));
        let timings = simulation.requests()[7].timings.as_ref().unwrap();
        let ratio = timings.ttft_ms / timings.ttft_predicted_ms;
        assert!(timings.chunks.len() > 2, "{policy}: {:?}", timings.chunks);
        assert!((ratio - 1.0).abs() < 0.05, "{policy}: {ratio}, {:?}", timings.chunks);
    }
}

type Change<'a> = &'a dyn Fn(&mut CostFile);

#[test]
fn better_machines_and_links_never_take_longer() {
    let base = alone();
    let at = |policy: &str, change: Change<'_>| {
        let mut file = base.clone();
        change(&mut file);
        let figures = figures(&file, policy, 1, 0.01, 24);
        (figures.ttft(), figures.tbt())
    };
    // What adapts tries the worse way too, and learns by what it happens to see.
    for (policy, slack) in [("u-shape", 1.001), ("hat", 1.001), ("ours", 1.1)] {
        let (ttft, tbt) = at(policy, &|_| {});
        let better: [(&str, Change<'_>); 4] = [
            ("uplink", &|file| file.link.up_mb_s = [20.0, 20.0]),
            ("stage", &|file| file.calibrated.cloud_read.value *= 1.3),
            ("device", &|file| file.calibrated.device_read.value *= 1.3),
            ("latency", &|file| file.link.one_way_ms = 0.1),
        ];
        for (name, change) in better {
            let (ttft_better, tbt_better) = at(policy, change);
            assert!(ttft_better <= ttft * slack, "{policy}, {name}: {ttft_better}, {ttft} before");
            assert!(tbt_better < tbt * slack, "{policy}, {name}: {tbt_better}, {tbt} before");
        }
        let surer = at(policy, &|file| file.drafters.adapter.tokens = 2.6);
        if policy != "u-shape" {
            let most = if policy == "ours" { tbt * slack } else { tbt };
            assert!(surer.1 < most, "{policy}: a better drafter, {} and {tbt}", surer.1);
        }
    }
}

#[test]
fn more_load_takes_longer_where_prompts_are_not_cut() {
    let file = file("specbench-7b");
    let tbt = [1.0, 3.0, 6.0].map(|rate| figures(&file, "u-shape", 1, rate, 100).tbt());
    assert!(tbt[0] < tbt[1] && tbt[1] < tbt[2], "{tbt:?}");
}

/// Chunks of 32 rows, in a cloud that bounds its steps by time at the load of the paper.
#[test]
fn a_full_cloud_that_cuts_its_steps_starves_no_prompt() {
    let file = file("specbench-7b");
    let [whole, cut] = ["hat", "hat+cut"].map(|policy| figures(&file, policy, 1, 6.0, 150).ttft());
    assert!(cut < 3.0 * whole, "{cut} to the first token, {whole} where nothing is cut");
}

#[test]
fn each_switch_does_what_it_says() {
    let file = file("specbench-7b");
    let of = |policy: &str| figures(&file, policy, 1, 3.0, 80);
    let [plain, chunks, hat] = ["u-shape", "pc", "hat"].map(of);
    assert_eq!(plain.accept_len, 1.0);
    assert!(chunks.ttft() < plain.ttft() && chunks.chunks > plain.chunks);
    let stated = file.drafters.adapter.tokens;
    assert!((hat.accept_len / stated - 1.0).abs() < 0.03, "{}", hat.accept_len);
    let short = of("hat+int8");
    let ratio = short.bytes_up / hat.bytes_up;
    assert!((ratio - 34.0 / 64.0).abs() < 0.01, "{ratio}");
    assert!(of("hat+prefix").bytes_up < hat.bytes_up - 10.0 * 8192.0);
    assert!(of("hat+tree+lookup").accept_len > of("hat+tree").accept_len + 0.2);
    assert!(of("sd+pc").tbt() > hat.tbt(), "drafting ahead saves time");
    let levels = of("hat+levels");
    assert!((levels.accept_len / hat.accept_len - 1.0).abs() < 1e-3);
    assert!(levels.tbt() < 0.995 * hat.tbt(), "a level on its way is not waited for");
    assert!(of("hat+heads").tbt() > hat.tbt(), "rows go through the head one by one");
    assert!(of("ours+ahead").tbt() < of("ours").tbt());
}

/// The engine's rule: more rows go up while others are away only where the link is long against a
/// step.
#[test]
fn drafts_are_sent_ahead_where_the_link_is_long_and_nowhere_else() {
    let mut file = alone();
    let mut without = Policy::named("ours").unwrap();
    without.drafts.batch_nodes = 0;
    let predictability = Predictability::fit(&file.drafters);
    let mut both = |one_way_ms: f64| {
        file.link.one_way_ms = one_way_ms;
        let of = |run: Run| Figures::of(&lived(&file, &predictability, run));
        let without = Run { rate: 0.01, requests: 24, ..Run::of(&without, 1) };
        (of(run("ours", 1, 0.01, 24)), of(without))
    };
    let (with, without) = both(1.0);
    assert_eq!(with, without, "steps of 26 ms, and 3 ms of link");
    let (with, without) = both(60.0);
    assert_ne!(with.rows_a_token, without.rows_a_token);
    let ratio = with.tbt() / without.tbt();
    assert!(ratio < 1.0, "{ratio}");
}

/// A server that streams text: the link is in the time to the first token and in no other.
#[test]
fn text_from_a_server_does_not_wait_for_the_link() {
    let mut file = alone();
    let at = |file: &CostFile, policy: &str| figures(file, policy, 1, 0.01, 8);
    for policy in ["cloud-only", "cloud-only+drafts"] {
        let near = at(&file, policy);
        file.link.one_way_ms = 40.0;
        let far = at(&file, policy);
        assert!((far.tbt() / near.tbt() - 1.0).abs() < 1e-6, "{policy}");
        assert!((far.ttft() - near.ttft() - 78.0).abs() < 0.1, "{policy}");
        file.link.one_way_ms = 1.0;
        assert!(Policy::named(policy).unwrap().proposer != Proposer::Heads);
    }
    let plain = at(&file, "cloud-only");
    let stage_s = file.server(&Policy::named("cloud-only").unwrap()).rows_seconds(1, 200);
    assert!((plain.tbt() / (4e3 * stage_s) - 1.0).abs() < 0.02, "{}", plain.tbt());
    assert!(at(&file, "cloud-only+drafts").tbt() < 0.6 * plain.tbt());
}
