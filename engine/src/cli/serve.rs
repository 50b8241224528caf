//! `cloud` and `device`: the two roles as processes of their own.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use hat_engine::http::{HttpConfig, HttpServer};
use hat_engine::{Cloud, Engine};
use hat_loader::Bundle;

use super::{BundleArgs, DeviceRunArgs, RunArgs};

/// How often a daemon looks whether what it serves has stopped.
const STOPPED_LOOK: Duration = Duration::from_millis(200);

/// The cloud role.
#[derive(Args)]
pub(crate) struct CloudArgs {
    #[command(flatten)]
    bundle: BundleArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Where to listen; loopback only until TLS exists.
    #[arg(long, env = "HAT_LISTEN", default_value = "127.0.0.1:7433", value_name = "ADDR")]
    listen: SocketAddr,
    /// Sessions open at once.
    #[arg(long, env = "HAT_SESSIONS_MAX", value_name = "N")]
    sessions_max: Option<u32>,
    /// Positions of all sessions together.
    #[arg(long, env = "HAT_KV_ROWS_MAX", value_name = "N")]
    kv_rows_max: Option<u32>,
    /// Pipeline stages: runs of layers that compute at the same time and share the threads. One
    /// for each GPU of --gpus without.
    #[arg(long, env = "HAT_STAGES", value_name = "N")]
    stages: Option<usize>,
    /// GPUs of the stages, by number; needs --processor cuda.
    #[arg(long, env = "HAT_GPUS", value_delimiter = ',', value_name = "N,N")]
    gpus: Vec<usize>,
    /// Sessions of one device at once.
    #[arg(long, env = "HAT_SESSIONS_PER_DEVICE_MAX", value_name = "N")]
    sessions_per_device_max: Option<u32>,
    /// Seconds without a sign of life after which a session gives its memory up if others need it.
    #[arg(long, env = "HAT_IDLE_AFTER", value_name = "SECONDS", default_value_t = 10.0)]
    idle_after: f64,
}

impl CloudArgs {
    pub(crate) fn run(self, cache: &Path) -> anyhow::Result<()> {
        let mut config =
            self.run.cloud_config(self.bundle.half(cache, "cloud")?, cache).listen(self.listen);
        config = config.stages(self.stages.unwrap_or(self.gpus.len().max(1)));
        config.gpus = self.gpus;
        config.limits.sessions_max = self.sessions_max.unwrap_or(config.limits.sessions_max);
        config.limits.kv_rows_max = self.kv_rows_max.unwrap_or(config.limits.kv_rows_max);
        let per_device = &mut config.limits.sessions_per_device_max;
        *per_device = self.sessions_per_device_max.unwrap_or(*per_device);
        config.idle_after = Duration::try_from_secs_f64(self.idle_after)
            .context("--idle-after: a number of seconds from 0 up is wanted")?;
        let cloud = Cloud::start(config.clone())?;
        let needed = config.limits.bytes_needed(&Bundle::open(&config.bundle)?);
        let (describe, address) = (cloud.describe(), cloud.address());
        let mut text = format!("cloud: {describe}; listening at {address}\n");
        for (owner, bytes) in &needed {
            text += &format!("  at most {:.1} MB for {owner}\n", *bytes as f64 / 1e6);
        }
        // Whoever started it may read the first line alone, and then close the pipe.
        let _ = std::io::stderr().write_all(text.as_bytes());
        match cloud.join_for_fault() {
            Some(fault) => bail!("the cloud stopped: {fault}"),
            None => bail!("the cloud stopped by itself; the log says why"),
        }
    }
}

/// The device role.
#[derive(Args)]
pub(crate) struct DeviceArgs {
    #[command(flatten)]
    device: DeviceRunArgs,
    /// Where the HTTP API listens; loopback only until TLS exists.
    #[arg(long, env = "HAT_HTTP", default_value = "127.0.0.1:8080", value_name = "ADDR")]
    http: SocketAddr,
    /// The file that holds the API key; made on first start.
    #[arg(long, env = "HAT_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Serves without a key. Whoever can run a program on this machine can then ask.
    #[arg(long, conflicts_with = "api_key_file")]
    no_api_key: bool,
}

impl DeviceArgs {
    pub(crate) fn run(self, cache: &Path) -> anyhow::Result<()> {
        let api_key = if self.no_api_key { None } else { Some(self.api_key()?) };
        let engine = Arc::new(Engine::open(self.device.config(cache)?)?);
        eprintln!("device: {}; model {}", engine.describe(), engine.model_name());
        let mut config = HttpConfig::new(self.http);
        config.api_key = api_key;
        let server = HttpServer::start(engine.clone(), config)?;
        eprintln!("http: listening at http://{}", server.address());
        while !server.has_stopped() {
            if engine.has_stopped() {
                bail!("the device stopped by itself; the log says why");
            }
            std::thread::sleep(STOPPED_LOOK);
        }
        bail!("the HTTP server stopped by itself; the log says why")
    }

    /// The key in the key file; a new one, printed once, if there is no file.
    fn api_key(&self) -> anyhow::Result<String> {
        let path = match &self.api_key_file {
            Some(path) => path.clone(),
            None => state_dir()?.join("api-key"),
        };
        match hat_loader::file::read_text(&path, 4096) {
            Ok(key) if key.trim().is_empty() => bail!("{} is empty", path.display()),
            Ok(key) => return Ok(key.trim().to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        }
        let key = new_key()?;
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("creating {}", parent.display()))?;
        }
        write_secret(&path, &key).with_context(|| format!("writing {}", path.display()))?;
        eprintln!("new API key, kept in {}: {key}", path.display());
        Ok(key)
    }
}

fn new_key() -> anyhow::Result<String> {
    let mut bytes = [0u8; 24];
    getrandom::fill(&mut bytes).context("the system gave no random bytes")?;
    Ok(bytes.iter().fold("hat-".to_owned(), |key, byte| key + &format!("{byte:02x}")))
}

/// Writes a file that only its owner can read.
fn write_secret(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    writeln!(file, "{text}")
}

/// Where secrets of this user's roles are kept.
pub(super) fn state_dir() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_STATE_HOME")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
    let base = base.context("neither XDG_STATE_HOME nor HOME is set; use --api-key-file")?;
    Ok(base.join("hat-engine"))
}
