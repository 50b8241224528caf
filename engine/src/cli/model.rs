//! The flags that name a model and say where it is cut.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use hat_loader::{Bundle, Role};
use hat_program::pull::models::{Cut, Model};

/// The variable behind `--bundle`.
const VARIABLE: &str = "HAT_BUNDLE";

/// Options that name a model and its split.
#[derive(Args, Clone)]
pub(crate) struct BundleArgs {
    /// Model: a bundle made by hat-split or one half of it, or a GGUF file or a Hugging Face
    /// directory, which is split into the cache on first use [default: SmolLM2-135M-Instruct].
    #[arg(short = 'm', long, visible_alias = "model", env = VARIABLE, value_name = "MODEL")]
    bundle: Option<PathBuf>,
    /// Number of first layers on the device [default: 2, or the bundle's].
    #[arg(long, env = "HAT_SPLIT_LAYER", value_name = "N")]
    pub(crate) split_layer: Option<u32>,
    /// Number of last layers on the device [default: 0, or the bundle's].
    #[arg(long, env = "HAT_TAIL_LAYERS", value_name = "N")]
    tail_layers: Option<u32>,
}

/// The model of a command without a prompt.
#[derive(Args, Clone)]
pub(crate) struct ModelArg {
    /// Model, as --bundle takes it.
    #[arg(value_name = "MODEL", id = "positional model")]
    model: Option<PathBuf>,
}

impl BundleArgs {
    /// The same, for the model that was named without a flag.
    pub(crate) fn named(mut self, model: ModelArg) -> anyhow::Result<Self> {
        let Some(model) = model.model else { return Ok(self) };
        let by_variable = std::env::var_os(VARIABLE).map(PathBuf::from);
        match &self.bundle {
            Some(bundle) if self.bundle != by_variable => bail!(
                "two models: {} and --bundle {}; leave one out",
                model.display(),
                bundle.display()
            ),
            _ => self.bundle = Some(model),
        }
        Ok(self)
    }

    /// The model; an error if there is none at the path. Changes nothing.
    pub(crate) fn model(&self) -> anyhow::Result<Model> {
        let model = match &self.bundle {
            Some(path) => Model::at(path)?,
            None => Model::Default,
        };
        self.check_tail(&model)?;
        model.check(self.cut())?;
        Ok(model)
    }

    /// The directory with `device/` and `cloud/` in it, made if it is not there.
    pub(crate) fn directory(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        self.model()?.bundle(cache, self.cut())
    }

    /// One half: the directory that was given if it is a bundle itself, or that of `role`.
    pub(crate) fn half(&self, cache: &Path, role: Role) -> anyhow::Result<PathBuf> {
        self.check_half(role)?;
        self.model()?.half(cache, role, self.cut())
    }

    /// Refuses the half of the other role, and a device that shall have more layers than its half.
    pub(crate) fn check_half(&self, role: Role) -> anyhow::Result<()> {
        let (path, is_named) = match self.model()? {
            Model::Half(path) => (path, true),
            Model::Bundle(path) if self.split_layer.is_some() => (path.join(role.name()), false),
            _ => return Ok(()),
        };
        // One that can't be opened is told about by the one who needs it.
        let Ok(bundle) = Bundle::open(&path) else { return Ok(()) };
        let (found, wanted, shown) = (bundle.role().name(), role.name(), path.display());
        if is_named && bundle.role() != role {
            bail!("{shown} is the {found} half of a bundle, and the {wanted} half is wanted");
        }
        let held = bundle.manifest().split_layer;
        match self.split_layer.filter(|asked| role == Role::Device && *asked as usize > held) {
            Some(asked) => bail!(
                "--split-layer: {shown} was cut after {held}, {asked} were asked for; ask for no \
                 more than it has, or split the model again"
            ),
            None => Ok(()),
        }
    }

    fn cut(&self) -> Cut {
        Cut { split_layer: self.split_layer, tail_layers: self.tail_layers }
    }

    /// The tail of a bundle was decided when it was made.
    fn check_tail(&self, model: &Model) -> anyhow::Result<()> {
        let Some(asked) = self.tail_layers else { return Ok(()) };
        let half = match model {
            Model::Half(path) => path.clone(),
            Model::Bundle(path) => {
                let [device, cloud] =
                    [Role::Device, Role::Cloud].map(|role| path.join(role.name()));
                if device.is_dir() { device } else { cloud }
            }
            _ => return Ok(()),
        };
        let Ok(bundle) = Bundle::open(&half) else { return Ok(()) }; // as in `check_half`
        let (tail_layers, shown) = (bundle.manifest().tail_layers, half.display());
        if asked as usize != tail_layers {
            bail!(
                "--tail-layers: {shown} has {tail_layers}, {asked} were asked for; leave the flag \
                 out, or split the model again"
            );
        }
        Ok(())
    }
}
