//! Things that our programs share, and no library needs: standard output and command lines
//! ([`mod@out`]), models by name or path ([`pull`]), and the end of a process whose mapped file
//! became shorter ([`shrunk`]).

pub mod out;
pub mod pull;
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a signal's action; see the module")]
pub mod shrunk;
