//! Names of images, as people write them: `[registry/]repository[:tag][@digest]`.

use std::fmt;
use std::net::IpAddr;

use thiserror::Error;

use super::digest;
use crate::object::ObjectId;

const HUB: &str = "docker.io";
/// Where the images of [`HUB`] really are.
const HUB_HOST: &str = "registry-1.docker.io";

/// An image at a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `host[:port]`, such as `docker.io`.
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    /// Of the manifest; where there is one, the tag only is for people to read.
    pub digest: Option<ObjectId>,
}

/// Text that names no image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is no image's name: {what}")]
pub struct NotAReference {
    text: String,
    what: &'static str,
}

impl Reference {
    /// Reads a name by the rules of `distribution/reference`: what comes before the first `/` is a
    /// registry if it has a dot or a colon in it or is `localhost`; the tag is `latest` where there is
    /// neither tag nor digest. A leading `oci://` or `docker://` is overlooked.
    pub fn parse(text: &str) -> Result<Self, NotAReference> {
        let wrong = |what| NotAReference { text: text.to_owned(), what };
        let name = text.strip_prefix("oci://").or_else(|| text.strip_prefix("docker://"));
        let name = name.unwrap_or(text);
        let (name, digest) = match name.split_once('@') {
            None => (name, None),
            Some((name, text)) => {
                let digest = digest::parse(text);
                (name, Some(digest.ok_or_else(|| wrong("the digest is not sha256:<64 digits>"))?))
            }
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, rest)
            }
            _ => (HUB, name),
        };
        let (path, tag) = match path.rsplit_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (path, None),
        };
        let registry = if registry == "index.docker.io" { HUB } else { registry };
        if !is_host(registry) {
            return Err(wrong("the registry is not host[:port]"));
        }
        let repository = match path.contains('/') || registry != HUB {
            true => path.to_owned(),
            false => format!("library/{path}"),
        };
        if repository.len() > 255 || !repository.split('/').all(is_component) {
            return Err(wrong(
                "the repository must be of small letters, digits, and . _ - between",
            ));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(wrong("the tag must be of letters, digits and . _ -"));
        }
        let tag = match tag {
            None if digest.is_none() => Some("latest".to_owned()),
            tag => tag.map(str::to_owned),
        };
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }

    /// The last part of a manifest's URL: a digest or a tag.
    #[must_use]
    pub fn manifest(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest::text(digest),
            (None, tag) => tag.clone().unwrap_or_else(|| "latest".into()),
        }
    }

    /// Where the registry's API is: host and port.
    #[must_use]
    pub fn host(&self) -> &str {
        if self.registry == HUB { HUB_HOST } else { &self.registry }
    }

    /// The registry is on this machine, so that nobody in between can read along.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let host = match self.registry.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => &self.registry,
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.iter().try_for_each(|digest| write!(f, "@{}", digest::text(digest)))
    }
}

fn is_host(host: &str) -> bool {
    let parsed = url::Url::parse(&format!("https://{host}/"));
    let plain = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b);
    host.bytes().all(plain) && parsed.is_ok_and(|url| url.host_str().is_some() && url.path() == "/")
}

/// Small letters and digits, with `.`, `_`, `__` or any number of `-` between them.
fn is_component(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends =
        bytes.first().is_some_and(|b| letter(*b)) && bytes.last().is_some_and(|b| letter(*b));
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let mut separators = separators.filter(|part| !part.is_empty());
    ends && separators.all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(text: &str) -> String {
        Reference::parse(text).unwrap().to_string()
    }

    #[test]
    fn names_are_completed() {
        assert_eq!(whole("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(whole("me/x:1"), "docker.io/me/x:1");
        assert_eq!(whole("index.docker.io/me/x"), "docker.io/me/x:latest");
        assert_eq!(whole("oci://localhost/x"), "localhost/x:latest");
        assert_eq!(whole("127.0.0.1:5000/a/b__c/d:v1"), "127.0.0.1:5000/a/b__c/d:v1");
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(whole(&format!("h.io/x@{digest}")), format!("h.io/x@{digest}"));
        let both = Reference::parse(&format!("h.io/x:1@{digest}")).unwrap();
        assert_eq!((both.manifest(), both.tag.as_deref()), (digest, Some("1")));
        assert_eq!(Reference::parse("busybox").unwrap().host(), "registry-1.docker.io");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "Busybox",
            "a//b",
            "h.io/",
            "h.io/x:",
            "x:a/b",
            "x@sha256:12",
            "x@",
            "a..b",
            "-a",
            "h.io/../x",
            "h.io:port/x",
            "u@h.io/x",
            "h.io/x?y",
            "h.io/x:t g",
            "a.b/c#d",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn loopback() {
        for text in ["localhost/x", "localhost:5000/x", "127.0.0.2:1/x", "[::1]:5000/x"] {
            assert!(Reference::parse(text).unwrap().is_loopback(), "{text}");
        }
        for text in ["x", "localhost.com/x", "10.0.0.1:5000/x", "127.0.0.1.org/x"] {
            assert!(!Reference::parse(text).unwrap().is_loopback(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_reads_the_same_again(
            text in "([a-zA-Z0-9.:-]{1,20}/|)[a-z0-9._/-]{0,30}(:[A-Za-z0-9._-]{0,20}|)(@sha256:[0-9a-f]{63,65}|)|.{0,60}",
        ) {
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference.clone()));
                prop_assert!(!reference.repository.contains("..") && !reference.manifest().contains('/'));
            }
        }
    }
}
