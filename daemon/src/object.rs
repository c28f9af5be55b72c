//! Names of content: git object ids.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha1::Digest;
use thiserror::Error;

/// The hash function of a git repository (`extensions.objectFormat`, gitformat-pack(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HashKind {
    Sha1,
    Sha256,
}

impl HashKind {
    /// The length of an id in bytes: 20 or 32.
    #[must_use]
    pub fn id_len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    /// The name that git gives it: `sha1` or `sha256`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
        }
    }

    /// A running hash of this kind.
    #[must_use]
    pub fn hasher(self) -> Hasher {
        match self {
            Self::Sha1 => Hasher::Sha1(sha1::Sha1::new()),
            Self::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
        }
    }
}

/// A running hash.
#[derive(Debug, Clone)]
pub enum Hasher {
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha1(h) => h.update(bytes),
            Self::Sha256(h) => h.update(bytes),
        }
    }

    /// The hash of all that was given to [`update`](Self::update).
    #[must_use]
    pub fn finish(self) -> ObjectId {
        let mut bytes = [0; 32];
        let kind = match self {
            Self::Sha1(h) => {
                bytes[..20].copy_from_slice(&h.finalize());
                HashKind::Sha1
            }
            Self::Sha256(h) => {
                bytes.copy_from_slice(&h.finalize());
                HashKind::Sha256
            }
        };
        ObjectId { kind, bytes }
    }
}

/// The id of a git object: the hash of `"<type> <size>\0"` and its content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    bytes: [u8; 32],
    kind: HashKind,
}

impl PartialOrd for HashKind {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for HashKind {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.id_len().cmp(&other.id_len())
    }
}

/// Text or bytes that are no object id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not an object id (40 or 64 hexadecimal digits)")]
pub struct NotAnObjectId(pub String);

impl ObjectId {
    /// From 20 (SHA-1) or 32 (SHA-256) bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NotAnObjectId> {
        let kind = match bytes.len() {
            20 => HashKind::Sha1,
            32 => HashKind::Sha256,
            _ => return Err(NotAnObjectId(format!("{bytes:x?}"))),
        };
        let mut id = Self { kind, bytes: [0; 32] };
        id.bytes[..bytes.len()].copy_from_slice(bytes);
        Ok(id)
    }

    /// From 40 or 64 hexadecimal digits.
    pub fn from_hex(hex: &[u8]) -> Result<Self, NotAnObjectId> {
        let wrong = || NotAnObjectId(String::from_utf8_lossy(hex).into_owned());
        let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8).ok_or_else(wrong);
        if hex.len() != 40 && hex.len() != 64 {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Self::from_bytes(&bytes[..hex.len() / 2])
    }

    /// The id of a blob with this content.
    #[must_use]
    pub fn of_blob(kind: HashKind, content: &[u8]) -> Self {
        let mut hasher = kind.hasher();
        hasher.update(format!("blob {}\0", content.len()).as_bytes());
        hasher.update(content);
        hasher.finish()
    }

    /// 20 or 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.kind.id_len()]
    }

    #[must_use]
    pub fn kind(&self) -> HashKind {
        self.kind
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectId({self})")
    }
}

impl Serialize for ObjectId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.as_bytes())
    }
}

impl<'de> Deserialize<'de> for ObjectId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ObjectId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("20 or 32 bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<ObjectId, E> {
                ObjectId::from_bytes(bytes).map_err(E::custom)
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_the_empty_blob() {
        // git hash-object -t blob /dev/null, in repositories of either format
        let sha1 = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";
        let sha256 = "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813";
        assert_eq!(ObjectId::of_blob(HashKind::Sha1, b"").to_string(), sha1);
        assert_eq!(ObjectId::of_blob(HashKind::Sha256, b"").to_string(), sha256);
        assert_eq!(ObjectId::from_hex(sha1.as_bytes()).unwrap().to_string(), sha1);
        assert!(ObjectId::from_hex(b"e69d").is_err());
        assert!(ObjectId::from_hex(&[b'g'; 40]).is_err());
    }

    #[test]
    fn survives_serialisation() {
        let id = ObjectId::of_blob(HashKind::Sha256, b"x");
        let bytes = postcard::to_stdvec(&id).unwrap();
        assert_eq!(postcard::from_bytes::<ObjectId>(&bytes).unwrap(), id);
    }
}
