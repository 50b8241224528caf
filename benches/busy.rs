//! A machine that is busy: with our own compute threads, and with other programs.
//!
//!     cargo bench -p hat-benches --bench busy -- [--rounds N] [--processes N] [--nice N,N]
//!
//! First, round trips of a verify row's bytes over a loopback socket between two threads of normal
//! priority, while the whole model computes on as many threads as there are cores; beside them an
//! idle machine, and as many threads that spin at normal priority. Second, the default model's
//! time a token, device and cloud on this machine, while other processes spin, over that while
//! none does (bound: 4). Conditions take turns; ratios are those of one round.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use hat_benches::{cores, seconds, spread};
use hat_compute::backend::cpu::compute_priority;
use hat_compute::open::{self, Chosen, ComputeConfig};
use hat_engine::options::{CloudAddress, Codec, GpuWeights, Processor};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Engine, EngineConfig, Request};

/// A verify row at hidden 576 in f16, with its head and the frame's.
const ROW_BYTES: usize = 1200;
const ROUND_TRIPS: usize = 2000;
/// Between two round trips both ends sleep, as in an answer.
const PAUSE: Duration = Duration::from_micros(500);
const TOKENS: u32 = 48;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long, default_value_t = 2)]
    processes: usize,
    #[arg(long, value_delimiter = ',', default_value = "0,19")]
    nice: Vec<u8>,
}

fn main() {
    if std::env::args().nth(1).is_some_and(|arg| arg == "--spin") {
        spin(&AtomicBool::new(false));
    }
    let args: Args = hat_benches::arguments();
    let bundle = hat_benches::default_bundle();
    round_trips(&bundle, &args);
    tokens(&bundle, &args);
}

fn spin(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// The work beside the round trips.
#[derive(Clone, Copy)]
enum Load {
    Idle,
    Spins,
    Computes { nice: u8 },
}

fn round_trips(bundle: &Path, args: &Args) {
    let mut loads = vec![("idle".to_owned(), Load::Idle)];
    loads.extend(
        args.nice
            .iter()
            .map(|&nice| (format!("compute threads, nice {nice}"), Load::Computes { nice })),
    );
    loads.push(("threads that spin, normal priority".to_owned(), Load::Spins));
    let mut figures: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); loads.len()];
    for round in 0..args.rounds {
        for turn in 0..loads.len() {
            let index = (round + turn) % loads.len();
            let times = beside(bundle, loads[index].1, ping_pong);
            figures[index].0.push(times[times.len() / 2] * 1e3);
            figures[index].1.push(times[times.len() * 99 / 100] * 1e3);
        }
    }
    println!(
        "== round trips of {ROW_BYTES} bytes on {} cores, {} rounds of {ROUND_TRIPS}; \
         median (least - largest) of the rounds",
        cores(),
        args.rounds
    );
    println!("{:<36} 50 %, ms                 99 %, ms (<= 0.13)", "beside");
    for ((name, _), (half, most)) in loads.iter().zip(figures) {
        println!("{name:<36} {:<24} {}", spread(half), spread(most));
    }
}

/// Runs `measure` beside a load.
fn beside<T>(bundle: &Path, load: Load, measure: impl FnOnce() -> T) -> T {
    let (stop, runs) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        match load {
            Load::Idle => runs.store(true, Ordering::SeqCst),
            Load::Spins => {
                for _ in 0..cores() {
                    scope.spawn(|| spin(&stop));
                }
                runs.store(true, Ordering::SeqCst);
            }
            Load::Computes { nice } => {
                let (runs, stop) = (&runs, &stop);
                scope.spawn(move || compute(bundle, nice, runs, stop));
            }
        }
        while !runs.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let measured = measure();
        stop.store(true, Ordering::SeqCst);
        measured
    })
}

