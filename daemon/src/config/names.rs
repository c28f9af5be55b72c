//! Names of images that a configuration speaks of: registries, and repositories in them.

use serde::Deserialize;

use crate::source::oci::reference::Reference;

/// `"all"`, or a list of `"host"`, `"host/repository"` and `"host/path/*"`, which is all that is below.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Text")]
pub enum Names {
    All,
    These(Vec<Name>),
}

impl Default for Names {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

/// One of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    registry: String,
    within: Within,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Within {
    Anything,
    Repository(String),
    /// With a `/` at the end.
    Below(String),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Text {
    One(String),
    Many(Vec<String>),
}

impl TryFrom<Text> for Names {
    type Error = String;

    fn try_from(text: Text) -> Result<Self, String> {
        match text {
            Text::One(text) if text == "all" => Ok(Self::All),
            Text::One(text) => Err(format!("{text:?} is neither \"all\" nor a list of names")),
            Text::Many(names) => {
                let names = names.iter().map(|name| {
                    Name::parse(name).ok_or_else(|| {
                        format!("{name:?} is not \"host\", \"host/repository\" or \"host/path/*\"")
                    })
                });
                Ok(Self::These(names.collect::<Result<_, _>>()?))
            }
        }
    }
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let (host, path) = match text.split_once('/') {
            Some((host, path)) if path != "*" => (host, Some(path)),
            Some((host, _)) => (host, None),
            None => (text, None),
        };
        let anything = path.is_none();
        let (path, below) = match path.map(|path| (path, path.strip_suffix("/*"))) {
            None => (String::from("x/x"), false),
            Some((_, Some(path))) => (format!("{path}/x"), true),
            Some((path, None)) => (path.to_owned(), false),
        };
        let parsed = Reference::parse(&format!("{host}/{path}")).ok()?;
        // neither a tag nor a digest, and the host is taken for one
        let Reference { registry, repository, tag, digest: None } = parsed else { return None };
        if path.contains([':', '@']) || tag.as_deref() != Some("latest") || registry != host {
            return None;
        }
        let within = match (anything, below) {
            (true, _) => Within::Anything,
            (false, true) => Within::Below(repository.strip_suffix('x')?.to_owned()),
            (false, false) => Within::Repository(repository),
        };
        Some(Self { registry, within })
    }
}

impl Names {
    /// Whether the image is one of these.
    #[must_use]
    pub fn contain(&self, image: &Reference) -> bool {
        let Self::These(names) = self else { return true };
        names.iter().any(|Name { registry, within }| {
            *registry == image.registry
                && match within {
                    Within::Anything => true,
                    Within::Repository(repository) => *repository == image.repository,
                    Within::Below(path) => image.repository.starts_with(path),
                }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Result<Names, String> {
        Names::try_from(Text::Many(list.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn what_is_meant_by_a_name() {
        let names =
            names(&["r.example.org", "localhost:5000/team/*", "docker.io/busybox", "g.io/*"])
                .unwrap();
        let is_one = |image: &str| names.contain(&Reference::parse(image).unwrap());
        for image in [
            "r.example.org/a",
            "r.example.org/a/b:1",
            "g.io/any/thing",
            "localhost:5000/team/app:2",
            "localhost:5000/team/app/more",
            "busybox",
            "docker.io/library/busybox:latest",
        ] {
            assert!(is_one(image), "{image}");
        }
        for image in [
            "r.example.org:443/a",
            "evil.r.example.org/a",
            "localhost:5000/team",
            "localhost:5000/teams/app",
            "localhost/team/app",
            "busybox2",
            "other/busybox",
        ] {
            assert!(!is_one(image), "{image}");
        }
        let any = Reference::parse("any").unwrap();
        assert!(Names::try_from(Text::One("all".into())).unwrap().contain(&any));
        assert!(!Names::default().contain(&any));
    }

    #[test]
    fn what_is_no_name() {
        for name in [
            "",
            "*",
            "team",
            "team/*",
            "a.b/x:tag",
            "a.b/x*",
            "a.b/*/x",
            "https://a.b/x",
            "a.b/",
            "a.b//*",
            "a.b/X",
            "a.b/x@sha256:00",
            "oci://a.b/x",
        ] {
            assert!(names(&[name]).is_err(), "{name}");
        }
        assert!(Names::try_from(Text::One("some".into())).is_err());
    }
}
