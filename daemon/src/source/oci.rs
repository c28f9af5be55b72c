//! Container images at a registry (OCI distribution specification 1.1).
//!
//! Everything here parses what a registry sends, and runs in workers and importers only, but for
//! [`mod@reference`], which is about what the user typed, and the signing in [`artifact`].

pub mod artifact;
mod assembly;
pub mod digest;
pub mod document;
pub mod fetch;
pub mod keys;
pub mod layer;
pub mod reference;
pub mod registry;
mod spans;
pub mod trace;
