//! What the daemon needs of the machine.

use hydrant_api::doctor::{Check, Severity};

use crate::output::clean_line;

/// One line for each check, and what to do about those that failed.
pub fn checks(checks: &[Check]) -> String {
    let mut text = String::new();
    let mut line = |indent: &str, part: &str| {
        text.push_str(indent);
        text.push_str(&clean_line(part));
        text.push('\n');
    };
    for check in checks {
        let mark = match (check.ok, check.severity) {
            (true, _) => "ok      ",
            (false, Severity::Required) => "MISSING ",
            (false, Severity::Recommended) => "advised ",
        };
        let said = if check.ok { check.detail.as_ref() } else { check.problem.as_ref() };
        match said {
            Some(said) => line(mark, &format!("{}: {said}", check.name)),
            None => line(mark, &check.name),
        }
        if check.ok {
            continue;
        }
        if let Some(detail) = &check.detail {
            line("        found: ", detail);
        }
        if let Some(remedy) = &check.remedy {
            line("        remedy: ", remedy);
        }
    }
    let failed = |severity| checks.iter().filter(|c| !c.ok && c.severity == severity).count();
    let end = match (failed(Severity::Required), failed(Severity::Recommended)) {
        (0, 0) => "all is well".to_owned(),
        (0, advised) => format!("Hydrant works here; advised: {advised}"),
        (missing, _) => format!("Hydrant does not work here; missing: {missing}"),
    };
    line("", &end);
    text
}

/// Whether Hydrant works at all.
pub fn is_usable(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.ok || check.severity == Severity::Recommended)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, severity: Severity, ok: bool) -> Check {
        Check { name: name.into(), severity, ok, problem: None, remedy: None, detail: None }
    }

    #[test]
    fn checks_that_hold_and_do_not() {
        let all = [
            Check {
                detail: Some("Linux 6.18".into()),
                ..check("pre-content events", Severity::Required, true)
            },
            Check {
                problem: Some("mount: ENODEV".into()),
                remedy: Some("modprobe erofs".into()),
                detail: Some("no erofs in /proc/filesystems".into()),
                ..check("EROFS", Severity::Required, false)
            },
            check("Landlock", Severity::Recommended, false),
        ];
        assert_eq!(
            checks(&all),
            "\
ok      pre-content events: Linux 6.18
MISSING EROFS: mount: ENODEV
        found: no erofs in /proc/filesystems
        remedy: modprobe erofs
advised Landlock
Hydrant does not work here; missing: 1
"
        );
        assert!(!is_usable(&all));
        assert!(
            is_usable(&all[2..]) && checks(&all[2..]).contains("Hydrant works here; advised: 1")
        );
        assert!(checks(&all[..1]).ends_with("all is well\n"));
    }
}
