//! Paths as text. Paths are bytes, JSON strings are not.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A path as it appears in requests and responses: bytes that are not UTF-8, and control characters,
/// as `\xNN`; a backslash as `\x5c` where it would look like one of those, else as it is.
#[must_use]
pub fn path_to_text(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let mut text = String::with_capacity(bytes.len());
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            let at = done;
            done += c.len_utf8();
            let looks_escaped = c == '\\' && bytes.get(at..).is_some_and(|b| escaped(b).is_some());
            if c.is_control() || looks_escaped {
                push_escaped(&mut text, bytes.get(at..done).unwrap_or_default());
            } else {
                text.push(c);
            }
        }
        push_escaped(&mut text, chunk.invalid());
        done += chunk.invalid().len();
    }
    text
}

/// The path that [`path_to_text`] made this text of. Any text stands for some path.
#[must_use]
pub fn path_from_text(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if let Some(byte) = escaped(rest) {
            bytes.push(byte);
            rest = rest.get(4..).unwrap_or_default();
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// The byte that stands as `\xNN` at the start of `bytes`.
fn escaped(bytes: &[u8]) -> Option<u8> {
    let [b'\\', b'x', high, low, ..] = bytes else { return None };
    let digit = |c: u8| (c as char).to_digit(16);
    u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()
}

fn push_escaped(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing to a String does not fail.
        let _ = write!(text, "\\x{byte:02x}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(bytes: &[u8]) -> PathBuf {
        PathBuf::from(OsString::from_vec(bytes.to_vec()))
    }

    #[test]
    fn plain_paths_stay_as_they_are() {
        for text in ["/srv/tree", "/with space/größe", r"/back\slash/\x", ""] {
            assert_eq!(path_to_text(Path::new(text)), text);
            assert_eq!(path_from_text(text), Path::new(text));
        }
    }

    #[test]
    fn other_bytes_survive() {
        for (bytes, text) in [
            (&b"/a\xff\xfeb"[..], r"/a\xff\xfeb"),
            (b"/new\nline\x1b[1m", r"/new\x0aline\x1b[1m"),
            (br"/a\xffb", r"/a\x5cxffb"),
            (b"\xc3\\xc3\xbc", r"\xc3\x5cxc3\xbc"),
            ("\u{85}".as_bytes(), r"\xc2\x85"),
        ] {
            assert_eq!(path_to_text(&path(bytes)), text);
            assert_eq!(path_from_text(text), path(bytes));
        }
    }

    #[test]
    fn every_byte_pair_comes_back() {
        for a in 1..=255u8 {
            for b in [b'\\', b'x', b'4', 0x80, 0xc3, b'\n', a] {
                let bytes = [b'/', a, b, b'x', b'4', b'1', a, b];
                assert_eq!(path_from_text(&path_to_text(&path(&bytes))), path(&bytes));
            }
        }
    }
}
