//! Two stages that hand their rows over, on the emulator: the same bits as one, whoever computes
//! what, and however many steps are between them.

use super::*;

type Middle = MiddleModel<CudaBackend<TestGpu>>;

/// One stage for both middle layers, and two that are linked, with room for `shared` steps.
fn stages(cloud: &Bundle, shared: usize) -> (Middle, [Middle; 2]) {
    let load = |layers| MiddleModel::load(backend().unwrap(), cloud, layers, 40, PAGES).unwrap();
    let (whole, mut first, second) = (load(1..3), load(1..2), load(2..3));
    assert_eq!(first.hands_over(), None);
    first.link(&second, shared).unwrap();
    assert_eq!(first.hands_over(), Some("within the GPU"));
    (whole, [first, second])
}

/// Sequences with a page each.
struct Sessions(Vec<(Sequence, u32)>);

impl Sessions {
    fn new() -> Self {
        Self((0..2).map(|page| (Sequence::new(vec![page], 32), 1)).collect())
    }

    /// The next `rows` rows of sequences that enter at these layers, with random numbers.
    fn step(&mut self, entries: &[(usize, u32)], rows: u32, exit_layer: u32) -> [MiddleStep; 2] {
        let mut plans = [(); 2].map(|()| BatchBuffers::with_capacity(64, 2, PAGES));
        plans.iter_mut().for_each(BatchBuffers::clear);
        let mut seed = 1;
        for (index, _) in entries {
            let (sequence, next_id) = &mut self.0[*index];
            let tip = sequence.tip();
            let first = sequence.append_committed(*next_id, rows, tip).unwrap();
            seed += *next_id * 31 + rows;
            *next_id += rows;
            for plan in &mut plans {
                plan.push_committed(first, rows);
                plan.end_sequence(sequence.pages());
            }
        }
        let numbers = 64 * rows * entries.len() as u32;
        let number = |i: u32| ((i * 37 + seed * 101) % 199) as f32 / 100.0 - 1.0;
        plans.map(|plan| MiddleStep {
            plan,
            entry_layers: entries.iter().map(|(_, entry)| *entry).collect(),
            exit_layer,
            hidden: (0..numbers).map(number).collect(),
            ..MiddleStep::default()
        })
    }
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn linked_stages_have_the_bits_of_one() {
    let Some(_) = backend() else { return };
    let bundles = Bundles::with_kernels();
    let [_, cloud] = open(&bundles);
    let (mut whole, [mut first, mut second]) = stages(&cloud, 3);
    let mut sessions = Sessions::new();
    type Case<'a> = (&'a [(usize, u32)], u32, u32, bool);
    let cases: [Case<'_>; 5] = [
        (&[(0, 1)], 5, 3, true),
        (&[(0, 1), (1, 2)], 2, 3, true), // one enters at the second stage
        (&[(0, 1)], 3, 2, false),        // leaves before it
        (&[(1, 2)], 4, 3, false),        // all enter at it
        (&[(0, 1), (1, 1)], 1, 3, true),
    ];
    for (number, (entries, rows, exit_layer, is_shared)) in cases.into_iter().enumerate() {
        let [mut expected, mut step] = sessions.step(entries, rows, exit_layer);
        let before = step.hidden.clone();
        whole.forward(&mut expected);
        first.forward(&mut step);
        assert_eq!(step.shared.is_some(), is_shared, "case {number}");
        assert!(!is_shared || step.hidden == before, "case {number}: rows went to the host");
        second.forward(&mut step);
        assert!(step.shared.is_none() && step.hidden != before, "case {number}");
        assert_eq!(bits(&step.hidden), bits(&expected.hidden), "case {number}");
        assert!([&mut first, &mut second].map(Computes::fault).iter().all(Option::is_none));
    }
    // Nothing to compute: nothing to hand over.
    let mut none = MiddleStep { exit_layer: 3, ..MiddleStep::default() };
    first.forward(&mut none);
    second.forward(&mut none);
    assert!(none.shared.is_none() && none.hidden.is_empty());
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn steps_between_two_stages_keep_their_rows() {
    let Some(_) = backend() else { return };
    let bundles = Bundles::with_kernels();
    let [_, cloud] = open(&bundles);
    let (mut whole, [mut first, mut second]) = stages(&cloud, 2);
    let mut sessions = Sessions::new();
    for _ in 0..3 {
        // Three steps are computed by the first stage before the second one begins; there is room
        // for two, so the third one's rows go through the host.
        let mut steps: Vec<_> = (1..4).map(|rows| sessions.step(&[(0, 1)], rows, 3)).collect();
        for [_, step] in &mut steps {
            first.forward(step);
        }
        let shared: Vec<bool> = steps.iter().map(|[_, step]| step.shared.is_some()).collect();
        assert_eq!(shared, [true, true, false]);
        for (number, [expected, step]) in steps.iter_mut().enumerate() {
            whole.forward(expected);
            second.forward(step);
            assert_eq!(bits(&step.hidden), bits(&expected.hidden), "step {number}");
        }
    }
    // A step that is given up gives its buffer back.
    let [_, mut given_up] = sessions.step(&[(1, 1)], 2, 3);
    first.forward(&mut given_up);
    let [_, mut kept] = sessions.step(&[(1, 1)], 2, 3);
    first.forward(&mut kept);
    given_up.shared = None;
    let [_, mut next] = sessions.step(&[(1, 1)], 2, 3);
    first.forward(&mut next);
    assert!(kept.shared.is_some() && next.shared.is_some());
}

#[test]
#[cfg_attr(no_emulator, ignore = "left out by HAT_NO_EMULATOR")]
fn what_is_borrowed_goes_back_when_the_copy_is_over() {
    let Some(mut first) = backend() else { return };
    let mut second = backend().unwrap();
    assert_eq!(first.link(&second, 2, 64, 1).unwrap().as_deref(), Some("within the GPU"));
    let [mut from, mut to] = [&mut first, &mut second].map(|gpu| gpu.alloc(2, 64).unwrap());
    let mut rows = [0.0f32; 128];
    for step in 0..3 {
        let numbers: Vec<f32> = (0..128).map(|i| (i + 1000 * step) as f32).collect();
        first.upload(&numbers, &mut from);
        let shared = first.lend(2, &from).unwrap();
        assert!(first.lend(2, &from).is_none(), "its one buffer is lent");
        second.borrow(2, shared, &mut to);
        // The copy may be on its way still.
        assert!(first.lend(2, &from).is_none(), "given back too early in step {step}");
        second.download(&to, 0, &mut rows);
        assert_eq!(rows[..], numbers);
    }
    assert!(first.fault().is_none() && second.fault().is_none());
}
