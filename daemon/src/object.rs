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

/// The first eight bytes of an id's bytes as a number; see [`ObjectId::prefix`].
#[must_use]
pub fn prefix(id: &[u8]) -> u64 {
    id.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// In [`DIGITS`]: no digit.
const NO_DIGIT: u8 = 0x80;

/// The value of each byte as a hexadecimal digit.
const DIGITS: [u8; 256] = {
    let mut values = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        values[b"0123456789abcdef"[value] as usize] = value as u8;
        values[b"0123456789ABCDEF"[value] as usize] = value as u8;
        value += 1;
    }
    values
};

/// Text or bytes that are no object id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not an object id (40 or 64 hexadecimal digits)")]
pub struct NotAnObjectId(pub String);

/// A SHA-256.
impl From<[u8; 32]> for ObjectId {
    fn from(bytes: [u8; 32]) -> Self {
        Self { kind: HashKind::Sha256, bytes }
    }
}

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
        if hex.len() != 40 && hex.len() != 64 {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        let mut strange = 0;
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            let (high, low) = (DIGITS[usize::from(pair[0])], DIGITS[usize::from(pair[1])]);
            strange |= high | low;
            *byte = high << 4 | low & 0xf;
        }
        if strange & NO_DIGIT != 0 {
            return Err(wrong());
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

    /// Appends its 40 or 64 hexadecimal digits.
    pub fn append_hex(&self, out: &mut Vec<u8>) {
        let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
        out.extend(self.as_bytes().iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]));
    }

    /// Its first eight bytes as a number, which sorts as the ids do: enough to tell nearly all
    /// apart.
    #[must_use]
    pub fn prefix(&self) -> u64 {
        prefix(&self.bytes)
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
        let mut digits = Vec::with_capacity(64);
        self.append_hex(&mut digits);
        f.write_str(std::str::from_utf8(&digits).unwrap_or_default())
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
        impl<'a> serde::de::Visitor<'a> for Visitor {
            type Value = ObjectId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("20 or 32 bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<ObjectId, E> {
                ObjectId::from_bytes(bytes).map_err(E::custom)
            }
            // as JSON has them
            fn visit_seq<A: serde::de::SeqAccess<'a>>(
                self,
                mut seq: A,
            ) -> Result<ObjectId, A::Error> {
                let mut bytes = Vec::with_capacity(32);
                while let Some(byte) = seq.next_element()? {
                    bytes.push(byte);
                    if bytes.len() > 32 {
                        break;
                    }
                }
                self.visit_bytes(&bytes)
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
        let capitals = sha1.to_uppercase();
        assert_eq!(ObjectId::from_hex(capitals.as_bytes()).unwrap().to_string(), sha1);
        for (at, strange) in [(0, b'/'), (39, b':'), (7, b'@'), (8, b'`'), (20, 0xff)] {
            let mut hex = sha1.as_bytes().to_vec();
            hex[at] = strange;
            assert!(ObjectId::from_hex(&hex).is_err(), "{strange}");
        }
        assert_eq!(ObjectId::from_hex(sha1.as_bytes()).unwrap().prefix(), 0xe69d_e29b_b2d1_d643);
    }

    #[test]
    fn survives_serialisation() {
        let id = ObjectId::of_blob(HashKind::Sha256, b"x");
        let bytes = postcard::to_stdvec(&id).unwrap();
        assert_eq!(postcard::from_bytes::<ObjectId>(&bytes).unwrap(), id);
        let json = serde_json::to_value(id).unwrap();
        assert_eq!(serde_json::from_value::<ObjectId>(json).unwrap(), id);
        assert!(serde_json::from_str::<ObjectId>("[1, 2]").is_err());
    }
}
