//! `cloud` and `device`: the two roles as processes of their own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use hat_engine::http::{HttpConfig, HttpServer, HttpSocket};
use hat_engine::options::{Address, CloudAddress, LinkKind, kv_rows};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig};
use hat_loader::{Bundle, Role};

use super::log::tell;
use super::{BundleArgs, DeviceRunArgs, ModelArg, RunArgs, flagged, reason, secret, words};

/// Pause between two looks of a daemon at its signals and at the state of its role.
const STOPPED_LOOK: Duration = Duration::from_millis(50);

/// The cloud role.
#[derive(Args)]
pub(crate) struct CloudArgs {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    bundle: BundleArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Address to listen at: HOST, HOST:PORT or PORT, with 7433 as the default port; loopback only
    /// until there is TLS.
    #[arg(long, env = "HAT_LISTEN", default_value = "127.0.0.1:7433", value_name = "ADDR",
          value_parser = parse_listen)]
    listen: SocketAddr,
    /// Most sessions open at once.
    #[arg(long, env = "HAT_SESSIONS_MAX", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    sessions_max: Option<u32>,
    /// Most positions of one session, at most the model's own context.
    #[arg(long, env = "HAT_CONTEXT", value_name = "TOKENS",
          value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    context: Option<u32>,
    /// Most positions of all sessions together.
    #[arg(long, env = "HAT_KV_ROWS_MAX", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    kv_rows_max: Option<u32>,
    /// Pipeline stages: runs of layers that compute at the same time and share the threads
    /// [default: one for each GPU of --gpus].
    #[arg(long, env = "HAT_STAGES", value_name = "N")]
    stages: Option<usize>,
    /// GPUs of the stages, by number; needs --processor cuda.
    #[arg(long, env = "HAT_GPUS", value_delimiter = ',', value_name = "N,N")]
    gpus: Vec<usize>,
    /// Most sessions of one device at once.
    #[arg(long, env = "HAT_SESSIONS_PER_DEVICE_MAX", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    sessions_per_device_max: Option<u32>,
    /// Seconds without a frame after which a session may be evicted for others.
    #[arg(long, env = "HAT_IDLE_AFTER", value_name = "SECONDS", default_value_t = 10.0)]
    idle_after: f64,
    /// Print the bounds of memory at the start.
    #[arg(long)]
    verbose: bool,
}

impl CloudArgs {
    pub(crate) fn run(mut self, cache: &Path) -> anyhow::Result<()> {
        self.bundle = self.bundle.named(self.model.clone())?;
        let mut config = self.flags(cache)?;
        self.bundle.check_half(Role::Cloud)?;
        let end_signal = EndSignal::watch()?;
        config.bundle = self.bundle.half(cache, Role::Cloud)?;
        let cloud = Cloud::start(config.clone())?;
        tell(&self.first_lines(&config, &cloud)?);
        while !cloud.has_stopped() {
            if let Some(signal) = end_signal.signal() {
                tell(&format!("{signal}: devices are told to come back later"));
                drop(cloud);
                return Ok(());
            }
            std::thread::sleep(STOPPED_LOOK);
        }
        match cloud.join() {
            Some(fault) => bail!("the cloud stopped: {fault}"),
            None => bail!("the cloud stopped by itself; the log says why"),
        }
    }

    fn first_lines(&self, config: &CloudConfig, cloud: &Cloud) -> anyhow::Result<String> {
        let bundle = Bundle::open(&config.bundle)?;
        let (model, layers) = (&bundle.manifest().model_name, words::layers(&bundle));
        let longest = u32::try_from(bundle.config().max_position_embeddings).unwrap_or(u32::MAX);
        let context = config.limits.context_max.min(longest);
        let mut text = format!("cloud: {model}, {layers}; {}\n", cloud.describe());
        text += &format!("room for {}\n", words::room(config.limits.sessions_of(context), context));
        if self.verbose {
            for (owner, bytes) in config.limits.bytes_needed(&bundle) {
                text += &format!("at most {:.1} MB for {owner}\n", bytes as f64 / 1e6);
            }
        }
        text += &format!("listening at {}", cloud.address());
        Ok(text)
    }

    /// All but the bundle, checked before anything is fetched or made.
    fn flags(&self, cache: &Path) -> anyhow::Result<CloudConfig> {
        let mut config = self.run.cloud_config(PathBuf::new(), cache).listen(self.listen);
        config = config.stages(self.stages.unwrap_or(self.gpus.len().max(1)));
        config.gpus.clone_from(&self.gpus);
        config.limits.sessions_max = self.sessions_max.unwrap_or(config.limits.sessions_max);
        config.limits.context_max = self.context.unwrap_or(config.limits.context_max);
        config.limits.kv_rows_max = self.kv_rows_max.unwrap_or(config.limits.kv_rows_max);
        let per_device = &mut config.limits.sessions_per_device_max;
        *per_device = self.sessions_per_device_max.unwrap_or(*per_device);
        config.idle_after = seconds("--idle-after", self.idle_after)?;
        config.check().map_err(flagged)?;
        if config.link == LinkKind::Memory {
            bail!("--link: memory links end in one process, and a cloud's devices are others: mio");
        }
        Ok(config)
    }
}

