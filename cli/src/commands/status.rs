use std::path::PathBuf;

use hydrant_api::{Mount, Status as DaemonStatus};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::{place, render};

/// Show the daemon, its trees, its workers and its counters
#[derive(Debug, clap::Args)]
pub struct Status {
    /// Only the tree that this is in
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl Status {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let status: DaemonStatus = context.client()?.get("/v1/status").await?;
        match &self.directory {
            None if self.json => print_json(&status),
            None => print(&render::status(&status)),
            Some(directory) => {
                let path = place::request_text(directory)?;
                let mount = find(&status.mounts, &path)?;
                if self.json { print_json(mount) } else { print(&render::mount(mount)) }
            }
        }
    }
}

/// The innermost tree with this path in it.
fn find<'a>(mounts: &'a [Mount], path: &str) -> Result<&'a Mount, Failure> {
    mounts
        .iter()
        .filter(|mount| place::is_within(path, &mount.directory))
        .max_by_key(|mount| mount.directory.len())
        .ok_or_else(|| {
            Failure::new(format!("{path} is in no tree")).hint("`hydrant ls` lists the trees")
        })
}
