//! System calls that no crate wraps safely enough. With `fanotify/` the only place that has `unsafe`
//! code; what it offers is safe.

pub mod shared;
