//! The framed protocol between device and cloud, and the links that carry it.
