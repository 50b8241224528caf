//! Cost files: a model cut in two, machines, a link, requests. They say what things cost, never
//! who pays: policies differ by values of the engine's cores alone ([`crate::policy`]).

use anyhow::{Context as _, bail, ensure};
use hat_core::draft::DraftPolicy;
use hat_plan::AttendBatch;
use serde::Deserialize;

use crate::policy::{Place, Policy};

/// Cost files that come with the tool, by name.
pub(crate) const BUILT_IN: [(&str, &str); 4] = [
    ("specbench-7b", include_str!("costs/specbench-7b.json")),
    ("cnndm-13b", include_str!("costs/cnndm-13b.json")),
    ("cnndm-13b-761", include_str!("costs/cnndm-13b-761.json")),
    ("this-machine", include_str!("costs/this-machine.json")),
];

/// One testbed and what is asked of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CostFile {
    pub(crate) name: String,
    /// Source of the facts.
    pub(crate) source: String,
    pub(crate) model: Model,
    pub(crate) devices: Vec<DeviceKind>,
    pub(crate) cloud: Cloud,
    pub(crate) link: Link,
    pub(crate) calibrated: Calibrated,
    pub(crate) workload: Workload,
    pub(crate) drafters: Drafters,
    #[serde(default)]
    pub(crate) published: Vec<Published>,
}

/// Sizes of a model and its cut.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) hidden_size: usize,
    pub(crate) device_layers: u32,
    pub(crate) cloud_layers: u32,
    /// Parameters of one decoder layer, and bytes read to use them once.
    pub(crate) layer_params: f64,
    pub(crate) layer_bytes: f64,
    /// The same of the LM head.
    pub(crate) head_params: f64,
    pub(crate) head_bytes: f64,
    pub(crate) vocab_size: u32,
    /// Bytes of KV that a row of one sequence reads in one layer for each row before it.
    pub(crate) kv_bytes: f64,
}

/// Devices that are alike.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceKind {
    pub(crate) name: String,
    pub(crate) count: usize,
    /// Memory bandwidth of the data sheet, or as measured.
    pub(crate) read_gb_s: f64,
    /// Arithmetic rate of the data sheet, or as measured.
    pub(crate) tera_flop_s: f64,
}

/// The cloud: a pipeline of equal stages.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cloud {
    pub(crate) stages: u32,
    pub(crate) read_gb_s: f64,
    pub(crate) tera_flop_s: f64,
    /// Rows of a step, where the policy has a budget.
    pub(crate) rows_max: u32,
}

/// Rates of the devices' links: evenly spaced between the two ends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Link {
    pub(crate) up_mb_s: [f64; 2],
    pub(crate) down_mb_s: [f64; 2],
    pub(crate) one_way_ms: f64,
}

/// Costs that no source states: found from the published U-shape rows alone, or measured.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Calibrated {
    /// Share of the memory bandwidth that a device's kernels reach.
    pub(crate) device_read: Ranged,
    /// Share of the arithmetic rate.
    pub(crate) device_compute: Ranged,
    pub(crate) cloud_read: Ranged,
    pub(crate) cloud_compute: Ranged,
    /// Cost to the sender of handing a message over, beside its bytes.
    pub(crate) message_ms: Ranged,
}

/// A number and where it may lie.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ranged {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Calibrated {
    /// Names in files and tables, in the order of [`Calibrated::each`].
    pub(crate) const NAMES: [&str; 5] =
        ["device_read", "device_compute", "cloud_read", "cloud_compute", "message_ms"];

    pub(crate) fn each(&self) -> [Ranged; 5] {
        [
            self.device_read,
            self.device_compute,
            self.cloud_read,
            self.cloud_compute,
            self.message_ms,
        ]
    }

    pub(crate) fn each_mut(&mut self) -> [&mut Ranged; 5] {
        [
            &mut self.device_read,
            &mut self.device_compute,
            &mut self.cloud_read,
            &mut self.cloud_compute,
            &mut self.message_ms,
        ]
    }
}

/// Requests.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Workload {
    /// Requests a second over all devices, unless a flag says otherwise.
    pub(crate) rate: f64,
    pub(crate) new_tokens: u32,
    /// Lognormal parts of the prompt lengths.
    pub(crate) prompts: Vec<PromptPart>,
    /// Rows at the front of each prompt that the device has sent before: a system prompt.
    pub(crate) known_rows: u32,
    /// Longest prompt and answer together.
    pub(crate) context_max: u32,
}

