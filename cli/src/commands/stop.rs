use serde_json::{Map, Value};

use crate::context::Context;
use crate::failure::Failure;

/// Stop the daemon: unmount its trees and end it
#[derive(Debug, clap::Args)]
pub struct Stop {}

impl Stop {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let _: Map<String, Value> = context.client()?.post("/v1/stop", &Map::new()).await?;
        Ok(())
    }
}
