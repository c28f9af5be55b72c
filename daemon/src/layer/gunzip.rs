//! Gzip (RFC 1952): members one behind the other, entered at the start of one or in its midst.

use crc32fast::Hasher as Crc32;

use crate::sys::inflate::{At as InflateAt, Inflate};

/// A decompressor.
#[derive(Debug)]
pub struct Gunzip {
    inflate: Inflate,
    state: State,
    /// Of what has come out of the member; none where it was entered in its midst.
    crc: Option<Crc32>,
    len: u32,
    /// In [`State::Within`]: bits, window.
    members: u64,
}

#[derive(Debug)]
enum State {
    /// The window and the number of bits left, until the byte that has them comes.
    Within {
        bits: u8,
        window: Vec<u8>,
    },
    Header(Header),
    Body,
    Trailer {
        bytes: [u8; 8],
        have: usize,
    },
    /// Zeros behind the last member, as tapes have them.
    Padding,
}

/// Where in a member's header.
#[derive(Debug, Clone, Copy)]
enum Header {
    Fixed { have: u8, flags: u8 },
    ExtraLen { low: Option<u8>, flags: u8 },
    Extra { left: u16, flags: u8 },
    Name { flags: u8 },
    Comment { flags: u8 },
    Crc { left: u8 },
}

const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;

/// What a step has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub consumed: usize,
    pub produced: usize,
    pub at: At,
}

/// Where a step has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Midst,
    /// Between two deflate blocks of one member.
    Block {
        bits: u8,
    },
    /// Behind a member.
    Member,
}

impl Gunzip {
    /// At the start of a member.
    pub fn new() -> Result<Self, &'static str> {
        Self::at(State::Header(Header::START), Some(Crc32::new()))
    }

    /// Between two deflate blocks of a member, where `bits` bits of the first byte belong to the next.
    pub fn within(bits: u8, window: &[u8]) -> Result<Self, &'static str> {
        Self::at(State::Within { bits, window: window.to_vec() }, None)
    }

    fn at(state: State, crc: Option<Crc32>) -> Result<Self, &'static str> {
        let inflate = Inflate::new().map_err(|_| "there is no memory")?;
        Ok(Self { inflate, state, crc, len: 0, members: 0 })
    }

    /// Is it between members, with at least one behind it?
    #[must_use]
    pub fn is_at_end(&self) -> bool {
        let start = matches!(self.state, State::Header(Header::Fixed { have: 0, .. }));
        self.members > 0 && (start || matches!(self.state, State::Padding))
    }

    /// Decodes until input or output or a block or a member ends. Nothing consumed and nothing produced: it needs
    /// more of one of them.
    pub fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, &'static str> {
        let mut step = Step { consumed: 0, produced: 0, at: At::Midst };
        loop {
            let rest = &input[step.consumed..];
            match &mut self.state {
                State::Within { bits, window } => {
                    let byte = match (*bits, rest.first()) {
                        (0, _) => 0,
                        (_, Some(byte)) => *byte,
                        (_, None) => return Ok(step),
                    };
                    step.consumed += usize::from(*bits > 0);
                    let entered = self.inflate.enter(*bits, byte, window);
                    entered.map_err(|_| "its window can't be used")?;
                    self.state = State::Body;
                }
                State::Header(header) => {
                    let Some(byte) = rest.first() else { return Ok(step) };
                    let begins = matches!(header, Header::Fixed { have: 0, .. });
                    step.consumed += 1;
                    if begins && self.members > 0 && *byte == 0 {
                        self.state = State::Padding;
                    } else if let Some(next) = header.next(*byte)? {
                        *header = next;
                    } else {
                        self.inflate.reset().map_err(|_| "there is no memory")?;
                        (self.crc, self.len) = (Some(Crc32::new()), 0);
                        self.state = State::Body;
                    }
                }
                State::Body => {
                    let inflated = self.inflate.step(rest, &mut output[step.produced..]);
                    let inflated = inflated.map_err(|_| "it is not what gzip makes")?;
                    let produced = &output[step.produced..step.produced + inflated.produced];
                    if let Some(crc) = &mut self.crc {
                        crc.update(produced);
                    }
                    // the trailer has the length modulo 2^32
                    self.len = self.len.wrapping_add(produced.len() as u32);
                    step.consumed += inflated.consumed;
                    step.produced += inflated.produced;
                    match inflated.at {
                        InflateAt::End => self.state = State::Trailer { bytes: [0; 8], have: 0 },
                        InflateAt::BlockEnd { bits } => {
                            return Ok(Step { at: At::Block { bits }, ..step });
                        }
                        InflateAt::Midst if inflated.consumed + inflated.produced == 0 => {
                            return Ok(step);
                        }
                        InflateAt::Midst => {}
                    }
                }
                State::Trailer { bytes, have } => {
                    let take = rest.len().min(8 - *have);
                    bytes[*have..*have + take].copy_from_slice(&rest[..take]);
                    *have += take;
                    step.consumed += take;
                    if *have < 8 {
                        return Ok(step);
                    }
                    let [a, b, c, d, e, f, g, h] = *bytes;
                    let said = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
                    if let Some(crc) = self.crc.take()
                        && (crc.finalize(), self.len) != said
                    {
                        return Err("its checksum is wrong");
                    }
                    self.members += 1;
                    self.state = State::Header(Header::START);
                    return Ok(Step { at: At::Member, ..step });
                }
                State::Padding => {
                    if rest.iter().any(|byte| *byte != 0) {
                        return Err("there is something else behind its end");
                    }
                    step.consumed += rest.len();
                    return Ok(step);
                }
            }
        }
    }
}

