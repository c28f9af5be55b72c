//! The keys with which indexes are signed: Ed25519 (RFC 8032), in the files that `openssl` makes (RFC 8410).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};

/// What stands before the 32 bytes of a public key in its DER form (SubjectPublicKeyInfo).
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];

/// A key that signatures are checked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKey([u8; 32]);

/// A key that signs.
pub struct Signer(Ed25519KeyPair);

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Signer").field(&self.public()).finish()
    }
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let text: String = text.split_whitespace().collect();
    STANDARD.decode(text).ok()
}

impl PublicKey {
    /// Reads a key: PEM, or base64 of its DER form or of its 32 bytes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let pem = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes());
        let bytes = pem.map(|key| key.to_vec()).ok().or_else(|| decode(text))?;
        let key = match bytes.len() {
            32 => &bytes[..],
            _ => bytes.strip_prefix(&PUBLIC_PREFIX)?,
        };
        key.try_into().ok().map(Self)
    }

    /// In base64, as it is put into a configuration.
    #[must_use]
    pub fn text(&self) -> String {
        STANDARD.encode(self.0)
    }

    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

impl Signer {
    /// Reads a private key, PKCS#8 in PEM.
    #[must_use]
    pub fn from_pem(text: &str) -> Option<Self> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).ok()?;
        // openssl leaves the public key out, against which the private one could be checked
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).ok().map(Self)
    }

    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }

    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(key)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// As `openssl genpkey -algorithm ed25519` writes it.
    pub fn key(seed: u8) -> String {
        let mut der = vec![0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        der.extend([seed; 32]);
        let base64 = STANDARD.encode(der);
        format!("-----BEGIN PRIVATE KEY-----\n{base64}\n-----END PRIVATE KEY-----\n")
    }

    #[test]
    fn keys_and_signatures() {
        let signer = Signer::from_pem(&key(1)).unwrap();
        let public = signer.public();
        let signature = signer.sign(b"message");
        assert!(public.verify(b"message", &signature));
        assert!(!public.verify(b"massage", &signature) && !public.verify(b"message", b""));
        assert!(!Signer::from_pem(&key(2)).unwrap().public().verify(b"message", &signature));
        let der = STANDARD.encode([&PUBLIC_PREFIX[..], &public.0].concat());
        let (start, end) = der.split_at(40);
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{start}\n{end}\n-----END PUBLIC KEY-----\n");
        for text in [public.text(), der.clone(), pem] {
            assert_eq!(PublicKey::parse(&text), Some(public), "{text}");
        }
        for text in ["", "AAAA", "?", &der[4..], &key(1)] {
            assert_eq!(PublicKey::parse(text), None, "{text}");
        }
        assert!(Signer::from_pem("").is_none() && Signer::from_pem(&public.text()).is_none());
    }
}
