//! Numbers and text from a seed.

/// SplitMix64 (Steele, Lea, Flood 2014): small, fast, the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end.max(1) as u64) as usize
    }

    /// A number from 0 up to, not including, 1.
    pub fn unit(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Bytes that don't compress.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// Makes text that compresses about as well as C sources do (4 to 5 times).
#[derive(Debug)]
pub struct Prose {
    random: Random,
    lines: Vec<String>,
}

const WORDS: [&str; 48] = [
    "int", "return", "struct", "static", "const", "void", "if", "else", "for", "while", "dev",
    "priv", "base", "reg", "clk", "ret", "err", "size", "offset", "buffer", "ops", "driver",
    "probe", "remove", "config", "CONFIG", "MASK", "SHIFT", "->", "=", "==", "!=", "(", ")", "{",
    "}", ";", "0x1f", "0xff", "NULL", "u32", "u8", "readl", "writel", "printf", "debug", "node",
    "bus",
];

impl Prose {
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let line = |random: &mut Random| {
            let mut line = "\t".repeat(random.below(3));
            for _ in 0..3 + random.below(6) {
                line += WORDS[random.below(WORDS.len())];
                line.push(' ');
            }
            line
        };
        let lines = (0..3000).map(|_| line(&mut random)).collect();
        Self { random, lines }
    }

    /// `size` bytes of lines.
    pub fn text(&mut self, size: usize) -> Vec<u8> {
        // A file of a real tree repeats itself much more than other files.
        let first = self.random.below(self.lines.len());
        let mut text = Vec::with_capacity(size + 80);
        while text.len() < size {
            let reach = if self.random.below(8) == 0 { self.lines.len() } else { 160 };
            let line = (first + self.random.below(reach)) % self.lines.len();
            text.extend_from_slice(self.lines[line].as_bytes());
            let tail = format!("{:x};\n", self.random.below(4096));
            text.extend_from_slice(tail.as_bytes());
        }
        text.truncate(size);
        if let Some(last) = text.last_mut() {
            *last = b'\n';
        }
        text
    }
}