/// Prompts of one kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PromptPart {
    pub(crate) share: f64,
    pub(crate) mean_rows: f64,
    /// Of the logarithm.
    pub(crate) sigma: f64,
}

/// Drafters, and the quality of each.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drafters {
    /// Tokens a round of the adapter's chain: threshold 0.6, at most 6 drafts.
    pub(crate) adapter: Drafter,
    /// Tokens a round of a tree of 8 nodes from heads over the last deep row.
    pub(crate) heads: Drafter,
    /// Tokens a round of prompt lookup alone, 10 drafts.
    pub(crate) lookup_tokens: f64,
    /// Probability that a copied run of words goes on.
    pub(crate) lookup_goes_on: f64,
    /// Spread of confidences over the positions of a text: the logistic scale of their logits.
    pub(crate) spread: f64,
    /// Loss of a logit with each draft step.
    pub(crate) fall: f64,
    /// Shares of what the first draft leaves, of the second draft and those that follow.
    pub(crate) ranks: Vec<f64>,
    /// Tokens that the draft head tells apart where a policy asks for a short one.
    pub(crate) short_vocab: u32,
}

/// A model that drafts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drafter {
    pub(crate) params: f64,
    pub(crate) bytes: f64,
    /// Tokens a round, the decided one included, with the rule that is stated beside it.
    pub(crate) tokens: f64,
}

/// A published figure.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Published {
    pub(crate) policy: String,
    /// Of which table.
    pub(crate) table: String,
    pub(crate) rate: f64,
    pub(crate) ttft_ms: Option<f64>,
    pub(crate) tbt_ms: Option<f64>,
    /// Mean and standard deviation of a batch's delay in the cloud.
    pub(crate) step_ms: Option<[f64; 2]>,
    /// By what share HAT's TBT is below this one.
    pub(crate) tbt_cut: Option<f64>,
    /// Of decoding, against U-shape, one device alone.
    pub(crate) speed_up: Option<f64>,
    /// True if calibration may use it.
    pub(crate) calibrates: bool,
}

