// Made by hat-kernels of cuda/kernels/abi.h; not to be edited.

pub const HAT_PAGE_SIZE: u32 = 32;
/// rms_norm: `x += add` (if there is one), then `out = x / sqrt(mean(x^2) + eps) * weight`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_rms_norm {
    /// f32 `[rows][columns]`; written only if `add` is not null.
    pub x: *mut f32,
    /// f32 `[rows][columns]`, or null.
    pub add: *const f32,
    /// f32 `[columns]`
    pub weight: *const f32,
    /// f32 `[rows][columns]`
    pub out: *mut f32,
    /// A multiple of 4.
    pub columns: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_rms_norm"][::core::mem::size_of::<hat_rms_norm>() - 40usize];
    ["Alignment of hat_rms_norm"][::core::mem::align_of::<hat_rms_norm>() - 8usize];
    [
        "Offset of field: hat_rms_norm::x",
    ][::core::mem::offset_of!(hat_rms_norm, x) - 0usize];
    [
        "Offset of field: hat_rms_norm::add",
    ][::core::mem::offset_of!(hat_rms_norm, add) - 8usize];
    [
        "Offset of field: hat_rms_norm::weight",
    ][::core::mem::offset_of!(hat_rms_norm, weight) - 16usize];
    [
        "Offset of field: hat_rms_norm::out",
    ][::core::mem::offset_of!(hat_rms_norm, out) - 24usize];
    [
        "Offset of field: hat_rms_norm::columns",
    ][::core::mem::offset_of!(hat_rms_norm, columns) - 32usize];
    [
        "Offset of field: hat_rms_norm::eps",
    ][::core::mem::offset_of!(hat_rms_norm, eps) - 36usize];
};
