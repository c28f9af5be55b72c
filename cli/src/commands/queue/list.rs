use std::time::{SystemTime, UNIX_EPOCH};

use hydrant_api::{Cleared, FailedEvent, QueueEvent};
use serde_json::{Map, Value};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::render;

#[derive(Debug, clap::Args)]
pub struct List {
    /// Those that were given up instead, because the workers that had them died
    #[arg(long)]
    pub failed: bool,
    /// Forget them, and let what they wanted be tried again at once
    #[arg(long, requires = "failed")]
    pub clear: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

impl List {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        if self.clear {
            let done: Cleared = context
                .client()?
                .post("/v1/queue/failed/clear", &Map::<String, Value>::new())
                .await?;
            return if self.json {
                print_json(&done)
            } else {
                print(&format!("{} forgotten\n", done.cleared))
            };
        }
        if self.failed {
            let failed: Vec<FailedEvent> = context.client()?.get("/v1/queue/failed").await?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            let now = u64::try_from(now).unwrap_or(u64::MAX);
            let text = render::failed(&failed, now);
            return if self.json { print_json(&failed) } else { print(&text) };
        }
        let events: Vec<QueueEvent> = context.client()?.get("/v1/queue").await?;
        if self.json { print_json(&events) } else { print(&render::events(&events)) }
    }
}
