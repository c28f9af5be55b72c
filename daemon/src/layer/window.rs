//! What a span in the midst of a gzip member needs of the 32 KiB before it.
//!
//! Deflate refers to what came out before (RFC 1951, section 2), and mostly to little of that. An index keeps windows, and
//! they are most of it: so the bytes that nothing refers to are zeros there, which hardly take room.

use super::gunzip::{At, Gunzip};
use crate::sys::inflate::WINDOW;

/// A span without references has not got so many compressed bytes for a window's length, unless somebody wants to be funny.
const MOST: usize = 4 * WINDOW;

/// The window of a span whose beginning is still to come.
#[derive(Debug)]
pub(super) struct Window {
    bits: u8,
    bytes: Vec<u8>,
    /// From the byte on that the first `bits` bits of the span are in.
    compressed: Vec<u8>,
    produced: u64,
}

impl Window {
    /// Of a span that begins with the last `bits` bits of the byte `last`. `bytes` came out before it.
    pub fn new(bits: u8, last: u8, bytes: &[u8]) -> Self {
        let compressed = if bits > 0 { vec![last] } else { Vec::new() };
        Self { bits, bytes: bytes.to_vec(), compressed, produced: 0 }
    }

    /// These compressed bytes come next, and make `produced` bytes.
    pub fn push(&mut self, compressed: &[u8], produced: usize) {
        let room = MOST.saturating_sub(self.compressed.len());
        self.compressed.extend_from_slice(&compressed[..compressed.len().min(room)]);
        self.produced += produced as u64;
    }

    /// What comes can't refer to the window any more.
    pub fn is_ready(&self) -> bool {
        self.produced >= WINDOW as u64
    }

    /// The window, with zeros for what nothing refers to. All that came of the span has been [pushed](Self::push), or as much
    /// as makes it [ready](Self::is_ready).
    pub fn finish(self) -> Vec<u8> {
        match self.references() {
            Some(referred) => {
                self.bytes.iter().zip(referred).map(|(byte, is)| byte * u8::from(is)).collect()
            }
            None => self.bytes,
        }
    }

    /// Which bytes are referred to. All that comes out is a byte of the span's own or one of the window's, unchanged. So the
    /// span is decoded with two windows that have numbers in place of bytes: what is not the same with both is of the window, and
    /// says which byte that is. `None`: it can't be told.
    fn references(&self) -> Option<Vec<bool>> {
        // a pair for each number below 2^15, and never two of the same
        let pair = |number: u16| {
            let [low, high] = number.to_le_bytes();
            (low, low.wrapping_add(high).wrapping_add(1))
        };
        let pairs = (0..u16::try_from(self.bytes.len()).ok()?).map(pair);
        let (first, second): (Vec<_>, Vec<_>) = pairs.unzip();
        let (first, second) = (self.decode(&first)?, self.decode(&second)?);
        let mut referred = vec![false; self.bytes.len()];
        for (low, other) in first.into_iter().zip(second).filter(|(low, other)| low != other) {
            let high = other.wrapping_sub(low).wrapping_sub(1);
            *referred.get_mut(usize::from(u16::from_le_bytes([low, high])))? = true;
        }
        Some(referred)
    }

    /// What comes out with this window, as long as it may refer to that. `None`: not all that is needed for that was kept.
    fn decode(&self, window: &[u8]) -> Option<Vec<u8>> {
        let mut gunzip = Gunzip::within(self.bits, window).ok()?;
        let (mut output, mut input) = (vec![0; WINDOW], &self.compressed[..]);
        let mut produced = 0;
        loop {
            let step = gunzip.step(input, &mut output[produced..]).ok()?;
            produced += step.produced;
            input = &input[step.consumed..];
            let stands = step.consumed == 0 && step.produced == 0;
            if produced == WINDOW || step.at == At::Member || (stands && step.at == At::Midst) {
                break;
            }
        }
        let is_cut_off = self.compressed.len() >= MOST && produced < WINDOW && input.is_empty();
        output.truncate(produced);
        (!is_cut_off).then_some(output)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::layer::indexer::Indexer;
    use crate::layer::tests::{index_by, noise};

    /// Text in which much is repeated from anywhere in the last 64 KiB.
    fn repeating(len: usize, seed: u64) -> Vec<u8> {
        let mut text = noise(20_000, seed);
        let mut at = seed as usize;
        while text.len() < len {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let back = 300 + (at >> 33) % text.len().min(65_000).saturating_sub(300);
            let start = text.len() - back;
            text.extend_from_within(start..start + 200);
            text.extend_from_slice(&(at as u32).to_le_bytes());
        }
        text
    }

    fn gzip(text: &[u8], level: u32) -> Vec<u8> {
        let level = flate2::Compression::new(level);
        let mut compressor = flate2::write::GzEncoder::new(Vec::new(), level);
        compressor.write_all(text).unwrap();
        compressor.finish().unwrap()
    }

    /// Every byte that is kept is needed: with any other in its place the span is another one.
    #[test]
    fn no_byte_too_much_is_kept() {
        let gzip = gzip(&repeating(3 << 20, 7), 6);
        let (index, _) = index_by(Indexer::new(256 << 10), &gzip, 1 << 16).unwrap();
        let (mut kept, mut zeros) = (0, 0);
        for (number, span) in index.spans().iter().enumerate().skip(1) {
            let window = index.window(number).unwrap();
            assert_eq!(window.len(), WINDOW);
            let compressed = span.compressed.offset() as usize..span.compressed.end() as usize;
            span.decode(&gzip[compressed.clone()], &window).unwrap();
            kept += window.iter().filter(|byte| **byte != 0).count();
            zeros += window.iter().filter(|byte| **byte == 0).count();
            for at in (0..WINDOW).filter(|at| window[*at] != 0).step_by(1111) {
                let mut wrong = window.clone();
                wrong[at] ^= 1;
                assert!(span.decode(&gzip[compressed.clone()], &wrong).is_err(), "{number}: {at}");
            }
        }
        assert!(kept > 10_000 && zeros > 10_000, "{kept} bytes kept, {zeros} not");
    }

    proptest! {
        /// What is kept is the window's, and decodes what the whole window decodes.
        #[test]
        fn what_is_kept_is_enough(seed in any::<u64>(), level in 1..10u32, span in 1..40u64, piece in 1..70_000usize) {
            let text = repeating(300_000, seed);
            let gzip = gzip(&text, level);
            let (index, _) = index_by(Indexer::new(span * 4096), &gzip, piece).unwrap();
            for (number, span) in index.spans().iter().enumerate() {
                let start = span.uncompressed.offset() as usize;
                let window = index.window(number).unwrap();
                let before = &text[start - window.len()..start];
                prop_assert!(window.iter().zip(before).all(|(kept, byte)| *kept == 0 || kept == byte));
                let compressed = span.compressed.offset() as usize..span.compressed.end() as usize;
                let decoded = span.decode(&gzip[compressed], &window).unwrap();
                prop_assert!(decoded == text[start..span.uncompressed.end() as usize]);
            }
        }
    }

    /// Blocks without content are no reason to keep all of a layer in memory.
    #[test]
    fn a_window_does_not_take_ever_more() {
        let mut window = Window::new(0, 0, &[7; WINDOW]);
        for _ in 0..100_000 {
            window.push(&[0, 0, 0, 0xff, 0xff], 0);
        }
        assert!(window.compressed.len() <= MOST);
        assert_eq!(window.finish(), [7; WINDOW]);
    }
}
