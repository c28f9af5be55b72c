//! What Hydrant's end-to-end tests and benchmarks are made of: repositories made from a seed
//! ([`repository`]), a git server that counts what is asked of it ([`server`]), a slow and broken
//! network ([`proxy`]), a daemon of the test's own ([`daemon`]), programs that read files in every
//! way there is ([`reader`], [`access`]), and comparisons ([`tree`]). [`world`] puts them together.
//!
//! Tests that need root have names that start with `root_` and are ignored unless asked for:
//! `cargo test -p hydrant-tests -- --ignored root_`. `HYDRANT_TEST_KEEP=1` keeps the directory of a
//! test, `HYDRANT_TEST_CACHE` names the directory in which generated repositories are kept.

pub mod access;
pub mod admin;
pub mod bare;
pub mod bench;
pub mod chaos;
pub mod container;
pub mod containerd;
pub mod daemon;
pub mod docker;
pub mod estate;
pub mod forward;
pub mod fuse;
pub mod grpc;
pub mod guest;
pub mod namespace;
pub mod powercut;
pub mod process;
pub mod proxy;
pub mod reader;
pub mod registry;
pub mod repository;
pub mod scratch;
pub mod server;
pub mod snapshots;
pub mod sshd;
pub mod state_fs;
pub mod tree;
pub mod world;
