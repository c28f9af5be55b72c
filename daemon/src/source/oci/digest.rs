//! Digests: `sha256:` and 64 hexadecimal digits in lower case.

use crate::object::{HashKind, ObjectId};

const PREFIX: &str = "sha256:";

/// The SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> ObjectId {
    let mut hasher = HashKind::Sha256.hasher();
    hasher.update(bytes);
    hasher.finish()
}

/// Reads a digest. Other algorithms than SHA-256 are not known.
#[must_use]
pub fn parse(text: &str) -> Option<ObjectId> {
    let hex = text.strip_prefix(PREFIX)?;
    if hex.len() != 64 || hex.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    ObjectId::from_hex(hex.as_bytes()).ok()
}

/// As images write it.
#[must_use]
pub fn text(digest: &ObjectId) -> String {
    format!("{PREFIX}{digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(text(&sha256(b"")), empty);
        assert_eq!(parse(empty), Some(sha256(b"")));
        for wrong in ["", "sha256:", "sha512:e3", &empty.to_uppercase(), &empty[..70]] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
