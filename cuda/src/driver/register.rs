//! Host memory that a GPU without memory of its own reads in place.
//!
//! A map is registered with the driver as a whole and once in a process, however many tensors are
//! in it and however many [`super::Cuda`]s read it, since the driver refuses pages that it has.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::DriverError;
use cudarc::driver::sys;

use super::{Context, name_of};
use crate::gpu::HostMap;

/// Bytes of the smallest page; a map begins at one.
const PAGE: usize = 4096;
/// Bytes that kernels read at a time.
const VECTOR: usize = 16;

/// Every map that is registered now.
static REGISTERED: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

struct Entry {
    address: usize,
    uses: usize,
    /// Registered from here; what is portable counts for all.
    context: Arc<Context>,
    map: HostMap,
}

fn registered() -> MutexGuard<'static, Vec<Entry>> {
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One use of a registered map.
pub(super) struct Registered {
    address: usize,
}

impl Registered {
    /// Registers a map, unless it is. The context is current.
    fn new(context: &Arc<Context>, map: &HostMap, flags: u32) -> Result<Self, DriverError> {
        let bytes = (**map).as_ref();
        let address = bytes.as_ptr().addr();
        let mut entries = registered();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.address == address) {
            entry.uses += 1;
            return Ok(Self { address });
        }
        let begin = bytes.as_ptr().cast_mut().cast();
        // SAFETY: the entry keeps the map until it is unregistered, and nobody writes to it: the
        // GPU's kernels get it as constants.
        unsafe { sys::cuMemHostRegister_v2(begin, bytes.len(), flags) }.result()?;
        let (context, map) = (Arc::clone(context), Arc::clone(map));
        entries.push(Entry { address, uses: 1, context, map });
        Ok(Self { address })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut entries = registered();
        let found = entries.iter().position(|entry| entry.address == self.address);
        let at = found.expect("as many uses as there are of these");
        entries[at].uses -= 1;
        if entries[at].uses > 0 {
            return;
        }
        let entry = entries.swap_remove(at);
        if entry.context.make_current().is_ok() {
            let begin = (*entry.map).as_ref().as_ptr().cast_mut().cast();
            // SAFETY: it was registered once, and whoever read it has waited for its stream.
            let _ = unsafe { sys::cuMemHostUnregister(begin) };
        }
        // Before the entry, whose context may end with it.
        drop(entries);
    }
}

/// Way in which a GPU gets at weights.
pub(super) enum Weights {
    /// The GPU has memory of its own.
    Copied,
    /// The GPU has none but the host's, and reads weights there; with these flags of the driver.
    InPlace(u32),
    /// Host memory, which the driver would not map.
    Refused(String),
}

impl Weights {
    /// Reads the properties that the driver reports for a device.
    pub(super) fn of(device: sys::CUdevice) -> Self {
        use sys::CUdevice_attribute_enum as Attribute;
        // A driver that does not know an attribute has no such thing.
        let has = |attribute| {
            // SAFETY: the device came from the driver.
            unsafe { cudarc::driver::result::device::get_attribute(device, attribute) }
                .is_ok_and(|value| value != 0)
        };
        if !has(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED) {
            return Self::Copied;
        }
        if !has(Attribute::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED) {
            return Self::Refused("it registers no host memory".to_owned());
        }
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // A file is mapped to be read; without the flag the driver may refuse it.
        Self::InPlace(match has(Attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED) {
            true => flags | sys::CU_MEMHOSTREGISTER_READ_ONLY,
            false => flags,
        })
    }

    /// The use of a map and the GPU's address of its byte `begin`. The context is current.
    pub(super) fn register(
        &mut self,
        context: &Arc<Context>,
        map: &HostMap,
        begin: usize,
    ) -> Option<(Registered, sys::CUdeviceptr)> {
        let Self::InPlace(flags) = *self else { return None };
        let first = (**map).as_ref().as_ptr();
        if !first.addr().is_multiple_of(PAGE) || !begin.is_multiple_of(VECTOR) {
            return None;
        }
        let registered = Registered::new(context, map, flags);
        let registered = registered.map_err(|error| ("cuMemHostRegister", error));
        let both = registered.and_then(|registered| {
            let mut address = 0;
            // The host's own where the device can use it; a GPU may have another.
            // SAFETY: the pointer is to a live number; the map is registered.
            unsafe {
                sys::cuMemHostGetDevicePointer_v2(&raw mut address, first.cast_mut().cast(), 0)
            }
            .result()
            .map_err(|error| ("cuMemHostGetDevicePointer", error))?;
            Ok((registered, address + begin as u64))
        });
        both.map_err(|(what, error)| {
            *self = Self::Refused(format!("{what}: {}", name_of(error)));
        })
        .ok()
    }

    /// Description, for people.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Copied => "weights copied".to_owned(),
            Self::InPlace(_) => "weights in place".to_owned(),
            Self::Refused(reason) => format!("weights copied, since {reason}"),
        }
    }
}
