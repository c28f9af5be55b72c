//! `hydrant`: the command line. It asks the daemon over its admin socket and shows the answers.

#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod context;
mod environment;
mod failure;
mod origin;
mod output;
mod place;
mod progress;
mod render;
mod start;

use std::process::ExitCode;

use clap::Parser;

use args::Args;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: can't start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(commands::run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.show();
            failure.exit_code()
        }
    }
}
