use serde_json::{Map, Value};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::print;

/// Try again at once to fetch what a reader waits for
#[derive(Debug, clap::Args)]
pub struct Retry {
    #[arg(value_name = "ID")]
    pub id: u64,
}

impl Retry {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let path = format!("/v1/queue/{}/retry", self.id);
        let _: Map<String, Value> = context.client()?.post(&path, &Map::new()).await?;
        print(&format!("{} is tried again\n", self.id))
    }
}
