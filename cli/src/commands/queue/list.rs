use hydrant_api::QueueEvent;

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::render;

#[derive(Debug, clap::Args)]
pub struct List {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl List {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let events: Vec<QueueEvent> = context.client()?.get("/v1/queue").await?;
        if self.json { print_json(&events) } else { print(&render::events(&events)) }
    }
}
