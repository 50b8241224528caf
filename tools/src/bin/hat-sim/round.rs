//! Rounds of one answer: a tree of guesses grows, rows go up, a walk decides tokens. No clock and
//! no machine: what it costs is returned as seconds on the device, when it happens is the world's.

use hat_engine::draft::policy::drafts_that_pay;
use hat_engine::draft::{Acceptance, Tree};
use hat_engine::estimate::Estimator;

use crate::costs::DeviceCosts;
use crate::policy::{AHEAD_WIDTH, DRAFTS, HEADS_NODES, Shape, Switches, Trained};
use crate::text::{Opinion, Text, WIDTH_MAX};

/// What a round is made with.
pub(crate) struct Making<'a> {
    pub(crate) switches: Switches,
    pub(crate) text: Text<'a>,
    pub(crate) device: &'a DeviceCosts,
    /// What this device has measured.
    pub(crate) estimator: &'a mut Estimator,
    pub(crate) acceptance: &'a mut Acceptance,
}

/// A tree of guesses below the last decided token, and where the walk stands in it.
#[derive(Debug, Default)]
pub(crate) struct Round {
    tree: Tree,
    /// Beside the tree's nodes.
    nodes: Vec<Node>,
    /// Answer position of the root, which is decided.
    root: u32,
    /// The deepest node whose row may be asked for.
    depth_max: u32,
    /// Where the walk stands.
    at: usize,
    /// Whether more was added to the tree while it was away.
    pub(crate) waved: bool,
    /// Row ids, in order of sending.
    last_id: u32,
    returned_id: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// 0 if it was not sent.
    id: u32,
    /// What the drafter says follows, if it was asked.
    opinion: Option<Opinion>,
}

/// Rows that a device computes together, and what that takes it, its drafter included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Level {
    pub(crate) rows: usize,
    pub(crate) seconds: f64,
}

/// What a walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walked {
    /// Tokens decided.
    pub(crate) tokens: u32,
    /// No row that is sent, or will be, goes on from there.
    pub(crate) over: bool,
    /// Drafting ahead had the token that was decided last.
    pub(crate) ahead: bool,
}

impl Round {
    /// Begins below the decided answer position `root`; `rows_left` tokens may follow it.
    fn begin(&mut self, root: u32, rows_left: u32) {
        self.root = root;
        self.depth_max = rows_left.saturating_sub(1);
        self.tree.reset(root, self.depth_max);
        self.nodes.clear();
        self.nodes.push(Node::default());
        self.at = 0;
        self.waved = false;
    }

    /// Rows that are in the tree and not sent.
    pub(crate) fn unsent(&self) -> usize {
        self.nodes.iter().filter(|node| node.id == 0).count()
    }

    /// Marks all rows as sent; returns the id of the last.
    pub(crate) fn send(&mut self) -> u32 {
        for node in self.nodes.iter_mut().filter(|node| node.id == 0) {
            self.last_id += 1;
            node.id = self.last_id;
        }
        self.last_id
    }

    /// Rows of the tree that are on their way with an id of at most `last`.
    pub(crate) fn awaited(&self, last: u32) -> usize {
        let away = |node: &&Node| node.id > self.returned_id && node.id <= last;
        self.nodes.iter().filter(away).count()
    }

    /// A whole round: the tree, and what each level of it takes. `asks` says whether an adapter is
    /// asked where it need not be.
    pub(crate) fn make(
        &mut self,
        making: &mut Making<'_>,
        root: u32,
        rows_left: u32,
        asks: bool,
    ) -> Vec<Level> {
        self.begin(root, rows_left);
        if self.depth_max == 0 || !making.switches.drafts() {
            return vec![Level { rows: 1, seconds: making.device.layers.seconds(1) }];
        }
        match (making.switches.trained, making.switches.shape) {
            (Trained::Heads, _) => self.make_by_heads(making),
            (Trained::Adapter, Shape::Chain) => self.make_chain(making),
            (Trained::Adapter, Shape::Tree) if asks => self.make_tree(making),
            (Trained::Adapter | Trained::Nobody, _) => {
                if making.switches.lookup {
                    self.offer_lookup(making);
                }
                self.grow(making, 1, DRAFTS.nodes_max + 1);
                let rows = self.nodes.len();
                vec![Level { rows, seconds: making.device.layers.seconds(rows) }]
            }
        }
    }