fn seconds(flag: &str, value: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(value)
        .with_context(|| format!("{flag}: a number of seconds from 0 up is wanted"))
}

/// The signals that ask a role to end. The first is seen by [`EndSignal::signal`]; one more ends
/// the process where it stands, as it would without this.
struct EndSignal {
    asked: Vec<(&'static str, Arc<AtomicBool>)>,
}

impl EndSignal {
    fn watch() -> anyhow::Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let any = Arc::new(AtomicBool::new(false));
        let mut asked = Vec::new();
        for (name, signal) in [("SIGTERM", SIGTERM), ("SIGINT", SIGINT)] {
            let flag = Arc::new(AtomicBool::new(false));
            // In the order in which they run: a signal that finds the flag set ends the process.
            signal_hook::flag::register_conditional_default(signal, any.clone())
                .and_then(|_| signal_hook::flag::register(signal, any.clone()))
                .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
                .with_context(|| format!("watching for {name}"))?;
            asked.push((name, flag));
        }
        Ok(Self { asked })
    }

    /// The signal that came, if one did.
    fn signal(&self) -> Option<&'static str> {
        let came = |(_, flag): &&(_, Arc<AtomicBool>)| flag.load(Ordering::Acquire);
        self.asked.iter().find(came).map(|(name, _)| *name)
    }
}

/// The device role.
#[derive(Args)]
pub(crate) struct DeviceArgs {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    device: DeviceRunArgs,
    /// Address of the HTTP API: HOST, HOST:PORT or PORT, with 8080 as the default port, loopback
    /// only until there is TLS; or unix:/PATH for a socket of this user alone.
    #[arg(long, env = "HAT_HTTP", default_value = "127.0.0.1:8080", value_name = "ADDR|unix:/PATH",
          value_parser = parse_http)]
    http: HttpAt,
    /// File of the API key, made on first start [default: api-key in the state directory].
    #[arg(long, env = "HAT_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Additional Host that requests may name, NAME or NAME:PORT, such as a container's
    /// host.docker.internal. May be repeated.
    #[arg(long, env = "HAT_ALLOW_HOST", value_delimiter = ',', value_name = "NAME")]
    allow_host: Vec<String>,
    /// Additional Origin whose web pages may use the API, scheme://host[:port]. May be repeated.
    /// Pages of this machine always may.
    #[arg(long, env = "HAT_ALLOW_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    allow_origin: Vec<String>,
    /// Most answers at once; further requests wait.
    #[arg(long, env = "HAT_SESSIONS_MAX", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    sessions_max: Option<u32>,
    /// Most tokens of one prompt with its answer, at most the model's own context.
    #[arg(long, env = "HAT_CONTEXT", value_name = "TOKENS",
          value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    context: Option<u32>,
    /// Seconds for which answers may go on after SIGTERM or SIGINT; a second signal ends at once.
    #[arg(long, env = "HAT_DRAIN", value_name = "SECONDS", default_value_t = 30.0)]
    drain: f64,
    /// Serve without a key. Any program on this machine can then use the API.
    #[arg(long, conflicts_with = "api_key_file")]
    no_api_key: bool,
}

impl DeviceArgs {
    pub(crate) fn run(mut self, cache: &Path) -> anyhow::Result<()> {
        self.device = self.device.named(self.model.clone())?;
        let mut config = self.http_config()?;
        let key_file = self.key_file()?;
        self.limit(self.device.flags(PathBuf::new(), cache)).check().map_err(flagged)?;
        self.device.bundle.check_half(Role::Device)?;
        let end_signal = EndSignal::watch()?;
        if let Some(path) = &key_file {
            secret::check_api_key(path)?;
        }
        let socket = HttpSocket::bind(&config)?;
        // All flags are right: from here on things are fetched, made and opened for them.
        let engine_config = self.limit(self.device.config(cache)?);
        let limits = engine_config.limits;
        let half = words::layers(&Bundle::open(&engine_config.bundle)?);
        let engine = Arc::new(Engine::open(engine_config)?);
        tell(&format!("device: {}, {half}; {}", engine.model_name(), engine.describe()));
        tell(&words::drafter(&engine));
        tell(&self.device.cloud_words(&engine));
        let context = engine.context();
        tell(&format!("{}; more of them wait", words::room(limits.sessions_of(context), context)));
        config.api_key = key_file.as_deref().map(secret::api_key).transpose()?;
        let server = HttpServer::start_at(socket, engine.clone(), config)?;
        if let Some(path) = &key_file {
            tell(&format!("http: the API key is in {}", path.display()));
        }
        tell(&format!("http: listening at {}", server.place()));
        while !server.has_stopped() {
            if engine.has_stopped() {
                bail!("the device stopped by itself; the log says why");
            }
            if let Some(signal) = end_signal.signal() {
                tell(&format!(
                    "{signal}: answers have {} s to end; once more ends at once",
                    self.drain
                ));
                server.stop();
                return Ok(());
            }
            std::thread::sleep(STOPPED_LOOK);
        }
        bail!("the HTTP server stopped by itself; the log says why")
    }

