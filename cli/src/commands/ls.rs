use hydrant_api::Mount;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::render;

/// List the trees, mounted or not
#[derive(Debug, clap::Args)]
pub struct Ls {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl Ls {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let mounts: Vec<Mount> = context.client()?.get("/v1/mounts").await?;
        if self.json { print_json(&mounts) } else { print(&render::list(&mounts)) }
    }
}