    fn make_by_heads(&mut self, making: &Making<'_>) -> Vec<Level> {
        let mut node = 0;
        while node < self.nodes.len() {
            self.ask(making, node, WIDTH_MAX, true);
            let len = self.nodes.len();
            if len <= HEADS_NODES {
                self.tree.grow(len + 1, 0.0);
                self.nodes.resize(self.tree.nodes().len(), Node::default());
            }
            node += 1;
        }
        let device = making.device;
        let rows = self.nodes.len();
        vec![Level { rows, seconds: device.heads.seconds(1) + device.layers.seconds(rows) }]
    }

    fn make_chain(&mut self, making: &mut Making<'_>) -> Vec<Level> {
        let mut steps = vec![];
        loop {
            let tail = self.nodes.len() - 1;
            let mut seconds = making.device.layers.seconds(1);
            if self.goes_on(tail) {
                seconds += making.proposal_seconds(1);
                self.lengthen(making, tail);
            }
            steps.push(Level { rows: 1, seconds });
            if self.nodes.len() == tail + 1 {
                break;
            }
        }
        if making.switches.lookup {
            self.offer_lookup(making);
            let before = self.nodes.len();
            self.grow(making, before, DRAFTS.nodes_max + 1);
            if self.nodes.len() > before {
                let more = making.device.layers.seconds(self.nodes.len() - before + 1);
                let last = steps.last_mut().expect("a chain has its root's step");
                last.seconds += more - making.device.layers.seconds(1);
                last.rows += self.nodes.len() - before;
            }
        }
        steps
    }

    /// Whether a chain may become longer than its node `tail`.
    fn goes_on(&self, tail: usize) -> bool {
        let depth = self.tree.nodes()[tail].depth;
        (depth as usize) < DRAFTS.chain_max && depth < self.depth_max
    }

    /// Asks what follows a chain's tail, and adds it if the drafter is sure of it.
    fn lengthen(&mut self, making: &Making<'_>, tail: usize) {
        let opinion = self.opinion(&making.text, tail, false);
        self.nodes[tail].opinion = Some(opinion);
        if opinion.confidence() >= f64::from(DRAFTS.chain_probability_min) {
            self.offer(making, tail, 1);
            self.tree.grow(self.nodes.len() + 1, 0.0);
            self.nodes.resize(self.tree.nodes().len(), Node::default());
        }
    }

    fn make_tree(&mut self, making: &mut Making<'_>) -> Vec<Level> {
        let mut steps = vec![];
        if making.switches.lookup {
            self.offer_lookup(making);
        }
        let rows_max = DRAFTS.nodes_max + 1;
        let mut from = 0;
        while from < self.nodes.len() {
            let rows = self.nodes.len() - from;
            let mut seconds = making.device.layers.seconds(rows);
            let end = self.nodes.len();
            if end < rows_max {
                (from..end).for_each(|node| self.ask(making, node, DRAFTS.width, false));
                seconds += making.proposal_seconds(rows);
                self.grow(making, end, rows_max.min(end + DRAFTS.level(end)));
            }
            steps.push(Level { rows, seconds });
            from = end;
        }
        steps
    }

    /// Offers what prompt lookup says of the root.
    fn offer_lookup(&mut self, making: &Making<'_>) {
        let acceptance = &*making.acceptance;
        let rate = |source| acceptance.rate(source);
        let branch = making.text.copy(self.root, rate);
        self.tree.offer(0, branch);
    }

    /// Asks the drafter what follows a node.
    fn ask(&mut self, making: &Making<'_>, node: usize, width: usize, heads: bool) {
        if self.nodes[node].opinion.is_some() {
            return;
        }
        let opinion = self.opinion(&making.text, node, heads);
        self.nodes[node].opinion = Some(opinion);
        self.offer(making, node, width);
    }

