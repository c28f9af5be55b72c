//! Answers as text for people.

mod failed;
mod images;
mod mounts;
mod queue;
#[cfg(test)]
mod samples;
mod status;
mod workers;

use bytesize::ByteSize;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use hydrant_api::Summary;

pub use failed::failed;
pub use images::{images, traces};
pub use mounts::{list, mount};
pub use queue::{event, events};
pub use status::status;
pub use workers::workers;

use crate::output::clean_line;

/// A size: `3.1 MiB`.
pub fn bytes(n: u64) -> String {
    ByteSize(n).display().iec().to_string()
}

/// A count: `38,512`.
pub fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time: `812 ms`, `1.24 s`, `2 min 5 s`, `3 h 20 min`, `2 d 1 h`.
pub fn time(ms: u64) -> String {
    let seconds = ms / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{}.{:02} s", seconds, ms % 1000 / 10),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// What is there after a clone or a prefetch, in one line.
pub fn summary(what: &str, summary: &Summary) -> String {
    summary_of(what, " in the tree", summary)
}

/// The same of a part of a tree.
pub fn prefetched(what: &str, summary: &Summary) -> String {
    summary_of(what, "", summary)
}

fn summary_of(what: &str, place: &str, summary: &Summary) -> String {
    let Summary { files, tree_bytes, fetched_bytes, elapsed_ms, message } = summary;
    let mut line = format!(
        "{}: {} files, {}{place}, {} fetched so far, {}.{:02} s",
        clean_line(what),
        number(*files),
        bytes(*tree_bytes),
        bytes(*fetched_bytes),
        elapsed_ms / 1000,
        elapsed_ms % 1000 / 10,
    );
    if let Some(message) = message {
        line.push_str("; ");
        line.push_str(&clean_line(message));
    }
    line.push('\n');
    line
}

/// Columns without lines around them. A heading that begins with `>` stands, as its column does, to
/// the right.
fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
    for row in rows {
        table.add_row(row.iter().map(|cell| clean_line(cell)));
    }
    for (column, heading) in table.column_iter_mut().zip(headings) {
        column.set_padding((0, 2));
        if heading.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    trim(&table.to_string())
}

/// Names and values, one pair a line; pairs without a value are left out.
fn pairs(rows: &[(&str, Option<String>)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in rows {
        if let Some(value) = value {
            text.push_str(&format!("{name:width$}  {}\n", clean_line(value)));
        }
    }
    text
}

fn trim(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `40 %`; nothing of nothing is all of it.
fn percent(part: u64, whole: u64) -> String {
    let percent = (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(100);
    format!("{percent} %")
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!([bytes(0), bytes(1023), bytes(1536)], ["0 B", "1023 B", "1.5 KiB"]);
        assert_eq!(bytes(200 << 20), "200.0 MiB");
        assert_eq!([number(0), number(999), number(1000)], ["0", "999", "1,000"]);
        assert_eq!(number(1_234_567), "1,234,567");
        let times = [0, 999, 1240, 59_999, 125_000, 12_000_000, 180_000_000].map(time);
        let expected =
            ["0 ms", "999 ms", "1.24 s", "59.99 s", "2 min 5 s", "3 h 20 min", "2 d 2 h"];
        assert_eq!(times, expected);
        assert_eq!([percent(1, 3), percent(0, 0)], ["33 %", "100 %"]);
    }

    #[test]
    fn a_summary_is_one_line() {
        let mut done = Summary {
            files: 38512,
            tree_bytes: 264 << 20,
            fetched_bytes: 3 << 20,
            elapsed_ms: 871,
            message: None,
        };
        assert_eq!(
            summary("/srv/u-boot", &done),
            "/srv/u-boot: 38,512 files, 264.0 MiB in the tree, 3.0 MiB fetched so far, 0.87 s\n"
        );
        done.message = Some("two\nlines".into());
        assert!(summary("x", &done).ends_with(", 0.87 s; two lines\n"));
    }
}
