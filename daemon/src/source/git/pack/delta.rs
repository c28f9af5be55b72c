//! Applying a delta (gitformat-pack(5), "Deltified representation"), a piece at a time.

use super::blob::{Blob, Target};
use crate::object::Hasher;
use crate::source::git::wrong;
use crate::source::{FetchError, Sink};

/// How much of a spooled blob is read at a time, and the most that is copied at a time.
const PIECE: usize = 64 << 10;

/// Reads a delta's instructions in order.
#[derive(Debug)]
struct Instructions {
    delta: Blob,
    /// Of the next byte that is not in `buffer`.
    next: u64,
    buffer: Vec<u8>,
    at: usize,
}

impl Instructions {
    fn new(delta: Blob) -> Self {
        match delta {
            Blob::Memory(buffer) => {
                Self { next: 0, delta: Blob::Memory(Vec::new()), buffer, at: 0 }
            }
            spooled @ Blob::Spooled { .. } => {
                Self { delta: spooled, next: 0, buffer: Vec::new(), at: 0 }
            }
        }
    }

    /// The bytes that can be had at once: none at the end.
    fn some(&mut self) -> Result<&[u8], FetchError> {
        if self.at >= self.buffer.len() {
            let left = self.delta.len().saturating_sub(self.next);
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE);
            self.buffer.resize(n, 0);
            self.delta.read_at(self.next, &mut self.buffer)?;
            self.next += n as u64;
            self.at = 0;
        }
        Ok(self.buffer.get(self.at..).unwrap_or_default())
    }

    fn byte(&mut self) -> Result<Option<u8>, FetchError> {
        let byte = self.some()?.first().copied();
        self.at += usize::from(byte.is_some());
        Ok(byte)
    }

    fn operand(&mut self) -> Result<u8, FetchError> {
        self.byte()?.ok_or_else(|| wrong("a delta is cut short"))
    }

    fn size(&mut self) -> Result<u64, FetchError> {
        let (mut size, mut shift) = (0, 0);
        loop {
            let byte = self.operand()?;
            let low = u64::from(byte & 0x7f);
            if shift > 63 || low << shift >> shift != low {
                return Err(wrong("a delta's size is out of range"));
            }
            size |= low << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return Ok(size);
            }
        }
    }
}

/// A delta on the way to its object.
#[derive(Debug)]
pub struct Applying {
    instructions: Instructions,
    target: Target,
    /// What is left of an instruction: to copy from the base, or of new bytes.
    copy: Option<(u64, u64)>,
    insert: usize,
}

impl Applying {
    /// Reads the delta's header. `hasher` makes a hasher for an object of the size that it is given.
    pub fn new(
        delta: Blob,
        base: &Blob,
        hasher: impl FnOnce(u64) -> Option<Hasher>,
        within: impl FnOnce(u64) -> Result<(), FetchError>,
        sink: &mut dyn Sink,
    ) -> Result<Self, FetchError> {
        let mut instructions = Instructions::new(delta);
        if instructions.size()? != base.len() {
            return Err(wrong("a delta is for a base of another size"));
        }
        let size = instructions.size()?;
        within(size)?;
        let target = Target::new(size, hasher(size), sink)?;
        Ok(Self { instructions, target, copy: None, insert: 0 })
    }

    /// Writes up to about `budget` bytes. True when the object is complete.
    pub fn step(&mut self, base: &Blob, mut budget: usize) -> Result<bool, FetchError> {
        while budget > 0 {
            let written = if let Some((offset, len)) = self.copy {
                let n = self.copy_piece(base, offset, len)?;
                let left = len - n as u64;
                self.copy = (left > 0).then_some((offset + n as u64, left));
                n
            } else if self.insert > 0 {
                let bytes = self.instructions.some()?;
                let n = bytes.len().min(self.insert);
                if n == 0 {
                    return Err(wrong("a delta is cut short"));
                }
                self.target.write(bytes.get(..n).unwrap_or_default())?;
                self.instructions.at += n;
                self.insert -= n;
                n
            } else {
                match self.instructions.byte()? {
                    None => return Ok(true),
                    Some(0) => return Err(wrong("a delta has the reserved instruction 0")),
                    Some(op) if op & 0x80 == 0 => self.insert = usize::from(op),
                    Some(op) => self.copy = Some(self.copy_operands(op, base)?),
                }
                // so that even instructions that write nothing use the budget up
                1
            };
            budget = budget.saturating_sub(written);
        }
        Ok(false)
    }

    fn copy_operands(&mut self, op: u8, base: &Blob) -> Result<(u64, u64), FetchError> {
        let (mut offset, mut len) = (0u64, 0u64);
        for i in 0..4 {
            if op & 1 << i != 0 {
                offset |= u64::from(self.instructions.operand()?) << (8 * i);
            }
        }
        for i in 0..3 {
            if op & 0x10 << i != 0 {
                len |= u64::from(self.instructions.operand()?) << (8 * i);
            }
        }
        let len = if len == 0 { 0x10000 } else { len };
        if offset + len > base.len() {
            return Err(wrong("a delta copies from outside its base"));
        }
        Ok((offset, len))
    }

    fn copy_piece(&mut self, base: &Blob, offset: u64, len: u64) -> Result<usize, FetchError> {
        let n = usize::try_from(len).unwrap_or(usize::MAX).min(PIECE);
        match base {
            Blob::Memory(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let bytes = bytes.get(from..).and_then(|b| b.get(..n));
                self.target
                    .write(bytes.ok_or_else(|| wrong("a delta copies from outside its base"))?)?;
            }
            Blob::Spooled { .. } => {
                let mut buffer = vec![0; n];
                base.read_at(offset, &mut buffer)?;
                self.target.write(&buffer)?;
            }
        }
        Ok(n)
    }

    /// The object and, if it was hashed, its id.
    pub fn finish(self) -> Result<(Blob, Option<crate::object::ObjectId>), FetchError> {
        self.target.finish()
    }
}
