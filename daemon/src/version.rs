//! Versions of what one program leaves and another one finds.
//!
//! Each such format has a number of its own, N, raised when it changes (CONTRIBUTING.md says when). A program
//! writes N and reads N and N-1: so an upgrade from the program before goes on with what is there. All other
//! versions are refused. ARCHITECTURE.md has the list of what there is.

use thiserror::Error;

/// Something of a version that this program does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{what} is of version {found}, and this hydrantd knows {}: {}", known(*.own), remedy(*.found, *.own))]
pub struct OtherVersion {
    what: &'static str,
    found: u64,
    own: u64,
}

fn known(own: u64) -> String {
    if own > 1 { format!("{} and {own}", own - 1) } else { own.to_string() }
}

fn remedy(found: u64, own: u64) -> &'static str {
    if found > own {
        "install the one that wrote it, or a later one"
    } else {
        "install the one that wrote it and stop that first, or one that came in between"
    }
}

/// Whether a program that writes version `own` of something reads version `found`.
pub fn check(what: &'static str, found: u64, own: u64) -> Result<(), OtherVersion> {
    let oldest = own.saturating_sub(1).max(1);
    if (oldest..=own).contains(&found) { Ok(()) } else { Err(OtherVersion { what, found, own }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_and_the_one_before() {
        let readable: Vec<_> = (0..10).filter(|found| check("it", *found, 7).is_ok()).collect();
        assert_eq!(readable, [6, 7]);
        // the first has none before it
        assert_eq!(check("it", 1, 1), Ok(()));
        assert!(check("it", 0, 1).is_err());
        let said = |found| check("the table", found, 7).unwrap_err().to_string();
        assert_eq!(
            said(8),
            "the table is of version 8, and this hydrantd knows 6 and 7: install the one that wrote it, \
             or a later one"
        );
        assert!(said(5).contains("stop that first"), "{}", said(5));
    }
}
