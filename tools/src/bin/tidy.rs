//! The tree's own style check.
fn main() {}
