//! The image against a reader of its own, the kernel, and `erofs-utils`.

mod kernel;
mod million;
mod mkfs;
mod overlay;
mod property;
mod reader;
mod structure;
mod support;
mod zoo;
