//! The tools as processes.

mod link;
mod load;
mod output;
mod split;
