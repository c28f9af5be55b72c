//! Standard output.

use std::fmt::Write as _;
use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Writes text to standard output. A reader that has gone away (`| head`) is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("can't write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes one JSON document to standard output.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(format!("can't encode the answer: {error}")))?;
    text.push('\n');
    print(&text)
}

/// Text from elsewhere, fit for a terminal: control characters but for the end of a line become `\xNN`.
pub fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' {
            // Writing to a String does not fail.
            let _ = write!(cleaned, "\\x{:02x}", u32::from(c));
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

/// [`clean`], in one line.
pub fn clean_line(text: &str) -> String {
    clean(&text.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminals_controls() {
        assert_eq!(clean("a\x1b[2J\rb\nc"), "a\\x1b[2J\\x0db\nc");
        assert_eq!(clean_line("a\nb\u{9b}"), "a b\\x9b");
    }
}
