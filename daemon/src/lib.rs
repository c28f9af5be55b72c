//! The Hydrant daemon.
//!
//! What happens when a file is read: [`fanotify`] (the kernel's event) → [`queue`] (to a worker)
//! → [`worker`] (which object, is it there?) → [`source`] (fetched, verified) → [`segment`] (written) →
//! back through the queue with an answer.

pub mod admin;
pub mod builder;
pub mod catalog;
pub mod config;
pub mod doctor;
pub mod erofs;
pub mod fanotify;
pub mod ids;
pub mod importer;
pub mod layer;
pub mod manifest;
pub mod mount;
pub mod object;
pub mod queue;
pub mod range;
pub mod segment;
pub mod snapshotter;
pub mod source;
pub mod standalone;
pub mod supervisor;
pub mod sys;
pub mod version;
pub mod watch;
pub mod worker;
