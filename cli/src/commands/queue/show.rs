use hydrant_api::QueueEvent;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::render;

/// Show all there is to know of one reader that waits
#[derive(Debug, clap::Args)]
pub struct Show {
    #[arg(value_name = "ID")]
    pub id: u64,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl Show {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let event: QueueEvent = context.client()?.get(&format!("/v1/queue/{}", self.id)).await?;
        if self.json { print_json(&event) } else { print(&render::event(&event)) }
    }
}
