//! The panel layout: one interleaved order that serves one row and many rows alike.
