use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Args;
use crate::failure::Failure;
use crate::output::print;

/// Write a completion script for a shell
#[derive(Debug, clap::Args)]
pub struct Completions {
    pub shell: Shell,
}

impl Completions {
    pub fn run(self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Args::command(), "hydrant", &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}
