//! What `hydrant doctor` and `hydrantd doctor` find out.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// A prerequisite, and whether it is met: found by trying, not by version numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// One word, such as `overlayfs`.
    pub name: String,
    pub severity: Severity,
    #[serde(flatten)]
    pub result: CheckResult,
    /// What was tried and seen.
    pub detail: String,
}

/// What it means when a check fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing works without.
    Required,
    /// Slower, less safe, or not for everything.
    Recommended,
}

/// The outcome of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "lowercase")]
pub enum CheckResult {
    Ok,
    Failed { problem: String, remedy: String },
}

impl Check {
    /// Nothing works as long as this is so.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.severity == Severity::Required && self.result != CheckResult::Ok
    }
}

/// Whether Hydrant can work here.
#[must_use]
pub fn is_usable(checks: &[Check]) -> bool {
    !checks.iter().any(Check::is_fatal)
}

/// The checks as text, a line each, and two more for one that failed.
#[must_use]
pub fn to_text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (name, detail) = (&check.name, &check.detail);
        // Writing to a string does not fail.
        let _ = match &check.result {
            CheckResult::Ok => writeln!(text, "ok      {name:width$}  {detail}"),
            CheckResult::Failed { problem, remedy } => {
                let word = if check.is_fatal() { "FAILED " } else { "warning" };
                let indent = " ".repeat(8 + width + 2);
                writeln!(
                    text,
                    "{word} {name:width$}  {problem}\n{indent}{detail}\n{indent}Hint: {remedy}"
                )
            }
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(severity: Severity, result: CheckResult) -> Check {
        Check { name: "erofs".into(), severity, result, detail: "tried".into() }
    }

    fn failed() -> CheckResult {
        CheckResult::Failed { problem: "no".into(), remedy: "do".into() }
    }

    #[test]
    fn only_what_is_required_is_fatal() {
        let recommended = check(Severity::Recommended, failed());
        let required = check(Severity::Required, failed());
        assert!(is_usable(&[check(Severity::Required, CheckResult::Ok), recommended.clone()]));
        assert!(!is_usable(std::slice::from_ref(&required)));
        assert_eq!(
            to_text(&[check(Severity::Required, CheckResult::Ok), recommended, required]),
            "ok      erofs  tried\n\
             warning erofs  no\n               tried\n               Hint: do\n\
             FAILED  erofs  no\n               tried\n               Hint: do\n"
        );
    }

    #[test]
    fn the_json_is_flat() {
        let json = serde_json::to_value(check(Severity::Required, failed())).unwrap();
        let expected = serde_json::json!({
            "name": "erofs", "severity": "required", "result": "failed",
            "problem": "no", "remedy": "do", "detail": "tried",
        });
        assert_eq!(json, expected);
        let ok = check(Severity::Recommended, CheckResult::Ok);
        let json = serde_json::to_string(&ok).unwrap();
        assert_eq!(serde_json::from_str::<Check>(&json).unwrap(), ok);
    }
}
