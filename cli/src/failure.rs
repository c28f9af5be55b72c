//! What is said and returned when a command fails.

use std::process::ExitCode;

use hydrant_api::ErrorBody;

use crate::output::clean;

/// The kinds of failure that callers can tell apart by the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Failed,
    Usage,
    /// The daemon can't be reached, or not be started.
    Unreachable,
    /// Ctrl-C.
    Interrupted,
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: Kind,
    /// What failed, and why.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { kind: Kind::Failed, message: message.into(), hint: None }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, ..Self::new(message) }
    }

    pub fn unreachable(message: impl Into<String>) -> Self {
        Self { kind: Kind::Unreachable, ..Self::new(message) }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Unreachable => 3,
            // 128 + SIGINT, as shells have it.
            Kind::Interrupted => 130,
        })
    }

    /// On standard error: `error: ...`, then `hint: ...`.
    pub fn show(&self) {
        eprintln!("error: {}", clean(&self.message));
        if let Some(hint) = &self.hint {
            eprintln!("hint: {}", clean(hint));
        }
    }
}

impl From<ErrorBody> for Failure {
    fn from(error: ErrorBody) -> Self {
        Self { kind: Kind::Failed, message: error.message, hint: error.hint }
    }
}
