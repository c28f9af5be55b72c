//! How many files may be open: each event that waits holds one.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What is asked for where the hard limit can be raised.
const WANTED: u64 = 1 << 20;

/// `RLIMIT_NOFILE`, see getrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFiles {
    pub soft: u64,
    pub hard: u64,
}

/// The limits as they are.
pub fn open_files() -> io::Result<OpenFiles> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(OpenFiles { soft, hard })
}

/// Raises the soft limit to the hard one, and the hard one to 2^20 where the process may.
pub fn raise_open_files() -> io::Result<OpenFiles> {
    let now = open_files()?;
    if now.hard < WANTED && setrlimit(Resource::RLIMIT_NOFILE, WANTED, WANTED).is_ok() {
        return Ok(OpenFiles { soft: WANTED, hard: WANTED });
    }
    setrlimit(Resource::RLIMIT_NOFILE, now.hard, now.hard)?;
    Ok(OpenFiles { soft: now.hard, hard: now.hard })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let before = open_files().unwrap();
        let after = raise_open_files().unwrap();
        assert_eq!(after.soft, after.hard);
        assert!(after.hard >= before.hard);
        assert_eq!(open_files().unwrap(), after);
    }
}
