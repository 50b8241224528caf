//! One step of a drafter: a decoder layer and its output, and the derivative.

use super::attention::{self, KeyValues, Span, Weights};
use super::params::{
    DOWN, Dims, GATE, INPUT_NORM, K, NORM, O, POST_NORM, Params, Q, UP, V, W2, WF, WO,
};
use super::primitive::{
    Rows, add_linear, add_linear_dw, add_linear_dx, gather, linear, rms_norm, rms_norm_backward,
    rope, scatter_add, silu_mul, silu_mul_backward,
};

/// Which rows a step works on.
pub(super) struct Place<'a> {
    pub(super) spans: &'a [Span],
    /// 1 is the first.
    pub(super) step: usize,
    /// Which of the step's rows are queries; `None`: all.
    pub(super) queries: Option<&'a [usize]>,
    /// Position of each of the step's rows.
    pub(super) positions: &'a [u32],
    /// Position of each query.
    pub(super) query_positions: &'a [u32],
}

/// What a step leaves for its derivative.
pub(super) struct Step {
    /// What the layer reads: all rows of the step.
    u: Rows,
    normed: Rows,
    normed_scales: Vec<f32>,
    q: Rows,
    weights: Weights,
    attended: Rows,
    x1: Rows,
    feed: Option<Feed>,
    /// What the output norm reads.
    h: Rows,
    h_scales: Vec<f32>,
    /// The predicted deep row after the final norm.
    pub(super) y: Rows,
}

/// The feed-forward part, and the output matrices.
struct Feed {
    normed: Rows,
    scales: Vec<f32>,
    gate: Rows,
    up: Rows,
    acted: Rows,
    x2: Rows,
    out: Rows,
    out_scales: Vec<f32>,
}

impl Step {
    /// What the output matrices read; the layer's output normalised.
    pub(super) fn out(&self) -> Option<&Rows> {
        self.feed.as_ref().map(|feed| &feed.out)
    }
}

/// Runs a step. `before` are the keys of the steps before it; its own come back.
pub(super) fn forward(
    params: &Params,
    dims: &Dims,
    place: &Place<'_>,
    u: Rows,
    deep: Option<&Rows>,
    before: &[KeyValues],
) -> (Step, KeyValues) {
    let p = &params.values;
    let (normed, normed_scales) = rms_norm(&u, Some(&p[INPUT_NORM]), dims.eps);
    let mut k = linear(&normed, &p[K]);
    rope(&mut k, place.positions, &dims.inv_freq, 1.0);
    let own = KeyValues { k, v: linear(&normed, &p[V]) };
    let (mut q, mut x1) = match place.queries {
        Some(queries) => (linear(&gather(&normed, queries), &p[Q]), gather(&u, queries)),
        None => (linear(&normed, &p[Q]), u.clone()),
    };
    rope(&mut q, place.query_positions, &dims.inv_freq, 1.0);
    let keys: Vec<&KeyValues> = before.iter().chain(std::iter::once(&own)).collect();
    let (attended, weights) = attention::forward(dims, place.spans, place.step, &q, &keys);
    add_linear(&attended, &p[O], &mut x1);
    let (feed, h) = if params.kind.feeds_forward() {
        let feed = feed_forward(p, dims, &x1);
        let mut h = linear(&feed.out, &p[WO]);
        if let Some(deep) = deep {
            add_linear(deep, &p[WF], &mut h);
        }
        (Some(feed), h)
    } else {
        (None, x1.clone())
    };
    let (y, h_scales) = rms_norm(&h, Some(&p[NORM]), dims.eps);
    let step = Step { u, normed, normed_scales, q, weights, attended, x1, feed, h, h_scales, y };
    (step, own)
}

fn feed_forward(p: &[Rows], dims: &Dims, x1: &Rows) -> Feed {
    let (normed, scales) = rms_norm(x1, Some(&p[POST_NORM]), dims.eps);
    let (gate, up) = (linear(&normed, &p[GATE]), linear(&normed, &p[UP]));
    let acted = silu_mul(&gate, &up);
    let mut x2 = x1.clone();
    add_linear(&acted, &p[DOWN], &mut x2);
    let (out, out_scales) = rms_norm(&x2, None, dims.eps);
    Feed { normed, scales, gate, up, acted, x2, out, out_scales }
}

