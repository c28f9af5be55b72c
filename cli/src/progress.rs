//! Progress on a terminal.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use hydrant_api::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::client::Watch;
use crate::output::{clean, clean_line};
use crate::render::{bytes, number};

/// What is done before that is not worth a line.
const DELAY: Duration = Duration::from_millis(250);

/// Shows on standard error, if that is a terminal, what goes on; notes in any case.
#[derive(Debug)]
pub struct Reporter {
    start: Instant,
    terminal: bool,
    line: ProgressBar,
    shown: bool,
    step: String,
}

impl Reporter {
    pub fn new() -> Self {
        let line = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            line.set_style(style);
        }
        let terminal = io::stderr().is_terminal();
        Self { start: Instant::now(), terminal, line, shown: false, step: String::new() }
    }
}

impl Watch for Reporter {
    fn progress(&mut self, line: &Progress) {
        match line {
            Progress::Step { step } => {
                self.step = step_text(step);
                self.line.set_message(self.step.clone());
            }
            Progress::Count { done, total, unit } => {
                let count = count_text(*done, *total, unit);
                self.line.set_message(format!("{}: {count}", self.step));
            }
            Progress::Note { message } => {
                self.line.suspend(|| eprintln!("note: {}", clean(message)));
            }
            Progress::Done { .. } | Progress::Failed { .. } => {}
        }
    }

    fn tick(&mut self) {
        if !self.terminal {
            return;
        }
        if !self.shown && self.start.elapsed() >= DELAY {
            self.line.set_draw_target(ProgressDrawTarget::stderr());
            self.shown = true;
        }
        self.line.tick();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.line.finish_and_clear();
    }
}

fn step_text(step: &str) -> String {
    match step {
        "metadata" => "fetching the tree's metadata".into(),
        "sizes" => "asking for sizes".into(),
        "tree" => "writing the tree".into(),
        "mount" => "mounting".into(),
        "fetch" => "fetching content".into(),
        "copy" => "copying".into(),
        other => clean_line(other),
    }
}

fn count_text(done: u64, total: Option<u64>, unit: &str) -> String {
    let amount = |n| if unit == "bytes" { bytes(n) } else { number(n) };
    let unit = if unit == "bytes" { String::new() } else { format!(" {}", clean_line(unit)) };
    match total {
        Some(total) => format!("{} of {}{unit}", amount(done), amount(total)),
        None => format!("{}{unit}", amount(done)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(count_text(1200, Some(38512), "objects"), "1,200 of 38,512 objects");
        assert_eq!(count_text(5, None, "files"), "5 files");
        assert_eq!(count_text(3 << 20, Some(20 << 20), "bytes"), "3.0 MiB of 20.0 MiB");
    }

    #[test]
    fn nothing_is_drawn_where_there_is_no_terminal() {
        let mut reporter = Reporter::new();
        reporter.terminal = false;
        reporter.start = Instant::now().checked_sub(DELAY).unwrap();
        reporter.tick();
        assert!(reporter.line.is_hidden() && !reporter.shown);
    }
}
