//! K and V of all layers in pages of f16.
//!
//! For each (layer, page, head): K as `[head_dim][PAGE_SIZE]`, so that vector lanes run along keys;
//! V as `[PAGE_SIZE][head_dim]`.

use super::super::{BackendError, KvShape, PAGE_SIZE, RowMove};
use super::kernels::Kernels;

/// The KV store of the CPU backends.
pub struct CpuKv {
    shape: KvShape,
    /// `[layers][pages][kv_heads][head_dim][PAGE_SIZE]`
    k: Box<[u16]>,
    /// `[layers][pages][kv_heads][PAGE_SIZE][head_dim]`
    v: Box<[u16]>,
}

impl CpuKv {
    pub(super) fn new(backend: &'static str, shape: KvShape) -> Result<Self, BackendError> {
        let numbers = [shape.layers, shape.pages, shape.kv_heads, shape.head_dim, PAGE_SIZE]
            .into_iter()
            .try_fold(1usize, usize::checked_mul);
        // Zeroed by the system, so a page that is never used takes no memory.
        let zeroed = || bytemuck::try_zeroed_slice_box::<u16>(numbers?).ok();
        let error = || BackendError::OutOfMemory {
            backend,
            bytes: numbers.and_then(|n| n.checked_mul(4)).unwrap_or(usize::MAX),
            purpose: "K and V",
        };
        Ok(Self { shape, k: zeroed().ok_or_else(error)?, v: zeroed().ok_or_else(error)? })
    }

    pub(super) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Numbers of K, or of V, of one head of one page.
    pub(super) fn head_numbers(&self) -> usize {
        self.shape.head_dim * PAGE_SIZE
    }

    /// Index of the first number of (layer, page, head).
    fn at(&self, layer: usize, page: u32, head: usize) -> usize {
        let KvShape { layers, pages, kv_heads, .. } = self.shape;
        assert!(layer < layers, "layer {layer} of {layers}");
        assert!((page as usize) < pages, "page {page} of {pages}");
        ((layer * pages + page as usize) * kv_heads + head) * self.head_numbers()
    }

    /// K `[head_dim][PAGE_SIZE]` and V `[PAGE_SIZE][head_dim]` of one head of one page.
    pub(super) fn page(&self, layer: usize, page: u32, head: usize) -> (&[u16], &[u16]) {
        let at = self.at(layer, page, head);
        (&self.k[at..at + self.head_numbers()], &self.v[at..at + self.head_numbers()])
    }

    /// Numbers of K, or of V, of one page in one layer.
    pub(super) fn page_width(&self) -> usize {
        self.shape.kv_heads * self.head_numbers()
    }

    /// K and V of one layer. `[pages][kv_heads][head_numbers]` each
    pub(super) fn layer_mut(&mut self, layer: usize) -> [&mut [u16]; 2] {
        let KvShape { layers, pages, .. } = self.shape;
        assert!(layer < layers, "layer {layer} of {layers}");
        let size = pages * self.page_width();
        let at = layer * size..(layer + 1) * size;
        [&mut self.k[at.clone()], &mut self.v[at]]
    }

    /// Moves one row in all layers and heads.
    pub(super) fn shift(&mut self, RowMove { from, to }: RowMove) {
        assert!(from.1 < PAGE_SIZE as u32 && to.1 < PAGE_SIZE as u32, "{from:?} to {to:?}");
        let head_dim = self.shape.head_dim;
        for layer in 0..self.shape.layers {
            for head in 0..self.shape.kv_heads {
                let (a, b) = (self.at(layer, from.0, head), self.at(layer, to.0, head));
                for d in (0..head_dim * PAGE_SIZE).step_by(PAGE_SIZE) {
                    self.k[b + d + to.1 as usize] = self.k[a + d + from.1 as usize];
                }
                let a = a + from.1 as usize * head_dim;
                self.v.copy_within(a..a + head_dim, b + to.1 as usize * head_dim);
            }
        }
    }
}

/// Puts a key `[head_dim]` to row `row` of one head of a page.
pub(super) fn put_key(key: &[f32], row: usize, page: &mut [u16], kernels: &dyn Kernels) {
    let mut halves = [0; 64];
    for (key, page) in key.chunks(halves.len()).zip(page.chunks_mut(halves.len() * PAGE_SIZE)) {
        let halves = &mut halves[..key.len()];
        kernels.f32_to_f16(key, halves);
        for (to, half) in page[row..].iter_mut().step_by(PAGE_SIZE).zip(halves) {
            *to = *half;
        }
    }
}

/// Puts a value `[head_dim]` to row `row` of one head of a page.
pub(super) fn put_value(value: &[f32], row: usize, page: &mut [u16], kernels: &dyn Kernels) {
    kernels.f32_to_f16(value, &mut page[row * value.len()..][..value.len()]);
}
