//! Which files git writes by rules of its own (gitattributes(5)), and so not as their blobs are.
//!
//! Only what happens on the way *out* of the repository counts here. On this system lines end in LF
//! unless the configuration says otherwise, so that `text`, `text=auto` and `eol=lf`, which most
//! repositories have, change nothing.

use std::collections::HashSet;
use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};

/// The attributes to ask `git check-attr` for.
pub const ATTRIBUTES: [&str; 6] =
    ["text", "crlf", "eol", "ident", "filter", "working-tree-encoding"];

/// What git's configuration says of conversions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// `core.autocrlf` is `true`: by itself it converts any file that looks like text.
    pub autocrlf: bool,
    /// `core.autocrlf` is `input`.
    pub autocrlf_input: bool,
    /// `core.eol` is `crlf`.
    pub eol_crlf: bool,
    /// There are attributes besides the tree's own: the user's or the system's.
    pub other_files: bool,
    /// The names of filters that have a `smudge` or `process` command.
    pub filters: HashSet<Vec<u8>>,
}

impl Config {
    /// Do lines of text end in CR LF where nothing else is said (`text_eol_is_crlf` in convert.c)?
    fn text_is_crlf(&self) -> bool {
        self.autocrlf || self.eol_crlf && !self.autocrlf_input
    }
}

/// Can any file be converted? If not, `git check-attr` need not be run. `files` are the contents of
/// the tree's attribute files.
pub fn needs_attributes<'a>(files: impl IntoIterator<Item = &'a [u8]>, config: &Config) -> bool {
    if config.autocrlf || config.other_files {
        return true;
    }
    // Parts of a pattern are looked at too: at worst check-attr is run for nothing.
    let mut tokens = files.into_iter().flat_map(|file| file.split(u8::is_ascii_whitespace));
    tokens.any(|token| {
        let (name, value) = match token.iter().position(|b| *b == b'=') {
            Some(at) => (&token[..at], Some(&token[at + 1..])),
            None => (token, None),
        };
        match name {
            b"ident" | b"working-tree-encoding" => true,
            b"filter" => value.is_some_and(|value| config.filters.contains(value)),
            b"eol" => value == Some(b"crlf"),
            b"text" | b"crlf" => config.text_is_crlf(),
            _ => false,
        }
    })
}

/// The paths that git converts, from what `git check-attr -z` says of [`ATTRIBUTES`]: path,
/// attribute and value, each with a NUL behind it, all attributes of a path together.
pub fn converted(mut input: impl BufRead, config: &Config) -> io::Result<HashSet<Vec<u8>>> {
    let mut paths = HashSet::new();
    let mut values = Values::default();
    let mut current = Vec::new();
    let mut field = || {
        let mut field = Vec::new();
        input.read_until(0, &mut field)?;
        match field.pop() {
            None => Ok(None),
            Some(0) => Ok(Some(field)),
            Some(_) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        }
    };
    while let Some(path) = field()? {
        let (Some(attribute), Some(value)) = (field()?, field()?) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        if path != current {
            if values.convert(config) {
                paths.insert(current);
            }
            values = Values::default();
            current = path;
        }
        values.set(&attribute, value);
    }
    if values.convert(config) {
        paths.insert(current);
    }
    Ok(paths)
}

/// A path's attributes; `unspecified` is `None`.
#[derive(Debug, Default)]
struct Values {
    text: Option<Vec<u8>>,
    crlf: Option<Vec<u8>>,
    eol: Option<Vec<u8>>,
    ident: bool,
    filter: Option<Vec<u8>>,
    encoding: Option<Vec<u8>>,
}

impl Values {
    fn set(&mut self, attribute: &[u8], value: Vec<u8>) {
        let value = Some(value).filter(|value| value != b"unspecified");
        match attribute {
            b"text" => self.text = value,
            b"crlf" => self.crlf = value,
            b"eol" => self.eol = value,
            b"ident" => self.ident = value.as_deref() == Some(b"set"),
            b"filter" => self.filter = value,
            b"working-tree-encoding" => self.encoding = value,
            _ => {}
        }
    }

    /// As `convert_attrs` and `convert_to_working_tree` in git's convert.c. Where git looks at the
    /// content before it decides, this says yes.
    fn convert(&self, config: &Config) -> bool {
        let filtered = self.filter.as_ref().is_some_and(|name| config.filters.contains(name));
        let encoded = self.encoding.as_deref().is_some_and(|name| {
            name != b"set" && name != b"unset" && !name.eq_ignore_ascii_case(b"utf-8")
        });
        self.ident || filtered || encoded || self.gets_crlf(config)
    }

    fn gets_crlf(&self, config: &Config) -> bool {
        let text = match self.text.as_deref() {
            known @ Some(b"set" | b"unset" | b"input" | b"auto") => known,
            _ => self.crlf.as_deref(),
        };
        let text = match text {
            Some(b"unset") => return false,
            known @ Some(b"set" | b"input" | b"auto") => known,
            _ => None,
        };
        match self.eol.as_deref() {
            Some(b"lf") => return false,
            Some(b"crlf") => return true,
            _ => {}
        }
        match text {
            None => config.autocrlf,
            Some(b"input") => false,
            Some(_) => config.text_is_crlf(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_repositories_need_no_attributes() {
        let none = Config::default();
        let crlf = Config { eol_crlf: true, ..Config::default() };
        let input = Config { autocrlf_input: true, eol_crlf: true, ..Config::default() };
        let auto = Config { autocrlf: true, ..Config::default() };
        let lfs = Config { filters: HashSet::from([b"lfs".to_vec()]), ..Config::default() };
        let plain = &b"* text=auto\n*.c diff=cpp text\n*.sh eol=lf\n*.png -text\n"[..];
        for (file, config, need) in [
            (plain, &none, false),
            (plain, &crlf, true),
            (plain, &input, false),
            (b"", &auto, true),
            (b"", &crlf, false),
            (b"*.bat eol=crlf\r\n", &none, true),
            (b"*.h ident\n", &none, true),
            (b"*.h -ident !filter\n", &lfs, false),
            (b"*.psd filter=lfs diff=lfs\n", &none, false),
            (b"*.psd filter=lfs diff=lfs\n", &lfs, true),
            (b"[attr]odd\tworking-tree-encoding=UTF-16\n", &none, true),
        ] {
            let shown = String::from_utf8_lossy(file);
            assert_eq!(needs_attributes([&b"# none\n"[..], file], config), need, "{shown}");
        }
    }

    #[test]
    fn a_cut_answer_is_an_error() {
        assert!(converted(&b"a\0text\0se"[..], &Config::default()).is_err());
        assert!(converted(&b"a\0text\0"[..], &Config::default()).is_err());
    }
}
