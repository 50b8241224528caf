//! Draft trees before there is a drafter: a device that speaks the protocol by hand sends a tree,
//! commits a path of it and goes on, and gets the same bytes back as for a plain chain.

use crate::support::Bundles;
use crate::support::hand::{HIDDEN, Hand, chain};
use hat_engine::{Cloud, CloudConfig};
use hat_transport::message::{RowsHead, SessionErrorCode, Want};

/// Row number `index`, as f32 bytes.
fn row(index: u32) -> Vec<u8> {
    let number = |column: u32| {
        let mixed = (index * 97 + column).wrapping_mul(2_654_435_761) >> 8;
        mixed as f32 / (1 << 23) as f32 - 1.0
    };
    (0..u32::try_from(HIDDEN).unwrap()).flat_map(|column| number(column).to_le_bytes()).collect()
}

fn rows(indices: &[u32]) -> Vec<u8> {
    indices.iter().flat_map(|index| row(*index)).collect()
}

#[test]
fn a_tree_and_its_commit_give_the_bytes_of_the_chain() {
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let mut hand = Hand::connect(&bundles, &cloud);
    let prompt: Vec<u32> = (0..40).collect();

    // Session 1: 40 rows of prompt, then rows 100, 101, 102, 103 one after the other.
    hand.open(1, |_| {});
    let path = [100, 101, 102, 103];
    let all: Vec<u32> = prompt.iter().chain(&path).copied().collect();
    hand.rows(1, &RowsHead { want: Want::All, ..chain(1, 44, 0) }, &[], &rows(&all));
    let expected = hand.outputs(1, 44);

    // Session 2: the same prompt; a tree with wrong branches around 100, 101; then, with the
    // commit of 101, another tree around 102; then 103 with the commit of 102.
    hand.open(2, |_| {});
    hand.rows(2, &chain(1, 40, 0), &[], &rows(&prompt));
    assert_eq!(hand.outputs(2, 1)[0].1, expected[39].1, "the prompt's last row");
    let tree = RowsHead { tree: true, decided: false, want: Want::All, ..chain(41, 5, 40) };
    // 41: wrong. 42: row 100. 43: wrong, below 42. 44: row 101, below 42. 45: wrong, below 41.
    hand.rows(2, &tree, &[40, 40, 42, 42, 41], &rows(&[200, 100, 201, 101, 202]));
    let first = hand.outputs(2, 5);
    assert_eq!((first[1].0, &first[1].1), (42, &expected[40].1));
    assert_eq!((first[3].0, &first[3].1), (44, &expected[41].1));
    let second = RowsHead { commit: 44, parent: 44, first_id: 46, count: 2, ..tree };
    hand.rows(2, &second, &[44, 44], &rows(&[203, 102]));
    assert_eq!(hand.outputs(2, 2)[1].1, expected[42].1, "below a commit that moved rows");
    let third = RowsHead { commit: 47, ..chain(48, 1, 47) };
    hand.rows(2, &third, &[], &row(103));
    assert_eq!(hand.outputs(2, 1)[0].1, expected[43].1, "decided, below a second commit");

    // Session 3: three batches of drafts without waiting. The second hangs below a row of the
    // first, the third comes with the commit of that row and hangs below a row of the second, which
    // survives.
    hand.open(3, |_| {});
    hand.rows(3, &chain(1, 40, 0), &[], &rows(&prompt));
    hand.rows(3, &tree, &[40, 40, 42, 42, 41], &rows(&[200, 100, 201, 101, 202]));
    let second = RowsHead { commit: 0, ..second };
    hand.rows(3, &second, &[44, 44], &rows(&[203, 102]));
    let third = RowsHead { commit: 44, parent: 47, first_id: 48, count: 1, ..tree };
    hand.rows(3, &third, &[47], &row(103));
    let outputs = hand.outputs(3, 9);
    let of = |id: u32| &outputs.iter().find(|output| output.0 == id).unwrap().1;
    for (id, index) in [(40, 39), (42, 40), (44, 41), (47, 42), (48, 43)] {
        assert_eq!(of(id), &expected[index].1, "row {id}");
    }
}

#[test]
fn trees_that_cannot_be_end_their_session_alone() {
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let mut hand = Hand::connect(&bundles, &cloud);
    let good = |hand: &mut Hand, session| {
        hand.open(session, |_| {});
        hand.rows(session, &chain(1, 8, 0), &[], &rows(&[1, 2, 3, 4, 5, 6, 7, 8]));
        hand.outputs(session, 1)[0].1.clone()
    };
    let expected = good(&mut hand, 1);
    let tree = |first_id, count, parent| RowsHead {
        tree: true,
        decided: false,
        want: Want::All,
        ..chain(first_id, count, parent)
    };
    let many: Vec<u32> = (0..65).collect();
    let deep: Vec<u32> = (8..40).collect();
    let never = RowsHead { commit: 12, ..tree(20, 1, 8) };
    use SessionErrorCode::{BadCommit, BadParent, BadShape};
    let cases: [(&str, RowsHead, &[u32], SessionErrorCode); 5] = [
        ("more rows pend than may", tree(9, 65, 8), &[8; 65], BadShape),
        ("deeper than the session is long", tree(9, 32, 8), &deep, BadShape),
        ("below a row that was never sent", tree(9, 1, 7), &[7], BadParent),
        ("a commit of a row that was never sent", never, &[8], BadCommit),
        ("below a row of another branch", tree(9, 2, 8), &[8, 5], BadParent),
    ];
    for (session, (what, head, parents, code)) in (2..).zip(cases) {
        hand.open(session, |open| open.rows_max = 30);
        hand.rows(session, &chain(1, 8, 0), &[], &rows(&[1, 2, 3, 4, 5, 6, 7, 8]));
        hand.outputs(session, 1);
        hand.rows(session, &head, parents, &rows(&many[..parents.len()]));
        let (got, text) = hand.error(session);
        assert_eq!(got, code, "{what}: {text}");
    }
    assert_eq!(good(&mut hand, 20), expected);
}
