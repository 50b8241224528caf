//! K and V of all layers in pages of f16.
//!
//! For each (layer, page, head): K as `[head_dim][PAGE_SIZE]`, so that vector lanes run along keys;
//! V as `[PAGE_SIZE][head_dim]`.

use super::super::{BackendError, KvShape, PAGE_SIZE, RowMove};
use super::math;

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

    /// Numbers of one head of one page.
    fn head(&self) -> usize {
        self.shape.head_dim * PAGE_SIZE
    }

    /// Index of the first number of (layer, page, head).
    fn at(&self, layer: usize, page: u32, head: usize) -> usize {
        let KvShape { layers, pages, kv_heads, .. } = self.shape;
        assert!(layer < layers, "layer {layer} of {layers}");
        assert!((page as usize) < pages, "page {page} of {pages}");
        ((layer * pages + page as usize) * kv_heads + head) * self.head()
    }

    /// K `[head_dim][PAGE_SIZE]` and V `[PAGE_SIZE][head_dim]` of one head of one page.
    pub(super) fn page(&self, layer: usize, page: u32, head: usize) -> (&[u16], &[u16]) {
        let at = self.at(layer, page, head);
        (&self.k[at..at + self.head()], &self.v[at..at + self.head()])
    }

    /// Puts one row's K and V, `[kv_heads][head_dim]` each.
    pub(super) fn put(&mut self, layer: usize, place: (u32, u32), k: &[f32], v: &[f32]) {
        let (page, row) = (place.0, place.1 as usize);
        let head_dim = self.shape.head_dim;
        let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let at = self.at(layer, page, head);
            let column = self.k[at + row..].iter_mut().step_by(PAGE_SIZE);
            for (to, from) in column.zip(k) {
                *to = math::narrow(*from);
            }
            for (to, from) in self.v[at + row * head_dim..].iter_mut().zip(v) {
                *to = math::narrow(*from);
            }
        }
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
