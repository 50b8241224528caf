//! Modules and their kernels.

use std::ffi::{CString, c_void};

use cudarc::driver::{result, sys};

use super::{Context, Cuda, OpenError, name_of, open_error};
use crate::artefact::{Artefact, Form};
use crate::gpu::bytes_mut;
use crate::kernel::Kernel;

/// Bytes for each log of the driver's compiler.
const LOG_BYTES: usize = 16 << 10;
/// Shared memory of a block from which a kernel wants all of it that an SM can have. By itself the
/// driver assumes the share, and the tables of docs/KERNELS.md count with all of it.
const SHARED_BYTES_MIN: i32 = 16 << 10;

/// A kernel's registers and memory as the driver has loaded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The kernel.
    pub kernel: Kernel,
    /// Registers of a thread.
    pub registers: i32,
    /// Static shared bytes of a block.
    pub shared_bytes: i32,
    /// Bytes of a thread that did not fit into registers.
    pub local_bytes: i32,
}

impl Cuda {
    /// Registers and memory of every kernel, as loaded; 0 where the driver does not say.
    #[must_use]
    pub fn usages(&self) -> Vec<Usage> {
        use sys::CUfunction_attribute_enum as Attribute;
        let usage = |kernel: &Kernel| {
            let get = |which| attribute(self.functions[*kernel as usize], which).unwrap_or(0);
            Usage {
                kernel: *kernel,
                registers: get(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS),
                shared_bytes: get(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
                local_bytes: get(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
            }
        };
        let is_current = self.context.make_current().is_ok();
        Kernel::ALL.iter().filter(|_| is_current).map(usage).collect()
    }
}

/// An attribute of a loaded kernel; the context is current.
fn attribute(function: sys::CUfunction, which: sys::CUfunction_attribute_enum) -> Option<i32> {
    let mut value = 0;
    // SAFETY: the function is of a loaded module, the pointer is to a live number.
    unsafe { sys::cuFuncGetAttribute(&raw mut value, which, function) }.result().ok()?;
    Some(value)
}

/// Loads a module and finds its kernels. The context is current.
pub(super) fn load(
    artefact: &Artefact,
    form: Form,
    context: &mut Context,
    functions: &mut [sys::CUfunction],
) -> Result<(), OpenError> {
    use sys::CUfunction_attribute_enum as Attribute;
    let code = artefact.code(form);
    // Aligned, and terminated for the case of text.
    let mut image = vec![0u64; code.len() / 8 + 1];
    bytes_mut(&mut image)[..code.len()].copy_from_slice(code);
    let module = match form {
        Form::Ptx => translate(artefact.module, &image)?,
        // SAFETY: the image is a whole cubin and lives until the call returns.
        Form::Cubin(_) => unsafe { load_data(&image, &mut [], &mut []) }
            .map_err(open_error("cuModuleLoadData"))?,
    };
    context.modules.push(module);
    for kernel in artefact.kernels() {
        let name = CString::new(kernel.name()).expect("names of kernels have no zero byte");
        // SAFETY: the module was loaded above and lives as long as the context.
        let function = unsafe { result::module::get_function(module, name) }
            .map_err(open_error("cuModuleGetFunction"))?;
        functions[kernel as usize] = function;
        let shared = attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        if shared.is_some_and(|bytes| bytes >= SHARED_BYTES_MIN) {
            let which = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // A wish: a driver that does not grant it runs the kernel all the same.
            // SAFETY: the function was found above; the value is a percentage.
            let _ = unsafe { sys::cuFuncSetAttribute(function, which, 100) };
        }
    }
    Ok(())
}

/// # Safety
/// The image is a whole cubin or terminated PTX, and the values are of the options' types; what
/// they point to lives until the call returns.
unsafe fn load_data(
    image: &[u64],
    options: &mut [sys::CUjit_option],
    values: &mut [*mut c_void],
) -> Result<sys::CUmodule, result::DriverError> {
    let mut module = std::ptr::null_mut();
    let count = u32::try_from(options.len()).expect("few options");
    let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
    // SAFETY: the caller's promise; there are as many values as options.
    let code = unsafe {
        let image = image.as_ptr().cast();
        sys::cuModuleLoadDataEx(&raw mut module, image, count, options, values)
    };
    code.result()?;
    Ok(module)
}

/// Loads terminated PTX through the driver's compiler, whose messages become part of the error.
fn translate(module: &'static str, image: &[u64]) -> Result<sys::CUmodule, OpenError> {
    use sys::CUjit_option_enum as Option;
    let mut logs = [vec![0u8; LOG_BYTES], vec![0u8; LOG_BYTES]];
    let [errors, notes] = logs.each_mut().map(|log| log.as_mut_ptr().cast::<c_void>());
    // The driver takes a size where it takes a pointer.
    let bytes = std::ptr::without_provenance_mut::<c_void>(LOG_BYTES);
    let mut options = [
        Option::CU_JIT_ERROR_LOG_BUFFER,
        Option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        Option::CU_JIT_INFO_LOG_BUFFER,
        Option::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
    ];
    let mut values = [errors, bytes, notes, bytes];
    // SAFETY: the image is terminated PTX; the logs have the sizes that are given, and live on.
    let loaded = unsafe { load_data(image, &mut options, &mut values) };
    loaded.map_err(|error| OpenError::Ptx { module, reason: name_of(error), log: in_a_line(&logs) })
}

/// The lines of terminated logs, one behind the other.
fn in_a_line(logs: &[Vec<u8>]) -> String {
    let text = |log: &Vec<u8>| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        String::from_utf8_lossy(&log[..end]).into_owned()
    };
    let texts: Vec<String> = logs.iter().map(text).collect();
    let lines = texts.iter().flat_map(|text| text.lines()).map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "it says no more".to_owned() } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::in_a_line;

    #[test]
    fn logs_become_one_line() {
        let logs = |texts: [&str; 2]| texts.map(|text| text.as_bytes().to_vec());
        assert_eq!(in_a_line(&logs(["a\n b \n\n\0old", "c\0"])), "a; b; c");
        assert_eq!(in_a_line(&logs(["", "\0"])), "it says no more");
    }
}
