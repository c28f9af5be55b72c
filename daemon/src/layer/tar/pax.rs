//! Extended headers of POSIX.1-2001: records `<length> <key>=<value>\n`.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::GeneralPurpose;
use base64::engine::general_purpose::{GeneralPurposeConfig, STANDARD};

use super::header::Header;
use super::sparse::Map;
use super::{Fault, Timestamp};

/// What the records of one header say. What is empty is as if it were not there.
#[derive(Debug, Clone, Default)]
pub struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<i64>,
    gid: Option<i64>,
    size: Option<u64>,
    mtime: Option<Timestamp>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// As libarchive writes them as well: their names in percent-encoding, their values in base 64.
    encoded: BTreeMap<Vec<u8>, Vec<u8>>,
    sparse: SparseRecords,
}

#[derive(Debug, Clone, Default)]
struct SparseRecords {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
    /// 0.1: `offset,length,...`.
    map: Option<Vec<u8>>,
    /// 0.0: one record each, in turn.
    numbers: Vec<u64>,
    wrong_turn: bool,
}

/// Where the map of a sparse file is.
#[derive(Debug)]
pub enum Sparse {
    Map(Map),
    InData,
}

impl Pax {
    pub fn parse(mut bytes: &[u8]) -> Result<Self, Fault> {
        let mut pax = Self::default();
        while !bytes.is_empty() {
            // some end with zeros
            if bytes.iter().all(|byte| *byte == 0) {
                break;
            }
            let (Record { key, value }, rest) = record(bytes)?;
            pax.take(key, value)?;
            bytes = rest;
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        let full = !value.is_empty();
        let text = || full.then(|| value.to_vec());
        let number = |what| if full { decimal(value, what).map(Some) } else { Ok(None) };
        let size = |what| Ok(unsigned(number(what)?));
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"uid" => self.uid = number("uid")?,
            b"gid" => self.gid = number("gid")?,
            b"size" => self.size = positive(number("size")?, "size")?,
            b"mtime" => self.mtime = if full { Some(time(value)?) } else { None },
            b"GNU.sparse.name" => self.sparse.name = text(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.size = positive(number("size")?, "size")?;
            }
            b"GNU.sparse.major" => self.sparse.major = size("version")?,
            b"GNU.sparse.minor" => self.sparse.minor = size("version")?,
            b"GNU.sparse.map" => self.sparse.map = text(),
            b"GNU.sparse.offset" => self.sparse.number(0, number("offset")?)?,
            b"GNU.sparse.numbytes" => self.sparse.number(1, number("length")?)?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let name = percent(name).ok_or(Fault::Pax("an attribute's name"))?;
                    let value = base64(value).ok_or(Fault::Pax("an attribute's value"))?;
                    self.encoded.insert(name, value);
                }
            }
        }
        Ok(())
    }

    pub fn sparse_name(&self) -> Option<&[u8]> {
        self.sparse.name.as_deref()
    }

    /// Changes what an entry's own header says; tells if the file is sparse.
    pub fn apply(&self, header: &mut Header) -> Result<Option<Sparse>, Fault> {
        if let Some(path) = &self.path {
            header.path.clone_from(path);
        }
        if let Some(link) = &self.link {
            header.link.clone_from(link);
        }
        header.size = self.size.unwrap_or(header.size);
        self.apply_globals(header);
        let mut xattrs = self.encoded.clone();
        xattrs.extend(self.xattrs.iter().map(|(name, value)| (name.clone(), value.clone())));
        header.xattrs = xattrs.into_iter().collect();
        header.real_size = self.sparse.size;
        match (self.sparse.major, self.sparse.minor) {
            (Some(1), Some(0)) => Ok(Some(Sparse::InData)),
            (None, None) | (Some(0), Some(0 | 1)) => self.sparse.map(header.size),
            _ => Err(Fault::Sparse("it is of an unknown version")),
        }
    }

    /// The part of [`apply`](Self::apply) that a global header has.
    pub fn apply_globals(&self, header: &mut Header) {
        header.uid = self.uid.unwrap_or(header.uid);
        header.gid = self.gid.unwrap_or(header.gid);
        header.mtime = self.mtime.unwrap_or(header.mtime);
    }

    /// Takes over what another global header says.
    pub fn merge_globals(&mut self, newer: &Self) {
        self.uid = newer.uid.or(self.uid);
        self.gid = newer.gid.or(self.gid);
        self.mtime = newer.mtime.or(self.mtime);
    }
}

