//! The bench itself, tried from end to end over a made-up driver that runs the emulator: what
//! `cargo test` starts, without an argument.

use std::path::Path;
use std::process::Command;

use hat_cuda::testkit::emulator::Build;
use hat_cuda::testkit::test_gpu::compiled;
use serde_json::Value;

/// Runs this program with `--small` and reads what it wrote.
pub fn over_made_up_driver() -> Result<(), String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(driver) = compiled(Build::new(folder).driver(&[]), "the bench") else { return Ok(()) };
    let own = folder.join(format!("cuda-bench-{}", std::process::id()));
    std::fs::create_dir_all(&own).map_err(|error| error.to_string())?;
    let tried = try_in(&own, &driver);
    let _ = std::fs::remove_dir_all(&own);
    tried
}

fn try_in(own: &Path, driver: &Path) -> Result<(), String> {
    let (lines, cost_file) = (own.join("lines"), own.join("cost.json"));
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(program)
        .args(["--small", "--weights", "q4_1", "--json"])
        .arg(&lines)
        .arg("--cost-file")
        .arg(&cost_file)
        .env("LD_LIBRARY_PATH", driver)
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}");
    let read = |path: &Path| {
        std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
    };
    let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
    check(output.status.success(), "the bench failed")?;

    let (mut kernels, mut steps, mut trees) = (0, 0, 0);
    for line in read(&lines)?.lines() {
        let line: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let positive =
            |key: &str| line[key].as_f64().is_some_and(|number| number.is_finite() && number > 0.0);
        match line["kind"].as_str() {
            Some("kernel") => {
                check(positive("us") && positive("bytes"), "a kernel's numbers")?;
                kernels += 1;
                trees +=
                    usize::from(line["what"].as_str().is_some_and(|it| it.starts_with("tree ")));
            }
            Some("step") => {
                check(positive("us") && positive("bound_us"), "a step's numbers")?;
                check(line["outside_us"].as_f64() <= line["us"].as_f64(), "the share outside")?;
                steps += 1;
                trees += usize::from(line["tree"] == true);
            }
            Some("peaks") => check(
                ["copy_gb_s", "silu_mul_gb_s", "f16_tflop_s", "bytes_top_s"]
                    .into_iter()
                    .all(positive),
                "the peaks",
            )?,
            Some("usage") => check(positive("registers"), "a kernel as loaded")?,
            Some("gpu" | "launch") => {}
            _ => return Err(format!("{line} is of no kind")),
        }
    }
    let all = format!("{kernels} kernels, {steps} steps, {trees} of both with trees");
    check(kernels >= 19 && steps == 8 && trees == 5, &all)?;
    let cost: Value =
        serde_json::from_str(&read(&cost_file)?).map_err(|error| error.to_string())?;
    let share = |name: &str| cost["calibrated"][name]["value"].as_f64().unwrap_or(0.0);
    check(share("cloud_read") > 0.0 && share("cloud_compute") > 0.0, "the cost file's shares")?;
    check(cost["model"]["cloud_layers"] == 4, "the cost file's layers")
}