impl Header {
    const START: Self = Self::Fixed { have: 0, flags: 0 };

    /// What comes after a byte; `None` once the header is done.
    fn next(self, byte: u8) -> Result<Option<Self>, &'static str> {
        match self {
            Self::Fixed { have, flags } => {
                let expected = [Some(0x1f), Some(0x8b), Some(8)];
                match expected.get(usize::from(have)).copied().flatten() {
                    Some(expected) if expected != byte => return Err("a gzip header is missing"),
                    _ => {}
                }
                let flags = if have == 3 { byte } else { flags };
                if flags & 0xe0 != 0 {
                    return Err("its gzip header has flags that nobody knows");
                }
                if have < 9 {
                    return Ok(Some(Self::Fixed { have: have + 1, flags }));
                }
                Ok(if flags & FEXTRA != 0 {
                    Some(Self::ExtraLen { low: None, flags })
                } else {
                    Self::behind_extra(flags)
                })
            }
            Self::ExtraLen { low: None, flags } => {
                Ok(Some(Self::ExtraLen { low: Some(byte), flags }))
            }
            Self::ExtraLen { low: Some(low), flags } => Ok(match u16::from_le_bytes([low, byte]) {
                0 => Self::behind_extra(flags),
                left => Some(Self::Extra { left, flags }),
            }),
            Self::Extra { left: 1, flags } => Ok(Self::behind_extra(flags)),
            Self::Extra { left, flags } => Ok(Some(Self::Extra { left: left - 1, flags })),
            Self::Name { flags } if byte == 0 => Ok(Self::behind_name(flags)),
            Self::Comment { flags } if byte == 0 => Ok(Self::behind_comment(flags)),
            Self::Crc { left: 1 } => Ok(None),
            Self::Crc { left } => Ok(Some(Self::Crc { left: left - 1 })),
            Self::Name { .. } | Self::Comment { .. } => Ok(Some(self)),
        }
    }

    fn behind_extra(flags: u8) -> Option<Self> {
        if flags & FNAME != 0 { Some(Self::Name { flags }) } else { Self::behind_name(flags) }
    }

    fn behind_name(flags: u8) -> Option<Self> {
        if flags & FCOMMENT != 0 {
            Some(Self::Comment { flags })
        } else {
            Self::behind_comment(flags)
        }
    }

    fn behind_comment(flags: u8) -> Option<Self> {
        (flags & FHCRC != 0).then_some(Self::Crc { left: 2 })
    }
}