/// Derivatives of [`forward`], given that of `y`. Adds to `grads` and to the keys of all steps
/// (`dkeys`; its own, the last, is complete and used up), and returns those of `u` and of `deep`.
#[expect(clippy::too_many_arguments, reason = "one step, its operands")]
pub(super) fn backward(
    params: &Params,
    dims: &Dims,
    place: &Place<'_>,
    step: &Step,
    deep: Option<&Rows>,
    keys: &[KeyValues],
    dy: &Rows,
    grads: &mut Params,
    dkeys: &mut [KeyValues],
) -> (Rows, Option<Rows>) {
    let (p, g) = (&params.values, &mut grads.values);
    let mut dh = Rows::zeros(step.h.dim());
    let norm = Some((&p[NORM], &mut g[NORM]));
    rms_norm_backward(&step.h, norm, &step.h_scales, dy, &mut dh);
    let mut ddeep = None;
    let dx1 = match &step.feed {
        None => dh,
        Some(feed) => {
            if let Some(deep) = deep {
                add_linear_dw(&dh, deep, &mut g[WF]);
                let mut d = Rows::zeros(deep.dim());
                add_linear_dx(&dh, &p[WF], &mut d);
                ddeep = Some(d);
            }
            feed_forward_backward(p, g, feed, &step.x1, &dh)
        }
    };
    add_linear_dw(&dx1, &step.attended, &mut g[O]);
    let mut dattended = Rows::zeros(step.attended.dim());
    add_linear_dx(&dx1, &p[O], &mut dattended);
    let views: Vec<&KeyValues> = keys[..place.step].iter().collect();
    let mut dq = attention::backward(
        dims,
        place.spans,
        place.step,
        &step.q,
        &views,
        &step.weights,
        &dattended,
        dkeys,
    );
    rope(&mut dq, place.query_positions, &dims.inv_freq, -1.0);
    let own = &mut dkeys[place.step - 1];
    rope(&mut own.k, place.positions, &dims.inv_freq, -1.0);
    let dnormed = project_backward(p, g, place, &step.normed, &dq, own);
    let mut du = Rows::zeros(step.u.dim());
    let norm = Some((&p[INPUT_NORM], &mut g[INPUT_NORM]));
    rms_norm_backward(&step.u, norm, &step.normed_scales, &dnormed, &mut du);
    match place.queries {
        Some(queries) => scatter_add(&dx1, queries, &mut du),
        None => du += &dx1,
    }
    if let (Some(deep), Some(ddeep)) = (deep, &mut ddeep) {
        let at_queries = place.queries.map_or_else(|| du.clone(), |queries| gather(&du, queries));
        add_linear_dw(&at_queries, deep, &mut g[W2]);
        add_linear_dx(&at_queries, &p[W2], ddeep);
    }
    (du, ddeep)
}

/// Returns the derivative of what queries, keys and values are made of.
fn project_backward(
    p: &[Rows],
    g: &mut [Rows],
    place: &Place<'_>,
    normed: &Rows,
    dq: &Rows,
    own: &KeyValues,
) -> Rows {
    let mut dnormed = Rows::zeros(normed.dim());
    for (d, weight) in [(&own.k, K), (&own.v, V)] {
        add_linear_dw(d, normed, &mut g[weight]);
        add_linear_dx(d, &p[weight], &mut dnormed);
    }
    match place.queries {
        Some(queries) => {
            add_linear_dw(dq, &gather(normed, queries), &mut g[Q]);
            scatter_add(&dq.dot(&p[Q]), queries, &mut dnormed);
        }
        None => {
            add_linear_dw(dq, normed, &mut g[Q]);
            add_linear_dx(dq, &p[Q], &mut dnormed);
        }
    }
    dnormed
}

/// Returns the derivative of the feed-forward part's input.
fn feed_forward_backward(p: &[Rows], g: &mut [Rows], feed: &Feed, x1: &Rows, dh: &Rows) -> Rows {
    add_linear_dw(dh, &feed.out, &mut g[WO]);
    let dout = dh.dot(&p[WO]);
    let mut dx = Rows::zeros(feed.x2.dim());
    rms_norm_backward(&feed.x2, None, &feed.out_scales, &dout, &mut dx);
    add_linear_dw(&dx, &feed.acted, &mut g[DOWN]);
    let dacted = dx.dot(&p[DOWN]);
    let (dgate, dup) = silu_mul_backward(&feed.gate, &feed.up, &dacted);
    let mut dnormed = Rows::zeros(feed.normed.dim());
    for (d, weight) in [(&dgate, GATE), (&dup, UP)] {
        add_linear_dw(d, &feed.normed, &mut g[weight]);
        add_linear_dx(d, &p[weight], &mut dnormed);
    }
    let norm = Some((&p[POST_NORM], &mut g[POST_NORM]));
    rms_norm_backward(x1, norm, &feed.scales, &dnormed, &mut dx);
    dx
}
