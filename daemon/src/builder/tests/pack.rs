//! The existence pack, read by git.
