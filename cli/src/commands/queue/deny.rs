use serde_json::{Map, Value};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::print;

/// Let a reader that waits have an error
#[derive(Debug, clap::Args)]
pub struct Deny {
    #[arg(value_name = "ID")]
    pub id: u64,
}

impl Deny {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let path = format!("/v1/queue/{}/deny", self.id);
        let _: Map<String, Value> = context.client()?.post(&path, &Map::new()).await?;
        print(&format!("{} gets an error\n", self.id))
    }
}
