use std::process::{Command, Stdio};

use hydrant_api::doctor::{Check, is_usable, to_text};
use nix::unistd::geteuid;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean, print, print_json};
use crate::start;

/// Check what the daemon needs of this machine, by trying it
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl Doctor {
    pub fn run(self, context: &Context) -> Result<(), Failure> {
        let checks = ask(context)?;
        if self.json {
            print_json(&checks)?;
        } else {
            print(&clean(&to_text(&checks)))?;
        }
        if is_usable(&checks) {
            return Ok(());
        }
        if !geteuid().is_root() && context.client().is_ok() {
            if !self.json {
                let socket = context.directories.socket();
                print(&format!("A daemon runs and serves you, at {}.\n", socket.display()))?;
            }
            return Ok(());
        }
        Err(Failure::new("this machine has not all that Hydrant needs"))
    }
}

/// The daemon's own word, from a process of its own: nothing need run.
fn ask(context: &Context) -> Result<Vec<Check>, Failure> {
    let program = start::program("hydrantd")?;
    let output = Command::new(&program)
        .args(["doctor", "--json", "--state-dir"])
        .arg(&context.directories.state)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::new(format!("can't run {}: {error}", program.display())))?;
    serde_json::from_slice(&output.stdout).map_err(|error| {
        let (program, status) = (program.display(), output.status);
        Failure::new(format!(
            "no checks came from `{program} doctor`, which ended: {status}: {error}"
        ))
    })
}
