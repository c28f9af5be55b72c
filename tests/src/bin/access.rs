//! Gets at a file in one way, compares what it sees with the truth, and says what came of it:
//! exit code 0 and `right`; 1 and `wrong at OFFSET` or `short: BYTES`; 2 and `error: NUMBER TEXT`.
//! Killed by SIGALRM when it takes too long, by SIGBUS when a page can't be had.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use hydrant_tests::access::{Access, Kind, Verdict, perform};

#[derive(Parser)]
struct Arguments {
    kind: Kind,
    file: PathBuf,
    /// A file with the right bytes.
    #[arg(long)]
    truth: PathBuf,
    #[arg(long, default_value_t = 0)]
    offset: u64,
    /// How much to read; to the end by default.
    #[arg(long, default_value_t = usize::MAX >> 1)]
    length: usize,
    /// A directory on another file system.
    #[arg(long, default_value = "/dev/shm")]
    other: PathBuf,
    #[arg(long, default_value_t = 60)]
    time_out_secs: u32,
}

fn main() -> ExitCode {
    let Arguments { kind, file, truth, offset, length, other, time_out_secs } = Arguments::parse();
    nix::unistd::alarm::set(time_out_secs);
    let truth = match fs_err::read(truth) {
        Ok(truth) => truth,
        Err(error) => {
            println!("no truth: {error}");
            return ExitCode::from(3);
        }
    };
    match perform(&Access { kind, file, truth, offset, length, other }) {
        Ok(Verdict::Right) => {
            println!("right");
            ExitCode::SUCCESS
        }
        Ok(Verdict::WrongAt(place)) => {
            println!("wrong at {place}");
            ExitCode::from(1)
        }
        Ok(Verdict::Short(count)) => {
            println!("short: {count}");
            ExitCode::from(1)
        }
        Err(error) => {
            println!("error: {} {error}", error.raw_os_error().unwrap_or(0));
            ExitCode::from(2)
        }
    }
}
