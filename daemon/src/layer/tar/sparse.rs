//! The maps of sparse files.

use super::header::{BLOCK, number};
use super::pax::decimal;
use super::{Data, Fault, MAX_PIECES, Piece};

/// Which parts of a file have data.
#[derive(Debug, Default)]
pub struct Map {
    /// The file's size in bytes, as far as it is known.
    pub size: u64,
    /// Offset and length of each.
    parts: Vec<(u64, u64)>,
}

impl Map {
    pub fn new(size: u64, parts: impl Iterator<Item = (u64, u64)>) -> Result<Self, Fault> {
        let mut map = Self { size, parts: Vec::new() };
        for (offset, len) in parts {
            map.push(offset, len)?;
        }
        Ok(map)
    }

    fn push(&mut self, offset: u64, len: u64) -> Result<(), Fault> {
        if self.parts.len() >= MAX_PIECES {
            return Err(Fault::Sparse("it has too many parts"));
        }
        self.parts.push((offset, len));
        Ok(())
    }

    /// From a header of GNU's old format, and whether there is more of it.
    pub fn old(block: &[u8], is_gnu: bool) -> Result<(Self, bool), Fault> {
        if !is_gnu || block.len() < BLOCK {
            return Err(Fault::Sparse("the header is not GNU's"));
        }
        let mut map = Self { size: length(&block[483..495])?, parts: Vec::new() };
        map.old_parts(&block[386..482])?;
        Ok((map, block[482] != 0))
    }

    /// A further block of GNU's old format; whether there is more of it.
    pub fn old_extension(&mut self, block: &[u8]) -> Result<bool, Fault> {
        if block.len() < BLOCK {
            return Err(Fault::Sparse("it is cut short"));
        }
        self.old_parts(&block[..504])?;
        Ok(block[504] != 0)
    }

    fn old_parts(&mut self, fields: &[u8]) -> Result<(), Fault> {
        for part in fields.chunks_exact(24) {
            if part[0] == 0 || part[12] == 0 {
                break;
            }
            self.push(length(&part[..12])?, length(&part[12..])?)?;
        }
        Ok(())
    }

    /// How many lines the map at the start of a file's data has, once its first line is there.
    pub fn lines(bytes: &[u8]) -> Result<Option<usize>, Fault> {
        match bytes.iter().take(20).position(|byte| *byte == b'\n') {
            Some(end) => {
                let count = decimal(&bytes[..end], "size").ok();
                let count = count.and_then(|count| usize::try_from(count).ok());
                let count = count.filter(|count| *count <= MAX_PIECES);
                Ok(Some(1 + 2 * count.ok_or(Fault::Sparse("it has too many parts"))?))
            }
            None if bytes.len() < 20 => Ok(None),
            None => Err(Fault::Sparse("its first line is no number")),
        }
    }

    /// From the start of a file's data (PAX 1.0): decimal numbers, one a line: how many parts, then the
    /// offset and the length of each. The size is elsewhere.
    pub fn from_data(bytes: &[u8]) -> Result<Self, Fault> {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let mut next = || {
            let number = decimal(lines.next().unwrap_or_default(), "size").ok();
            let number = number.and_then(|number| u64::try_from(number).ok());
            number.ok_or(Fault::Sparse("a line of it is no number"))
        };
        let mut map = Self::default();
        for _ in 0..next()? {
            map.push(next()?, next()?)?;
        }
        Ok(map)
    }

    /// The pieces of a file of `size` bytes whose data, `stored` bytes, starts at `at` in the archive.
    pub fn into_data(self, size: u64, at: u64, stored: u64) -> Result<Data, Fault> {
        let (mut end, mut taken) = (0u64, 0u64);
        let mut pieces = Vec::with_capacity(self.parts.len());
        for (offset, len) in self.parts {
            let part_end = offset.checked_add(len).filter(|end| *end <= size);
            let part_end = part_end.ok_or(Fault::Sparse("a part is behind the file's end"))?;
            if offset < end {
                return Err(Fault::Sparse("its parts overlap"));
            }
            let from = at.checked_add(taken).ok_or(Fault::Number("size"))?;
            end = part_end;
            taken = taken.checked_add(len).ok_or(Fault::Number("size"))?;
            if len > 0 {
                pieces.push(Piece { offset, at: from, len });
            }
        }
        if taken != stored {
            return Err(Fault::Sparse("its parts are not the data"));
        }
        Ok(Data { size, pieces })
    }
}

fn length(field: &[u8]) -> Result<u64, Fault> {
    let length = number(field, "size")?;
    u64::try_from(length).map_err(|_| Fault::Number("size"))
}
