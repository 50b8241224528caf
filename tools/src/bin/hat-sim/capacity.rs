//! Clients that one cloud serves within a time between tokens: ours, beside a server that holds the
//! whole model and streams text.

use anyhow::ensure;
use clap::Args;
use hat_program::outln;
use hat_tools::statistics::quantile;
use indicatif::ProgressBar;
use serde_json::json;

use crate::costs::CostFile;
use crate::figures::Figures;
use crate::policy::Policy;
use crate::simulation::Run;
use crate::text::Predictability;

/// Most clients of a search.
const CLIENTS_MAX: usize = 1000;
/// A search ends when it knows the number to this share.
const EXACT: f64 = 0.04;

#[derive(Args)]
pub(crate) struct CapacityArgs {
    /// specbench-7b, cnndm-13b, this-machine, or the path of a cost file.
    #[arg(long, value_name = "NAME|PATH", default_value = "specbench-7b")]
    workload: String,
    /// Policies, by name.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    #[arg(default_value = "ours,cloud-only,cloud-only+drafts")]
    policies: Vec<String>,
    /// Milliseconds between tokens that 99 of 100 requests keep within, each by its mean.
    #[arg(long, value_name = "N", default_value_t = 80.0)]
    tbt_ms: f64,
    /// Milliseconds to the first token that 99 of 100 requests keep within.
    #[arg(long, value_name = "N", default_value_t = 5000.0)]
    ttft_ms: f64,
    /// Round-trip times of the devices' links in milliseconds.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "10,20,40,80")]
    rtt_ms: Vec<f64>,
    /// Speeds of the devices: how many times that of the workload's.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0.5,1,4")]
    speeds: Vec<f64>,
    /// Requests of each client, one after the other, 2 to 100.
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u64).range(2..=100))]
    requests: u64,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print the figures as one line of JSON, the last.
    #[arg(long)]
    json: bool,
}

/// Clients served, and how.
struct Served {
    clients: usize,
    figures: Option<Figures>,
}

struct Search<'a> {
    file: CostFile,
    predictability: &'a Predictability,
    policy: Policy,
    args: &'a CapacityArgs,
    bar: &'a ProgressBar,
}

impl Search<'_> {
    /// Figures of so many clients, each of which asks again when it has its answer.
    fn figures(&self, clients: usize) -> anyhow::Result<Figures> {
        let file = self.file.clone().with_devices(clients);
        let requests = clients * self.args.requests as usize;
        let run = Run { requests, closed: true, ..Run::of(&self.policy, self.args.seed) };
        self.bar.set_message(format!("{}, {clients} clients", self.policy.name));
        Figures::run(&file, self.predictability, run, &mut |_| self.bar.tick())
    }

    /// The most clients that are served in time.
    fn served(&self) -> anyhow::Result<Served> {
        let in_time = |figures: &Figures| {
            quantile(&figures.tbt_ms, 0.99) <= self.args.tbt_ms
                && quantile(&figures.ttft_ms, 0.99) <= self.args.ttft_ms
        };
        let (mut served, mut beyond) = (Served { clients: 0, figures: None }, CLIENTS_MAX + 1);
        let mut clients = 32;
        while (beyond - served.clients) as f64 > 1.0 + EXACT * served.clients as f64 {
            let figures = self.figures(clients)?;
            match in_time(&figures) {
                true => served = Served { clients, figures: Some(figures) },
                false => beyond = clients,
            }
            clients = match (served.clients, beyond > CLIENTS_MAX) {
                (served, true) => (2 * served).min(CLIENTS_MAX),
                (served, false) => usize::midpoint(served, beyond),
            };
        }
        Ok(served)
    }
}

/// Cost to a server of drafting beside the target, as a share of a step: by that share more clients
/// are served if the devices draft (arXiv 2606.25091: `1 + gamma t_draft / t_verify`).
fn bought_by_drafting(file: &CostFile) -> anyhow::Result<f64> {
    let server = file.server(&Policy::named("cloud-only+drafts")?);
    let levels = server.levels(Policy::ours().drafts.nodes_max + 1) as f64;
    Ok(1.0 + levels * server.draft.read_s / server.work.read_s)
}

pub(crate) fn capacity(args: &CapacityArgs) -> anyhow::Result<()> {
    let positive = |numbers: &[f64]| numbers.iter().all(|number| (1e-3..=1e4).contains(number));
    ensure!(positive(&[args.tbt_ms]), "--tbt-ms: allowed are 0.001 to 10000");
    ensure!(args.ttft_ms > 0.0, "--ttft-ms: {} is not positive", args.ttft_ms);
    ensure!(positive(&args.rtt_ms), "--rtt-ms: allowed are 0.001 to 10000");
    ensure!(positive(&args.speeds), "--speeds: allowed are 0.001 to 10000");
    let file = CostFile::open(&args.workload)?;
    let predictability = Predictability::fit(&file.drafters);
    let bar = ProgressBar::new_spinner();
    outln!("{}", file.describe())?;
    let (tbt_ms, ttft_ms) = (args.tbt_ms, args.ttft_ms);
    outln!("clients within {tbt_ms} ms between tokens and {ttft_ms} ms to the first (p99)")?;
    let bought = bought_by_drafting(&file)?;
    outln!("bought by drafting on devices, whole trees: {bought:.3}\n")?;
    outln!("| policy | RTT ms | device speed | clients | {}", &Figures::HEAD[9..])?;
    outln!("|---|---|---|---|---|---|---|---|---|---|---|---|")?;
    let mut all = vec![];
    for name in &args.policies {
        let policy = Policy::named(name)?;
        // Nothing of a server's time between tokens is the link's or a device's.
        let (rtts, speeds) = match policy.place {
            crate::policy::Place::Cloud => (&args.rtt_ms[..1], &args.speeds[..1]),
            crate::policy::Place::Device => (&args.rtt_ms[..], &args.speeds[..]),
        };
        for (rtt_ms, speed) in rtts.iter().flat_map(|rtt| speeds.iter().map(move |it| (rtt, it))) {
            let mut file = file.clone();
            file.link.one_way_ms = rtt_ms / 2.0;
            for kind in &mut file.devices {
                kind.read_gb_s *= speed;
                kind.tera_flop_s *= speed;
            }
            let (predictability, policy) = (&predictability, policy.clone());
            let served = Search { file, predictability, policy, args, bar: &bar }.served()?;
            let row = served.figures.as_ref().map(Figures::row).unwrap_or_default();
            let row = row.splitn(3, '|').nth(2).unwrap_or(" nobody is served in time |");
            outln!("| {name} | {rtt_ms} | {speed} | {} |{row}", served.clients)?;
            all.push(json!({
                "policy": name, "rtt_ms": rtt_ms, "speed": speed, "clients": served.clients,
                "figures": served.figures.as_ref().map(Figures::json),
            }));
        }
    }
    bar.finish_and_clear();
    if args.json {
        outln!("{}", json!({ "capacity": all, "bought_by_drafting": bought }))?;
    }
    Ok(())
}