/// The whole model, one answer after another, on a thread that computes and a pool of its own.
fn compute(bundle: &Path, nice: u8, runs: &AtomicBool, stop: &AtomicBool) {
    compute_priority(nice);
    let (processor, weights) = (Processor::Auto, GpuWeights::InPlace);
    let at = ComputeConfig { processor, weights, threads: cores(), nice };
    let chosen = open::choose(&at).expect("a CPU");
    let Chosen::Cpu(backend) = chosen else { unreachable!("a CPU was asked for") };
    let mut whole =
        ReferenceRun::open(backend, bundle, None, Codec::F16, 512).expect("both halves");
    while !stop.load(Ordering::SeqCst) {
        let request = Request::chat("Tell me about the sea.").max_tokens(16).ignore_eos();
        whole.generate(request, |_| {}).expect("an answer");
        runs.store(true, Ordering::SeqCst);
    }
}

/// Seconds of round trips between two threads, sorted.
fn ping_pong() -> Vec<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = listener.local_addr().expect("it listens");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut stream, _) = listener.accept().expect("it is dialled");
            stream.set_nodelay(true).expect("a socket option");
            let mut bytes = [0; ROW_BYTES];
            while stream.read_exact(&mut bytes).is_ok() && stream.write_all(&bytes).is_ok() {}
        });
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_nodelay(true).expect("a socket option");
        let mut bytes = [7; ROW_BYTES];
        let mut times: Vec<f64> = (0..ROUND_TRIPS)
            .map(|_| {
                std::thread::sleep(PAUSE);
                seconds(|| {
                    stream.write_all(&bytes).expect("the other end reads");
                    stream.read_exact(&mut bytes).expect("the other end writes");
                })
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times
    })
}

/// Other programs that are busy. Killed when dropped.
struct Busy(Vec<Child>);

impl Busy {
    fn start(count: usize) -> Self {
        let program = std::env::current_exe().expect("this program");
        let spin = || Command::new(&program).arg("--spin").spawn().expect("it starts again");
        Self((0..count).map(|_| spin()).collect())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn tokens(bundle: &Path, args: &Args) {
    let engines: Vec<(u8, Engine)> = args
        .nice
        .iter()
        .map(|&nice| {
            let mut config = EngineConfig::new(bundle.join("device"));
            config.nice = nice;
            if let CloudAddress::InProcess(cloud) = &mut config.cloud {
                cloud.nice = nice;
            }
            (nice, Engine::open(config).expect("the engine opens"))
        })
        .collect();
    let mut figures: Vec<[Vec<f64>; 5]> = vec![Default::default(); engines.len()];
    engines.iter().for_each(|(_, engine)| {
        answer(engine);
    });
    for _ in 0..args.rounds {
        for ((_, engine), figures) in engines.iter().zip(&mut figures) {
            let (idle_ttft, idle) = answer(engine);
            let busy = Busy::start(args.processes);
            let (busy_ttft, beside) = answer(engine);
            drop(busy);
            let all = [idle, beside, beside / idle, idle_ttft, busy_ttft];
            figures.iter_mut().zip(all).for_each(|(figures, figure)| figures.push(figure));
        }
    }
    println!(
        "== {TOKENS} tokens beside {} processes that spin, {} rounds; median (least - largest)",
        args.processes, args.rounds
    );
    for ((nice, _), [idle, beside, ratio, idle_ttft, busy_ttft]) in engines.iter().zip(figures) {
        println!("nice {nice}");
        println!("  ms a token, idle       {}", spread(idle));
        println!("  ms a token, busy       {}", spread(beside));
        println!("  busy / idle (<= 4)     {}", spread(ratio));
        println!("  TTFT ms, idle          {}", spread(idle_ttft));
        println!("  TTFT ms, busy          {}", spread(busy_ttft));
    }
}

/// Milliseconds to the first token, and of each after it.
fn answer(engine: &Engine) -> (f64, f64) {
    let request = Request::chat("Tell me about the sea.").max_tokens(TOKENS).ignore_eos();
    let timings = hat_benches::answer(engine, request, |_| {}).timings;
    (timings.ttft_ms, 1e3 / timings.tokens_per_second)
}
