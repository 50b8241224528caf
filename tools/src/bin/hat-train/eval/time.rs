//! Time of a draft step of the engine, beside the bytes that it has to read.

use std::time::{Duration, Instant};

use hat_compute::DraftModel;
use hat_compute::open;
use hat_core::sequence::Sequence;
use hat_engine::options::Processor;
use hat_loader::{Bundle, DrafterFile};
use hat_plan::{AttendBatch, BatchBuffers, DraftForward as _, PAGE_SIZE};
use hat_program::outln;

/// Positions before the draft.
const CONTEXT: usize = 256;
/// Runs of which the median counts.
const RUNS: usize = 41;
/// Drafts of each row.
const PROPOSALS: usize = 8;

/// Prints times of one and of eight rows, with the head.
pub(super) fn print(adapter: &DrafterFile, device: &Bundle, threads: usize) -> anyhow::Result<()> {
    let bytes = bytes(adapter, device)?;
    let rows_max = CONTEXT.max(8);
    let pages = rows_max.div_ceil(PAGE_SIZE) + 1;
    let backend = open::cpu(Processor::Auto, threads)?;
    let mut drafter = DraftModel::new(backend, device, adapter, rows_max, pages)?;
    let hidden = device.config().hidden_size;
    let row: Vec<f32> = (0..hidden * rows_max).map(|i| (i % 89) as f32 / 89.0 - 0.5).collect();
    let pages = (0..u32::try_from(pages)?).collect();
    let mut sequence = Sequence::new(pages, u32::try_from(CONTEXT + 8)?);
    let mut plan = BatchBuffers::default();
    let place = sequence.append_committed(1, u32::try_from(CONTEXT)?, 0)?;
    plan.clear();
    plan.push_committed(place, u32::try_from(CONTEXT)?);
    plan.end_sequence(sequence.pages());
    drafter.remember(&plan.batch(), &row[..CONTEXT * hidden], &row[..CONTEXT * hidden]);
    for rows in [1u32, 8] {
        let tip = sequence.tip();
        let first = sequence.last_id() + 1;
        sequence.append_pending(first, vec![tip; rows as usize])?;
        plan.clear();
        for id in first..first + rows {
            sequence.push_row(id, &mut plan);
        }
        plan.end_sequence(sequence.pages());
        let took = median(&mut drafter, &plan.batch(), &row[..rows as usize * hidden]);
        sequence.commit(tip, &mut Vec::new())?;
        outln!(
            "a draft step of {rows} rows with its head: {:.2} ms, reading {:.1} MB of weights",
            took.as_secs_f64() * 1e3,
            bytes as f64 / 1e6
        )?;
    }
    Ok(())
}

fn median<B: hat_compute::backend::Backend>(
    drafter: &mut DraftModel<B>,
    plan: &AttendBatch<'_>,
    rows: &[f32],
) -> Duration {
    let (mut y, mut likely) = (vec![0.0; rows.len()], Vec::new());
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let start = Instant::now();
        drafter.draft(plan, rows, rows, &mut y);
        likely.clear();
        drafter.likeliest(&y, PROPOSALS, &mut likely);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    times[RUNS / 2]
}

/// Bytes of the drafter's weights and its rows of the head.
fn bytes(adapter: &DrafterFile, device: &Bundle) -> anyhow::Result<usize> {
    let mut bytes = 0;
    for (name, _) in adapter.kind().tensors(device.config()) {
        bytes += adapter.rows(name).map_err(anyhow::Error::msg)?.bytes.len();
    }
    let head = device.tensor(crate::target::head_name(device))?;
    let row = head.dtype.row_bytes(device.config().hidden_size).unwrap_or_default();
    Ok(bytes + adapter.vocabulary().len() * row)
}
