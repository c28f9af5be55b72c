//! TLS: which certificates are trusted.

use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme, version,
};

use crate::queue::wire::ClientCertificate;

static SYSTEM_ROOTS: OnceLock<RootCertStore> = OnceLock::new();

/// Reads the system's certificates, once in the life of a process. A worker calls it before it
/// gives up its right to read files.
pub fn load_system_roots() -> &'static RootCertStore {
    SYSTEM_ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in found.errors {
            tracing::debug!("can't read some of the system's certificates: {error}");
        }
        roots.add_parsable_certificates(found.certs);
        roots
    })
}

/// Trusts the system's certificates and those in `ca_pem`; everything if `insecure`. `client` is shown
/// to servers that ask for a certificate.
pub fn config(
    ca_pem: Option<&str>,
    client: Option<&ClientCertificate>,
    insecure: bool,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])
        .map_err(|e| format!("TLS can't be used: {e}"))?;
    let pem = ca_pem.filter(|_| !insecure);
    let builder = if pem.is_none() && !insecure {
        builder.with_root_certificates(roots("")?)
    } else {
        let authorities = match pem {
            None => None,
            Some(pem) => {
                let roots = roots(pem)?.into();
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
                Some(verifier.build().map_err(|e| format!("TLS can't be used: {e}"))?)
            }
        };
        let named = certificates(pem.unwrap_or_default()).filter_map(Result::ok).collect();
        let trusts = Arc::new(Trusts { provider, authorities, named });
        builder.dangerous().with_custom_certificate_verifier(trusts)
    };
    let mut config = match client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let chain = CertificateDer::pem_slice_iter(client.certificate.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| format!("http.sslCert can't be used: {e}"))?;
            builder
                .with_client_auth_cert(chain, key(&client.key)?)
                .map_err(|e| format!("http.sslCert and http.sslKey can't be used: {e}"))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The system's certificates and these. One that can't be used doesn't spoil the others, which may be
/// a whole directory.
fn roots(ca_pem: &str) -> Result<RootCertStore, String> {
    let mut roots = load_system_roots().clone();
    let (mut taken, mut why) = (0, None);
    for certificate in certificates(ca_pem) {
        let added = certificate.map_err(|e| e.to_string());
        match added.and_then(|certificate| roots.add(certificate).map_err(|e| e.to_string())) {
            Ok(()) => taken += 1,
            Err(error) => why = Some(error),
        }
    }
    match why {
        Some(why) if taken == 0 => Err(format!(
            "http.sslCAInfo or http.sslCAPath has only certificates that can't be used: {why}"
        )),
        _ => Ok(roots),
    }
}

fn certificates(
    pem: &str,
) -> impl Iterator<Item = Result<CertificateDer<'static>, pem::Error>> + '_ {
    CertificateDer::pem_slice_iter(pem.as_bytes())
}

fn key(pem: &str) -> Result<PrivateKeyDer<'static>, String> {
    if pem.contains("ENCRYPTED") {
        return Err(
            "http.sslKey is encrypted with a passphrase, which nobody can be asked for".into()
        );
    }
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| format!("http.sslKey can't be used: {e}"))
}

/// Authorities, and servers whose own certificates the user has named (`http.sslCAInfo`). Those are often signed
/// by themselves and say that they are an authority, as `openssl req -x509` makes them; curl takes them.
#[derive(Debug)]
struct Trusts {
    provider: Arc<CryptoProvider>,
    /// `None`: everybody is trusted, as the user has asked for it (`http.sslVerify=false`).
    authorities: Option<Arc<WebPkiServerVerifier>>,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Trusts {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(authorities) = &self.authorities else {
            return Ok(ServerCertVerified::assertion());
        };
        let verified = authorities.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // webpki says so only of one that has begun and not expired
            Err(error) if is_authority(&error) && self.named.contains(end_entity) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a server's certificate was refused because it is an authority's.
fn is_authority(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(OtherError(error))) = error else {
        return false;
    };
    matches!(error.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
}
