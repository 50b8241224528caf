//! `hat-sim faults`: devices and clouds in virtual time, whose links, processes and backends fail
//! as a seed has it. A seed that finds something repeats exactly, and is told with the shortest
//! schedule that still does.

mod failure;
mod ledger;
mod models;
mod proposer;
mod real;
mod setting;
mod simulation;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use clap::Args;
use hat_program::outln;
use hat_transport::planted::{Fault, Planted};

use self::failure::Failure;
use self::models::Seen;
use self::real::Real;
use self::setting::{Act, Setting};
use self::simulation::simulate;

#[derive(Args)]
pub struct FaultsArgs {
    /// The first seed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Seeds from there on, 1 to 10000000.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    count: u64,
    /// Plant one of the faults that this is known to find.
    #[arg(long, value_name = "NAME", value_parser = planted, hide = true)]
    plant: Option<Planted>,
    /// Begin no seed after so many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

fn planted(name: &str) -> Result<Planted, String> {
    let found = Fault::ALL.into_iter().find(|fault| format!("{fault:?}") == name);
    found.map(Planted::new).ok_or_else(|| format!("allowed are {:?}", Fault::ALL))
}

/// A breach of an invariant in a seed's simulation.
#[derive(Debug)]
struct Found {
    failure: Failure,
    setting: Box<Setting>,
    /// The shortest schedule that is known to lead to one of its kind.
    schedule: Vec<(Duration, Act)>,
}

thread_local! {
    /// Place at which this thread panicked last.
    static PANICKED_AT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// One seed in so many has real models.
const REAL_EVERY: u64 = 10;

/// Runs a schedule; a panic is one of the things that must not be.
fn attempt(setting: &Setting, schedule: &[(Duration, Act)], real: &Real) -> Result<Seen, Failure> {
    let real = setting.is_real.then_some(real);
    catch_unwind(AssertUnwindSafe(|| simulate(setting, schedule, real))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(Failure::Panics { at: PANICKED_AT.with_borrow(String::clone), text })
    })
}

/// Leaves out what is not needed for a failure of this kind.
fn shrink(setting: &Setting, failure: &Failure, real: &Real) -> Vec<(Duration, Act)> {
    let mut schedule = setting.schedule.clone();
    let mut piece = schedule.len().div_ceil(2);
    while piece > 0 {
        let mut from = 0;
        while from < schedule.len() {
            let mut without = schedule.clone();
            without.drain(from..(from + piece).min(schedule.len()));
            match attempt(setting, &without, real) {
                Err(other) if other.is_like(failure) => schedule = without,
                _ => from += piece,
            }
        }
        piece /= 2;
    }
    schedule
}

/// The world of a seed.
fn draw(seed: u64) -> Setting {
    let setting = Setting::draw(seed);
    if seed % REAL_EVERY == REAL_EVERY - 1 { setting.on_real_models() } else { setting }
}

/// Runs a world.
fn run(setting: Setting, real: &Real) -> Result<Seen, Found> {
    attempt(&setting, &setting.schedule, real).map_err(|failure| {
        let schedule = shrink(&setting, &failure, real);
        Found { failure, setting: Box::new(setting), schedule }
    })
}

pub fn faults(args: &FaultsArgs) -> anyhow::Result<()> {
    std::panic::set_hook(Box::new(|info| {
        let at = info.location().map(|at| format!("{}:{}", at.file(), at.line()));
        PANICKED_AT.set(at.unwrap_or_default());
    }));
    let models = Real::new()?;
    let (began, mut sum, mut count) = (Instant::now(), Seen::default(), 0);
    let until = args.seconds.map(|seconds| began + Duration::from_secs(seconds));
    for number in args.seed..args.seed.saturating_add(args.count) {
        if until.is_some_and(|until| Instant::now() >= until) {
            break;
        }
        let setting = Setting { planted: args.plant.unwrap_or_default(), ..draw(number) };
        match run(setting, &models) {
            Ok(seen) => sum.add(&seen),
            Err(found) => {
                outln!("seed {number}: {}", found.failure)?;
                outln!("{:#?}", found.setting)?;
                outln!("the shortest schedule that fails so:")?;
                for (at, act) in &found.schedule {
                    outln!("{at:>12.3?}  {act:?}")?;
                }
                if !found.setting.is_real {
                    let real = found.setting.clone().on_real_models();
                    let real = attempt(&real, &found.schedule, &models).err();
                    let real = real.map_or("holds".to_owned(), |failure| failure.to_string());
                    outln!("the same over real models: {real}")?;
                }
                anyhow::bail!("seed {number} fails; `hat-sim faults --seed {number}` repeats it");
            }
        }
        count += 1;
    }
    let took = began.elapsed().as_secs_f64();
    outln!("{count} seeds, {:.0} a second: {sum:?}", count as f64 / took)?;
    Ok(())
}
