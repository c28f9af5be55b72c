use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;

use crate::failure::Failure;

/// Become a program in a session of its own, which no terminal's end reaches
#[derive(Debug, clap::Args)]
pub struct Daemonize {
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub program: Vec<OsString>,
}

impl Daemonize {
    /// Does not return where it succeeds.
    pub fn run(self) -> Result<(), Failure> {
        let [program, args @ ..] = self.program.as_slice() else {
            return Err(Failure::usage("no program"));
        };
        setsid().map_err(|error| Failure::new(format!("can't make a session: {error}")))?;
        umask(Mode::from_bits_truncate(0o022));
        let error = Command::new(program).args(args).exec();
        Err(Failure::new(format!("can't run {}: {error}", program.display())))
    }
}
