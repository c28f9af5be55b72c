//! Layers made by GNU tar, Python and ourselves, against what Python and the kernel read of them.

mod archives;
mod index;
mod oracle;
mod property;
mod root;
mod support;
mod tree;

pub use property::{changes, mangle};
pub use support::{Archive, index_by, noise, pinned_index, tree};
