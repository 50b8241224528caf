//! Shared measuring of the benches: bounds of this machine beside every number.
