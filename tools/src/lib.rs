//! Parts shared by the tools: chance without state, figures over many values, and one style of
//! plots. No interface for others.

pub mod plot;
pub mod random;
pub mod statistics;
