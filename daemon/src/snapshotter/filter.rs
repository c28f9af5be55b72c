//! containerd's filters (its package `filters`): `name==a,labels."x/y"==b,labels.z`.
//!
//! A comma is "and"; of several filters, one is enough. Regular expressions (`~=`) are refused.

use std::collections::HashMap;

use super::Error;
use super::messages::{Info, Kind};

/// One filter: all of it has to be true.
#[derive(Debug, PartialEq, Eq)]
pub struct Filter(Vec<Selector>);

#[derive(Debug, PartialEq, Eq)]
struct Selector {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
}

impl Filter {
    /// Reads a filter. An empty one is true of everything.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut rest = Rest { text, all: text };
        let mut selectors = Vec::new();
        if text.is_empty() {
            return Ok(Self(selectors));
        }
        loop {
            selectors.push(rest.selector()?);
            if rest.text.is_empty() {
                return Ok(Self(selectors));
            }
            rest.expect(",")?;
        }
    }

    #[must_use]
    pub fn matches(&self, info: &Info) -> bool {
        self.0.iter().all(|selector| selector.matches(info))
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = value(info, &self.field);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
        }
    }
}

/// What a snapshot has in a field; `None` where that is nothing.
fn value<'a>(info: &'a Info, field: &[String]) -> Option<&'a str> {
    let (first, rest) = field.split_first()?;
    match (first.as_str(), rest) {
        ("name", []) => Some(&info.name),
        ("parent", []) => Some(&info.parent),
        ("kind", []) => Some(kind_name(info.kind())),
        ("labels", [_, ..]) => label(&info.labels, rest),
        _ => None,
    }
}

/// A label's name may have dots in it, and need not be quoted.
fn label<'a>(labels: &'a HashMap<String, String>, path: &[String]) -> Option<&'a str> {
    labels.get(&path.join(".")).map(String::as_str)
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Unknown => "unknown",
        Kind::View => "view",
        Kind::Active => "active",
        Kind::Committed => "committed",
    }
}

/// What of a filter is not read yet.
struct Rest<'a> {
    text: &'a str,
    all: &'a str,
}

impl Rest<'_> {
    fn wrong(&self, what: &str) -> Error {
        Error::Invalid(format!("the filter {:?}: {what} at {:?}", self.all, self.text))
    }

    fn takes(&mut self, what: &str) -> bool {
        match self.text.strip_prefix(what) {
            Some(rest) => {
                self.text = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, what: &str) -> Result<(), Error> {
        if self.takes(what) { Ok(()) } else { Err(self.wrong(&format!("no {what:?}"))) }
    }

    fn selector(&mut self) -> Result<Selector, Error> {
        let mut field = vec![self.word(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')?];
        while self.takes(".") {
            field.push(self.word(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')?);
        }
        let value = |rest: &mut Self| rest.word(|c| c != ',' && !c.is_whitespace());
        let test = if self.takes("==") {
            Test::Equal(value(self)?)
        } else if self.takes("!=") {
            Test::NotEqual(value(self)?)
        } else if self.takes("~=") {
            return Err(self.wrong("regular expressions are not supported"));
        } else {
            Test::Present
        };
        Ok(Selector { field, test })
    }

    /// A word of such characters, or a quoted one.
    fn word(&mut self, of: impl Fn(char) -> bool) -> Result<String, Error> {
        if self.takes("\"") {
            return self.quoted();
        }
        let end = self.text.find(|c| !of(c)).unwrap_or(self.text.len());
        let (word, rest) = self.text.split_at(end);
        if word.is_empty() {
            return Err(self.wrong("nothing"));
        }
        self.text = rest;
        Ok(word.to_owned())
    }

    /// As in Go; of its escapes only those for quotes and backslashes.
    fn quoted(&mut self) -> Result<String, Error> {
        let mut word = String::new();
        let mut characters = self.text.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.text = self.text.get(at + 1..).unwrap_or_default();
                    return Ok(word);
                }
                '\\' => match characters.next() {
                    Some((_, c @ ('"' | '\\'))) => word.push(c),
                    _ => return Err(self.wrong("an escape that is not known")),
                },
                c => word.push(c),
            }
        }
        Err(self.wrong("no end of a quotation"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> Info {
        let labels = [("l", "1"), ("containerd.io/snapshot.ref", "sha256:ab"), ("a b", "c,\"d")];
        Info {
            name: "ns/1/x".into(),
            kind: Kind::Active.into(),
            labels: labels.map(|(k, v)| (k.into(), v.into())).into(),
            ..Info::default()
        }
    }

    #[test]
    fn what_matches() {
        for (filter, expected) in [
            ("", true),
            ("name==ns/1/x", true),
            ("name==ns/1", false),
            ("name!=ns/1,kind==active", true),
            ("kind==view", false),
            ("parent", true),
            ("parent!=\"\"", false),
            ("parent==\"\"", true),
            ("labels.l", true),
            ("labels.l==1,labels.\"containerd.io/snapshot.ref\"==sha256:ab", true),
            ("labels.l==1,labels.\"containerd.io/snapshot.ref\"==\"sha256:a\"", false),
            ("labels.m", false),
            ("labels.\"a b\"==\"c,\\\"d\"", true),
            ("nothing", false),
            ("nothing!=1", true),
        ] {
            assert_eq!(Filter::parse(filter).unwrap().matches(&info()), expected, "{filter}");
        }
    }

    #[test]
    fn what_is_no_filter() {
        for filter in [",", "name==", "name=a", "name~=a", "name==a,", "\"name", "a b", "\"\\x\""] {
            assert!(matches!(Filter::parse(filter), Err(Error::Invalid(_))), "{filter}");
        }
    }
}
