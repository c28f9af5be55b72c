//! Changes that make overlayfs copy a file up.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Kind;

/// Changes `file`, whose content is `truth`; gives where it is now and what it has to contain.
pub(super) fn change(kind: Kind, file: &Path, truth: &[u8]) -> io::Result<(PathBuf, Vec<u8>)> {
    let mut content = truth.to_vec();
    let mut other = file.as_os_str().to_owned();
    other.push(".other");
    let other = PathBuf::from(other);
    let mut now = file.to_owned();
    match kind {
        Kind::Chmod => {
            fs_err::set_permissions(file, std::fs::Permissions::from_mode(0o600))?;
            let mode = fs_err::metadata(file)?.permissions().mode() & 0o7777;
            if mode != 0o600 {
                return Err(io::Error::other(format!("mode {mode:o} after chmod")));
            }
        }
        Kind::Rename => {
            fs_err::rename(file, &other)?;
            now = other;
        }
        Kind::Append => {
            OpenOptions::new().append(true).open(file)?.write_all(b"appended")?;
            content.extend_from_slice(b"appended");
        }
        Kind::Truncate => {
            content.truncate(truth.len() / 2 + 1);
            OpenOptions::new().write(true).open(file)?.set_len(content.len() as u64)?;
        }
        Kind::Replace => {
            content = b"replaced".to_vec();
            OpenOptions::new().write(true).truncate(true).open(file)?.write_all(&content)?;
        }
        Kind::Write => {
            let place = truth.len() / 2;
            OpenOptions::new().write(true).open(file)?.write_all_at(b"#", place as u64)?;
            match content.get_mut(place) {
                Some(byte) => *byte = b'#',
                None => content.push(b'#'),
            }
        }
        Kind::Setxattr => setxattr(file)?,
        Kind::Link => {
            fs_err::hard_link(file, &other)?;
            now = other;
        }
        _ => return Err(io::Error::other("not a change")),
    }
    Ok((now, content))
}

fn setxattr(file: &Path) -> io::Result<()> {
    let path = CString::new(file.as_os_str().as_bytes())?;
    let value = b"value";
    // SAFETY: two strings that end in zero, and a buffer with its length.
    let result = unsafe {
        libc::setxattr(path.as_ptr(), c"user.test".as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
