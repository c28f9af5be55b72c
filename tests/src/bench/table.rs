//! Tables in Markdown.

use std::fmt;
use std::time::Duration;

/// A table that is printed with its columns aligned.
#[derive(Debug)]
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    #[must_use]
    pub fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        let head = columns.iter().map(|&column| column.to_owned()).collect();
        Self { title: title.into(), rows: vec![head] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |n: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(n));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        writeln!(f, "### {}\n", self.title)?;
        for (number, row) in self.rows.iter().enumerate() {
            for (n, width) in widths.iter().enumerate() {
                let cell = row.get(n).map_or("", String::as_str);
                write!(f, "| {cell:width$} ")?;
            }
            writeln!(f, "|")?;
            if number == 0 {
                widths.iter().try_for_each(|width| write!(f, "|{}", "-".repeat(width + 2)))?;
                writeln!(f, "|")?;
            }
        }
        writeln!(f)
    }
}

/// Seconds, or milliseconds or microseconds when they are few.
#[must_use]
pub fn time(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds >= 0.1 => format!("{seconds:.2} s"),
        seconds if seconds >= 0.000_1 => format!("{:.2} ms", seconds * 1e3),
        seconds => format!("{:.1} us", seconds * 1e6),
    }
}

/// Megabytes, or kilobytes when they are few.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e5 => format!("{:.2} MB", bytes / 1e6),
        bytes => format!("{:.1} kB", bytes / 1e3),
    }
}

/// `a` in times of `b`.
#[must_use]
pub fn ratio(a: f64, b: f64) -> String {
    match a / b {
        ratio if ratio >= 10.0 => format!("{ratio:.0} x"),
        ratio => format!("{ratio:.2} x"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned() {
        let mut table = Table::new("Title", &["what", "time"]);
        table.row(["long name".to_owned(), time(Duration::from_millis(1500))]);
        assert_eq!(
            table.to_string(),
            "### Title\n\n| what      | time   |\n|-----------|--------|\n| long name | 1.50 s |\n\n"
        );
        assert_eq!(time(Duration::from_micros(250)), "0.25 ms");
        assert_eq!((bytes(5_000_000), bytes(1_500)), ("5.00 MB".into(), "1.5 kB".into()));
        assert_eq!((ratio(15.0, 1.0), ratio(1.0, 2.0)), ("15 x".into(), "0.50 x".into()));
    }
}
