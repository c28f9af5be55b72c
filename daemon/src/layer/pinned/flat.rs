//! FlatBuffers, as far as a zTOC needs them: tables, strings and vectors, each access within the bytes.
//!
//! A table begins with the distance back to its *vtable* (4 bytes, signed), which has its own length (2), the table's (2), and
//! for each field where in the table it is (2; 0: it is not there). Strings, vectors and tables are referred to by the
//! distance forward (4).

/// A table.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The vtable's entries.
    fields: &'a [u8],
}

/// Elements one behind the other.
#[derive(Debug, Clone, Copy)]
pub struct Vector<'a> {
    bytes: &'a [u8],
    at: usize,
    pub len: usize,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn forward(bytes: &[u8], at: usize) -> Option<usize> {
    at.checked_add(u32::from_le_bytes(array(bytes, at)?) as usize)
}

impl<'a> Table<'a> {
    /// The table that a buffer begins with.
    pub fn root(bytes: &'a [u8]) -> Option<Self> {
        Self::at(bytes, forward(bytes, 0)?)
    }

    fn at(bytes: &'a [u8], at: usize) -> Option<Self> {
        let back = i32::from_le_bytes(array(bytes, at)?);
        let vtable = usize::try_from(i64::try_from(at).ok()? - i64::from(back)).ok()?;
        let len = usize::from(u16::from_le_bytes(array(bytes, vtable)?));
        let fields = bytes.get(vtable.checked_add(4)?..vtable.checked_add(len)?)?;
        Some(Self { bytes, at, fields })
    }

    /// Where a field is; `None` if it has its default.
    fn field(&self, number: usize) -> Option<usize> {
        let offset = u16::from_le_bytes(array(self.fields, number * 2)?);
        (offset > 0).then(|| self.at.checked_add(usize::from(offset)))?
    }

    /// A number; 0 is the default of all of them, and of what is outside.
    pub fn long(&self, number: usize) -> i64 {
        self.field(number).and_then(|at| array(self.bytes, at)).map_or(0, i64::from_le_bytes)
    }

    pub fn int(&self, number: usize) -> u32 {
        self.field(number).and_then(|at| array(self.bytes, at)).map_or(0, u32::from_le_bytes)
    }

    pub fn byte(&self, number: usize) -> Option<u8> {
        self.field(number).and_then(|at| self.bytes.get(at).copied())
    }

    pub fn table(&self, number: usize) -> Option<Self> {
        Self::at(self.bytes, forward(self.bytes, self.field(number)?)?)
    }

    /// A vector of elements that are references.
    pub fn vector(&self, number: usize) -> Option<Vector<'a>> {
        let at = forward(self.bytes, self.field(number)?)?;
        let len = u32::from_le_bytes(array(self.bytes, at)?) as usize;
        let at = at + 4;
        self.bytes.get(at..at.checked_add(len.checked_mul(4)?)?)?;
        Some(Vector { bytes: self.bytes, at, len })
    }

    /// A string, or a vector of bytes.
    pub fn bytes(&self, number: usize) -> Option<&'a [u8]> {
        string(self.bytes, forward(self.bytes, self.field(number)?)?)
    }
}

fn string(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let len = u32::from_le_bytes(array(bytes, at)?) as usize;
    bytes.get(at.checked_add(4)?..at.checked_add(4)?.checked_add(len)?)
}

impl<'a> Vector<'a> {
    pub fn table(&self, number: usize) -> Option<Table<'a>> {
        Table::at(self.bytes, forward(self.bytes, self.at + number * 4)?)
    }

    pub fn string(&self, number: usize) -> Option<&'a [u8]> {
        string(self.bytes, forward(self.bytes, self.at + number * 4)?)
    }
}
