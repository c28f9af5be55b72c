use clap::Subcommand;
use hydrant_api::{RestartRequest, Worker};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::render;

/// Show the processes that fetch
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Workers {
    #[command(subcommand)]
    pub command: Option<WorkersCommand>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum WorkersCommand {
    Restart(Restart),
}

/// Replace workers by new ones; readers notice nothing
#[derive(Debug, clap::Args)]
pub struct Restart {
    /// That of this shard alone; all of them, one after the other, otherwise
    #[arg(value_name = "SHARD")]
    pub shard: Option<u16>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl Workers {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let (workers, json): (Vec<Worker>, bool) = match self.command {
            None => (context.client()?.get("/v1/workers").await?, self.json),
            Some(WorkersCommand::Restart(Restart { shard, json })) => {
                let request = RestartRequest { shard };
                (context.client()?.post("/v1/workers/restart", &request).await?, json)
            }
        };
        if json { print_json(&workers) } else { print(&render::workers(&workers)) }
    }
}