impl CostFile {
    /// A file that comes with the tool, by its name, or one at a path.
    pub(crate) fn open(name: &str) -> anyhow::Result<Self> {
        let text = match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => (*text).to_owned(),
            None => {
                let names: Vec<&str> = BUILT_IN.iter().map(|(known, _)| *known).collect();
                std::fs::read_to_string(name).with_context(|| {
                    format!(
                        "cost file {name:?} is none of {}, nor a readable file",
                        names.join(", ")
                    )
                })?
            }
        };
        Self::parse(&text).with_context(|| format!("cost file {name:?}"))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let file: Self = serde_json::from_str(text)?;
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.model.hidden_size.is_multiple_of(32), "hidden_size: no multiple of 32");
        ensure!((1..=64).contains(&self.cloud.stages), "cloud.stages: allowed are 1 to 64");
        ensure!(
            (64..=4096).contains(&self.cloud.rows_max),
            "cloud.rows_max: allowed are 64 to 4096"
        );
        ensure!(
            (2..=4096).contains(&self.workload.new_tokens),
            "new_tokens: allowed are 2 to 4096"
        );
        ensure!(
            (self.workload.new_tokens + 2..=8192).contains(&self.workload.context_max),
            "context_max: allowed are new_tokens + 2 to 8192"
        );
        let devices: usize = self.devices.iter().map(|kind| kind.count).sum();
        ensure!((1..=10_000_000).contains(&devices), "devices: 1 to 10000000 are allowed");
        for (name, number) in self.positive() {
            ensure!(number.is_finite() && number > 0.0, "{name}: {number} is not positive");
        }
        for (name, ranged) in Calibrated::NAMES.iter().zip(self.calibrated.each()) {
            let Ranged { value, low, high } = ranged;
            ensure!(
                low >= 0.0 && low <= value && value <= high && high < 1e3,
                "{name}: out of range"
            );
        }
        ensure!(self.drafters.ranks.iter().sum::<f64>() < 1.0, "ranks: more than all");
        ensure!(
            (0.0..1.0).contains(&self.drafters.lookup_goes_on),
            "lookup_goes_on: no probability"
        );
        if self.workload.prompts.is_empty() {
            bail!("workload.prompts: empty");
        }
        Ok(())
    }

    fn positive(&self) -> Vec<(&'static str, f64)> {
        let Self { model, cloud, link, workload, drafters, .. } = self;
        let mut numbers = vec![
            ("layer_params", model.layer_params),
            ("layer_bytes", model.layer_bytes),
            ("head_params", model.head_params),
            ("head_bytes", model.head_bytes),
            ("vocab_size", f64::from(model.vocab_size)),
            ("cloud.read_gb_s", cloud.read_gb_s),
            ("cloud.tera_flop_s", cloud.tera_flop_s),
            ("link.up_mb_s", link.up_mb_s[0]),
            ("link.up_mb_s", link.up_mb_s[1] - link.up_mb_s[0] + f64::MIN_POSITIVE),
            ("link.down_mb_s", link.down_mb_s[0]),
            ("link.down_mb_s", link.down_mb_s[1] - link.down_mb_s[0] + f64::MIN_POSITIVE),
            ("workload.rate", workload.rate),
            ("drafters.spread", drafters.spread),
        ];
        for kind in &self.devices {
            numbers.extend([("read_gb_s", kind.read_gb_s), ("tera_flop_s", kind.tera_flop_s)]);
        }
        for part in &workload.prompts {
            numbers.extend([
                ("prompts.share", part.share),
                ("prompts.mean_rows", part.mean_rows),
                ("prompts.sigma", part.sigma),
            ]);
        }
        numbers
    }

    /// One line for people.
    pub(crate) fn describe(&self) -> String {
        let kind = |kind: &DeviceKind| format!("{} {}", kind.count, kind.name);
        let devices: Vec<String> = self.devices.iter().map(kind).collect();
        let stages = self.cloud.stages;
        format!("{}: {}, {}, {stages} stages", self.name, self.model.name, devices.join(" + "))
    }

    /// The same with so many devices, the kinds in their proportions.
    pub(crate) fn with_devices(mut self, count: usize) -> Self {
        let all: usize = self.devices.iter().map(|kind| kind.count).sum();
        let mut left = count;
        for kind in &mut self.devices {
            kind.count = (kind.count * count).div_ceil(all).min(left);
            left -= kind.count;
        }
        self
    }

    /// Costs of one stage of the cloud, of its equal share of the layers; if the cloud has the
    /// whole model, with embedding, head and drafter beside the layers.
    pub(crate) fn server(&self, policy: &Policy) -> Server {
        let (model, drafter) = (&self.model, &self.drafters.adapter);
        let (read, compute) = (self.calibrated.cloud_read, self.calibrated.cloud_compute);
        let stages = f64::from(self.cloud.stages);
        let byte_s = 1.0 / (self.cloud.read_gb_s * 1e9 * read.value * stages);
        let param_s = 2.0 / (self.cloud.tera_flop_s * 1e12 * compute.value * stages);
        let part =
            |params: f64, bytes: f64| Roofline { read_s: bytes * byte_s, row_s: params * param_s };
        let whole = f64::from(u8::from(policy.place == Place::Cloud));
        let layers = f64::from(model.cloud_layers) + whole * f64::from(model.device_layers);
        let short = if policy.short_head { self.short_share() } else { 1.0 };
        Server {
            work: part(
                layers * model.layer_params + whole * model.head_params,
                layers * model.layer_bytes + whole * model.head_bytes,
            ),
            draft: part(
                whole * (drafter.params + short * model.head_params),
                whole * (drafter.bytes + short * model.head_bytes),
            ),
            context_s: layers * model.kv_bytes * byte_s,
            drafts: policy.drafts,
        }
    }

    /// Share of the vocabulary that a short draft head tells apart.
    fn short_share(&self) -> f64 {
        (f64::from(self.drafters.short_vocab) / f64::from(self.model.vocab_size)).min(1.0)
    }

    /// Costs of the model's parts on a device of this kind: nothing, if the cloud has them.
    pub(crate) fn device(&self, kind: &DeviceKind, place: Place) -> DeviceCosts {
        if place == Place::Cloud {
            return DeviceCosts::default();
        }
        let Calibrated { device_read, device_compute, .. } = self.calibrated;
        let roofline = |params: f64, bytes: f64| Roofline {
            read_s: bytes / (kind.read_gb_s * 1e9 * device_read.value),
            row_s: 2.0 * params / (kind.tera_flop_s * 1e12 * device_compute.value),
        };
        let Model { layer_params, layer_bytes, head_params, head_bytes, .. } = self.model;
        let layers = f64::from(self.model.device_layers);
        let short = self.short_share();
        DeviceCosts {
            layers: roofline(layers * layer_params, layers * layer_bytes),
            head: roofline(head_params, head_bytes),
            short_head: roofline(head_params * short, head_bytes * short),
            adapter: roofline(self.drafters.adapter.params, self.drafters.adapter.bytes),
            heads: roofline(self.drafters.heads.params, self.drafters.heads.bytes),
        }
    }
}

