//! The kernel interface of fanotify(7), as far as pre-content events need it. The only place that
//! knows flags, layouts and ioctls.

mod answer;

pub use answer::{DenyErrno, Verdict};