impl SparseRecords {
    fn number(&mut self, turn: usize, number: Option<i64>) -> Result<(), Fault> {
        let number = unsigned(number).ok_or(Fault::Sparse("a number is missing"))?;
        self.wrong_turn |= self.numbers.len() % 2 != turn;
        self.numbers.push(number);
        Ok(())
    }

    fn map(&self, stored: u64) -> Result<Option<Sparse>, Fault> {
        let from_text;
        let numbers = match &self.map {
            Some(text) => {
                let number = |text: &[u8]| {
                    let number = decimal(text, "size").ok().and_then(|n| u64::try_from(n).ok());
                    number.ok_or(Fault::Sparse("there is something else among its numbers"))
                };
                from_text =
                    text.split(|byte| *byte == b',').map(number).collect::<Result<Vec<_>, _>>()?;
                &from_text
            }
            None => &self.numbers,
        };
        if numbers.is_empty() {
            // `realsize` alone says nothing
            return Ok(None);
        }
        if self.wrong_turn || numbers.len() % 2 != 0 {
            return Err(Fault::Sparse("offsets and lengths are not in turn"));
        }
        let pairs = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1]));
        Map::new(self.size.unwrap_or(stored), pairs).map(|map| Some(Sparse::Map(map)))
    }
}

fn unsigned(number: Option<i64>) -> Option<u64> {
    number.and_then(|number| u64::try_from(number).ok())
}

fn positive(number: Option<i64>, what: &'static str) -> Result<Option<u64>, Fault> {
    number.map(|n| u64::try_from(n).map_err(|_| Fault::Number(what))).transpose()
}

struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
}

/// The first record and what follows it.
fn record(bytes: &[u8]) -> Result<(Record<'_>, &[u8]), Fault> {
    let wrong = |what| Err(Fault::Pax(what));
    let space = bytes.iter().take(20).position(|byte| *byte == b' ');
    let Some(space) = space else { return wrong("a record's length is missing") };
    let len = decimal(&bytes[..space], "length").ok().and_then(|len| usize::try_from(len).ok());
    let Some(len) = len.filter(|len| (space + 3..=bytes.len()).contains(len)) else {
        return wrong("a record's length is wrong");
    };
    let (whole, rest) = bytes.split_at(len);
    let Some((b'\n', body)) = whole[space + 1..].split_last() else {
        return wrong("a record does not end with a line");
    };
    let Some(equals) = body.iter().position(|byte| *byte == b'=').filter(|at| *at > 0) else {
        return wrong("a record has no key");
    };
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let is_text = matches!(key, b"path" | b"linkpath" | b"GNU.sparse.name");
    if key.contains(&0) || is_text && value.contains(&0) {
        return wrong("a name has a NUL in it");
    }
    Ok((Record { key, value }, rest))
}

/// Decimal digits, perhaps with a minus.
pub fn decimal(text: &[u8], what: &'static str) -> Result<i64, Fault> {
    let wrong = || Fault::Number(what);
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    if digits.is_empty() {
        return Err(wrong());
    }
    let value = digits.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    });
    value.map(|value| if negative { -value } else { value }).ok_or_else(wrong)
}

/// Seconds since the epoch with decimals; what is less than a nanosecond is cut off.
fn time(text: &[u8]) -> Result<Timestamp, Fault> {
    let dot = text.iter().position(|byte| *byte == b'.').unwrap_or(text.len());
    let secs = decimal(&text[..dot], "time")?;
    let decimals = text.get(dot + 1..).unwrap_or_default();
    if !decimals.iter().all(u8::is_ascii_digit) {
        return Err(Fault::Number("time"));
    }
    let digit = |n| decimals.get(n).map_or(0, |digit| u32::from(digit - b'0'));
    let nanos = (0..9).fold(0, |nanos, n| nanos * 10 + digit(n));
    if text.starts_with(b"-") && nanos > 0 {
        let secs = secs.checked_sub(1).ok_or(Fault::Number("time"))?;
        return Ok(Timestamp { secs, nanos: 1_000_000_000 - nanos });
    }
    Ok(Timestamp { secs, nanos })
}

fn percent(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, behind) = rest.split_at_checked(2)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        bytes.push((digit(digits[0])? << 4 | digit(digits[1])?) as u8);
        rest = behind;
    }
    Some(bytes)
}

/// With or without `=` at its end.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent);
    let engine = GeneralPurpose::new(&base64::alphabet::STANDARD, config);
    engine.decode(text).or_else(|_| STANDARD.decode(text)).ok()
}