    /// In a tree of the engine's, what the adapter claims is corrected by what came of it.
    fn offer(&mut self, making: &Making<'_>, node: usize, width: usize) {
        let Some(opinion) = self.nodes[node].opinion else { return };
        let at = self.tree.nodes()[node];
        let corrects =
            making.switches.trained == Trained::Adapter && making.switches.shape == Shape::Tree;
        for mut guess in opinion.guesses(self.root + at.depth + 1, at.token, width) {
            if corrects {
                guess.probability = making.acceptance.corrected(&guess);
            }
            self.tree.offer(node, [guess]);
        }
    }

    fn opinion(&self, text: &Text<'_>, node: usize, heads: bool) -> Opinion {
        let at = self.tree.nodes()[node];
        let step = at.depth + 1;
        if self.is_right(node) {
            text.opinion(self.root + step, step, heads)
        } else {
            text.opinion_on_wrong(at.token, step, heads)
        }
    }

    fn is_right(&self, node: usize) -> bool {
        let node = self.tree.nodes()[node];
        node.token == self.root + node.depth
    }

    /// Grows to at most `rows_max` nodes, and keeps those that pay; `least` are kept anyway.
    fn grow(&mut self, making: &Making<'_>, least: usize, rows_max: usize) {
        self.tree.grow(rows_max, 0.0);
        let probabilities = self.tree.nodes().iter().skip(1).map(|node| node.probability);
        let end = (1 + drafts_that_pay(making.estimator, probabilities, 0.0)).max(least);
        if end < self.tree.nodes().len() {
            self.tree.truncate(end);
        }
        self.nodes.resize(self.tree.nodes().len(), Node::default());
    }

    /// Adds at most `rows` drafts of at least probability `floor` to a tree that is away, below
    /// where the walk stands. Returns the seconds, or `None` if there is nothing to add.
    pub(crate) fn extend(
        &mut self,
        making: &mut Making<'_>,
        (rows, floor): (usize, f32),
    ) -> Option<f64> {
        if self.at > 0 {
            self.take_root(making);
        }
        let pending = DRAFTS.pending_max.saturating_sub(self.awaited(self.last_id));
        let rows_max = self.nodes.len() + rows.min(pending);
        let mut seconds = 0.0;
        while self.nodes.len() < rows_max {
            let before = self.nodes.len();
            let asked = match (making.switches.trained, making.switches.shape) {
                (Trained::Adapter, Shape::Chain) => self.lengthen_likeliest(making),
                (Trained::Adapter, Shape::Tree) => self.ask_likeliest(making, DRAFTS.level_nodes),
                _ => 0,
            };
            if asked > 0 {
                seconds += making.proposal_seconds(asked);
            }
            self.tree.grow(rows_max.min(before + DRAFTS.level_nodes), floor);
            self.nodes.resize(self.tree.nodes().len(), Node::default());
            let new = self.nodes.len() - before;
            if new == 0 {
                break;
            }
            seconds += making.device.layers.seconds(new);
            self.waved = true;
        }
        (seconds > 0.0).then_some(seconds)
    }

    /// Lengthens the chain of first guesses; says how many nodes were asked about.
    fn lengthen_likeliest(&mut self, making: &Making<'_>) -> usize {
        let may_ask = |node: &usize| self.nodes[*node].opinion.is_none() && self.goes_on(*node);
        let probability = |node: &usize| self.tree.nodes()[*node].probability;
        let nodes = (0..self.nodes.len()).filter(may_ask);
        let Some(tail) = nodes.max_by(|a, b| probability(a).total_cmp(&probability(b))) else {
            return 0;
        };
        self.lengthen(making, tail);
        1
    }

    /// Asks about the `most` likeliest nodes that were not asked about; says how many there were.
    fn ask_likeliest(&mut self, making: &Making<'_>, most: usize) -> usize {
        let may_ask = |node: &usize| {
            self.nodes[*node].opinion.is_none() && self.tree.nodes()[*node].depth < self.depth_max
        };
        let mut nodes: Vec<usize> = (0..self.nodes.len()).filter(may_ask).collect();
        let probability = |node: &usize| self.tree.nodes()[*node].probability;
        nodes.sort_by(|a, b| probability(b).total_cmp(&probability(a)).then(a.cmp(b)));
        nodes.truncate(most);
        nodes.iter().for_each(|node| self.ask(making, *node, DRAFTS.width, false));
        nodes.len()
    }

