//! Every backend means what the reference means, and every CPU level gives the same bits.

#[path = "conformance/cases.rs"]
mod cases;
#[path = "conformance/meaning.rs"]
mod meaning;
#[path = "conformance/same_bits.rs"]
mod same_bits;