    /// The same configuration, with this command's bounds.
    fn limit(&self, mut config: EngineConfig) -> EngineConfig {
        let mut limits = config.limits;
        limits.sessions_max = self.sessions_max.unwrap_or(limits.sessions_max);
        limits.context_max = self.context.unwrap_or(limits.context_max);
        limits.kv_rows_max = kv_rows(limits.sessions_max, limits.context_max);
        config.limits = limits;
        if let CloudAddress::InProcess(cloud) = &mut config.cloud {
            cloud.limits.context_max = limits.context_max;
            cloud.limits.kv_rows_max = limits.kv_rows_max;
        }
        config
    }

    fn http_config(&self) -> anyhow::Result<HttpConfig> {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let (listen, unix) = match &self.http {
            HttpAt::Address(address) => (*address, None),
            HttpAt::Unix(path) => (loopback, Some(path.clone())),
        };
        let mut config = HttpConfig::new(listen);
        config.unix = unix;
        config.allow_hosts.clone_from(&self.allow_host);
        config.allow_origins.clone_from(&self.allow_origin);
        config.limits.drain = seconds("--drain", self.drain)?;
        config.check().map_err(flagged)?;
        Ok(config)
    }

    /// The file of the API key; none with `--no-api-key`.
    fn key_file(&self) -> anyhow::Result<Option<PathBuf>> {
        match (&self.api_key_file, self.no_api_key) {
            (_, true) => Ok(None),
            (Some(path), false) => Ok(Some(path.clone())),
            (None, false) => Ok(Some(state_dir()?.join("api-key"))),
        }
    }
}

/// A place for the HTTP API.
#[derive(Clone, Debug, PartialEq, Eq)]
enum HttpAt {
    Address(SocketAddr),
    Unix(PathBuf),
}

fn parse_http(text: &str) -> Result<HttpAt, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        let path = PathBuf::from(path);
        return if path.is_absolute() {
            Ok(HttpAt::Unix(path))
        } else {
            Err("after unix: an absolute path is wanted, as unix:/run/user/1000/hat.sock".into())
        };
    }
    let address = local("http", text, Address::HTTP_PORT);
    address.map(HttpAt::Address).map_err(|error| format!("{error}; or unix:/PATH"))
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    local("listen", text, Address::CLOUD_PORT)
}

/// An address of this machine to listen at.
fn local(field: &'static str, text: &str, port: u16) -> Result<SocketAddr, String> {
    let address = Address::parse(text, port).map_err(|error| error.to_string())?;
    address.check_local(field).map_err(reason)?;
    address.resolve().map_err(|error| error.to_string())
}

/// Folder for the secrets of this user's roles.
pub(super) fn state_dir() -> anyhow::Result<PathBuf> {
    hat_program::pull::user_dir("XDG_STATE_HOME", ".local/state", "--api-key-file")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: DeviceArgs,
    }

    #[test]
    fn a_cloud_in_the_same_process_has_room_for_the_device() {
        let line = ["device", "--sessions-max", "9", "--context", "5000"];
        let args = Line::try_parse_from(line).unwrap().args;
        let config = args.limit(args.device.flags(PathBuf::new(), Path::new("")));
        let CloudAddress::InProcess(cloud) = &config.cloud else { panic!("another process") };
        assert_eq!((config.limits.sessions_max, config.limits.context_max), (9, 5000));
        assert_eq!(config.limits.kv_rows_max, kv_rows(9, 5000));
        assert_eq!(cloud.limits.context_max, 5000);
        assert_eq!(cloud.limits.kv_rows_max, config.limits.kv_rows_max);
        assert!(cloud.limits.sessions_max >= 9);
    }

    #[test]
    fn the_api_has_an_address_or_a_socket() {
        let address = |text: &str| HttpAt::Address(text.parse().unwrap());
        for (text, at) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("localhost:0", "127.0.0.1:0"),
            ("localhost", "127.0.0.1:8080"),
            ("9090", "127.0.0.1:9090"),
            (":9090", "127.0.0.1:9090"),
            ("[::1]", "[::1]:8080"),
        ] {
            assert_eq!(parse_http(text), Ok(address(at)), "{text}");
        }
        assert_eq!(parse_http("unix:/run/x.sock"), Ok(HttpAt::Unix("/run/x.sock".into())));
        for (text, word) in [
            ("unix:", "absolute"),
            ("unix:x.sock", "absolute"),
            ("", "unix:/PATH"),
            ("0.0.0.0", "ssh -L"),
            ("nowhere.invalid", "unknown"),
        ] {
            let error = parse_http(text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_cloud_has_an_address_and_its_own_port() {
        let of = |text: &str| parse_listen(text).map(|address| address.to_string());
        assert_eq!(of("localhost").as_deref(), Ok("127.0.0.1:7433"));
        assert_eq!(of("[::1]:1").as_deref(), Ok("[::1]:1"));
        assert!(of("192.0.2.1:7433").unwrap_err().contains("ssh -L"));
    }
}