    /// Rows up to id `last` are back: walks as far as they lead.
    pub(crate) fn walk(&mut self, making: &mut Making<'_>, last: u32) -> Walked {
        self.returned_id = self.returned_id.max(last);
        let mut walked = Walked { tokens: 0, over: false, ahead: false };
        loop {
            let node = self.nodes[self.at];
            if node.id == 0 || node.id > self.returned_id {
                break;
            }
            walked.tokens += 1;
            let depth = self.tree.nodes()[self.at].depth;
            self.note_children(making.acceptance, self.root + depth + 1);
            match self.tree.child(self.at, self.root + depth + 1) {
                Some(child) if depth < self.depth_max => self.at = child,
                _ => {
                    walked.over = true;
                    self.returned_id = self.last_id; // whatever is away is void
                    walked.ahead = making.switches.parallel
                        && !self.waved
                        && making.switches.trained == Trained::Adapter
                        && self.is_ahead(&making.text);
                    return walked;
                }
            }
        }
        walked
    }

    /// The guesses below where the walk stands are compared with the decided token.
    fn note_children(&self, acceptance: &mut Acceptance, right: u32) {
        let below = |node: &&hat_engine::draft::Node| node.parent == self.at && node.depth > 0;
        for node in self.tree.nodes().iter().filter(below) {
            if let Some(source) = node.source {
                acceptance.note(source, node.token == right);
            }
        }
    }

    /// While rows were away, the drafter went on below the likeliest tails. Whether that includes
    /// the token decided after where the walk stands.
    fn is_ahead(&self, text: &Text<'_>) -> bool {
        let nodes = self.tree.nodes();
        let is_leaf = |node: &usize| !nodes[node + 1..].iter().any(|below| below.parent == *node);
        let mut tails: Vec<(f64, usize, usize)> = vec![];
        for leaf in (0..nodes.len()).filter(is_leaf) {
            let opinion = self.opinion(text, leaf, false);
            let probability = f64::from(nodes[leaf].probability);
            tails.extend(
                (0..AHEAD_WIDTH).map(|rank| (probability * opinion.probability(rank), leaf, rank)),
            );
        }
        tails.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let right = self.opinion(text, self.at, false).right();
        tails
            .iter()
            .take(AHEAD_WIDTH)
            .any(|(_, leaf, rank)| *leaf == self.at && right == Some(*rank))
    }

    /// Makes the node at which the walk stands the root: what is not below it is void.
    fn take_root(&mut self, making: &Making<'_>) {
        let old = std::mem::take(&mut self.tree);
        let nodes = std::mem::take(&mut self.nodes);
        let at = old.nodes()[self.at];
        let mut place = vec![None; nodes.len()];
        place[self.at] = Some(0);
        self.root += at.depth;
        self.depth_max -= at.depth;
        self.tree.reset(at.token, self.depth_max);
        self.nodes.push(nodes[self.at]);
        for index in self.at + 1..nodes.len() {
            let node = old.nodes()[index];
            let (Some(parent), Some(source)) = (place[node.parent], node.source) else { continue };
            let above = old.nodes()[node.parent].probability.max(f32::MIN_POSITIVE);
            let probability = node.probability / above;
            let guess = hat_engine::draft::tree::Guess { token: node.token, probability, source };
            self.tree.offer(parent, [guess]);
            let new = self.nodes.len();
            self.tree.grow(new + 1, 0.0);
            place[index] = Some(new);
            self.nodes.push(nodes[index]);
        }
        if making.switches.shape == Shape::Tree {
            (0..self.nodes.len()).for_each(|node| self.offer(making, node, DRAFTS.width));
        }
        if making.switches.lookup {
            self.offer_lookup(making);
        }
        self.at = 0;
    }
}

impl Making<'_> {
    /// Seconds of asking the adapter about so many nodes.
    fn proposal_seconds(&self, rows: usize) -> f64 {
        let head = if self.switches.short_head { self.device.short_head } else { self.device.head };
        self.device.adapter.seconds(rows) + head.seconds(rows)
    }

    /// Seconds of one step of drafting ahead.
    pub(crate) fn ahead_seconds(&self) -> f64 {
        self.device.layers.seconds(AHEAD_WIDTH) + self.proposal_seconds(AHEAD_WIDTH)
    }
}