/// Seconds of a pass over some weights: reading them, or the arithmetic of the rows, whichever is
/// longer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Roofline {
    pub(crate) read_s: f64,
    pub(crate) row_s: f64,
}

impl Roofline {
    pub(crate) fn seconds(self, rows: usize) -> f64 {
        self.read_s.max(self.row_s * rows as f64)
    }
}

/// One stage of the cloud.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Server {
    pub(crate) work: Roofline,
    /// A level of drafts for all sessions at once.
    pub(crate) draft: Roofline,
    /// Reading the KV of one row that came before.
    pub(crate) context_s: f64,
    /// Growth of trees.
    drafts: DraftPolicy,
}

impl Server {
    /// A step of these rows.
    pub(crate) fn seconds(&self, plan: &AttendBatch<'_>) -> f64 {
        let ends = plan.q_indptr.windows(2).map(|ends| ends[0] as usize..ends[1] as usize);
        let ends = ends.filter(|rows| !rows.is_empty());
        let before = |rows: std::ops::Range<usize>| plan.positions[rows.start] as usize;
        let is_tree = |rows: &usize| (2..=self.drafts.nodes_max + 1).contains(rows);
        let trees = ends.clone().map(|rows| rows.len()).filter(is_tree);
        let levels = trees.clone().map(|rows| self.levels(rows)).max().unwrap_or(0) as f64;
        let drafted: usize = trees.map(|rows| rows - 1).sum();
        let draft_s = (levels * self.draft.read_s).max(self.draft.row_s * drafted as f64);
        self.rows_seconds(plan.rows(), ends.map(before).sum()) + draft_s
    }

    /// A step of this many rows whose sessions have `context` rows in all.
    pub(crate) fn rows_seconds(&self, rows: usize, context: usize) -> f64 {
        let read_s = self.work.read_s + self.context_s * context as f64;
        read_s.max(self.work.row_s * rows as f64)
    }

    /// Levels in which a tree of this many rows has grown below its root.
    pub(crate) fn levels(&self, rows: usize) -> usize {
        let next = |nodes: &usize| Some(nodes + self.drafts.level(*nodes));
        std::iter::successors(Some(1), next).take_while(|nodes| *nodes < rows).count()
    }
}

/// Parts of the model on one kind of device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeviceCosts {
    /// The input submodel.
    pub(crate) layers: Roofline,
    pub(crate) head: Roofline,
    /// The head's rows of the tokens that a short draft head tells apart.
    pub(crate) short_head: Roofline,
    pub(crate) adapter: Roofline,
    pub(crate) heads: Roofline,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_that_come_with_the_tool_are_sound() {
        for (name, _) in BUILT_IN {
            let file = CostFile::open(name).unwrap();
            assert_eq!(file.name, name);
        }
    }

    #[test]
    fn bad_files_are_refused_by_field() {
        let refused = |from: &str, to: &str| {
            let text = BUILT_IN[0].1.replacen(from, to, 1);
            assert_ne!(text, BUILT_IN[0].1, "{from} is not in the file");
            format!("{:#}", CostFile::parse(&text).unwrap_err())
        };
        assert!(refused("\"hidden_size\": 4096", "\"hidden_size\": 4095").contains("hidden_size"));
        assert!(refused("\"stages\": 4", "\"stages\": 0").contains("stages"));
        assert!(refused("\"stages\": 4", "\"floors\": 4").contains("floors"));
        assert!(
            refused("\"up_mb_s\": [5.0, 10.0]", "\"up_mb_s\": [-5.0, 10.0]").contains("up_mb_s")
        );
        assert!(refused("\"rate\": 6.0", "\"rate\": 1e999").contains("number out of range"));
    }

    #[test]
    fn the_longer_of_reading_and_arithmetic_counts() {
        let roofline = Roofline { read_s: 6.0, row_s: 0.5 };
        assert_eq!([1, 12, 20].map(|rows| roofline.seconds(rows)), [6.0, 6.0, 10.0]);
        let draft = Roofline { read_s: 2.0, row_s: 0.1 };
        let server =
            Server { work: roofline, draft, context_s: 0.01, drafts: DraftPolicy::DEFAULT };
        assert_eq!(server.rows_seconds(1, 100), 7.0);
        assert_eq!(server.rows_seconds(20, 100), 10.0);
        assert_eq!([2, 5, 6, 9, 10].map(|rows| server.levels(rows)), [1, 1, 2, 2, 3]);
    }
}
