use std::path::PathBuf;
use std::time::{Duration, Instant};

use hydrant_api::Status;
use serde_json::{Map, Value};

use crate::context::Context;
use crate::failure::Failure;

/// How long it may take to unmount everything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Stop the daemon: unmount its trees and end it
#[derive(Debug, clap::Args)]
pub struct Stop {}

impl Stop {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let client = context.client()?;
        let status: Status = client.get("/v1/status").await?;
        let _: Map<String, Value> = client.post("/v1/stop", &Map::new()).await?;
        let process = PathBuf::from(format!("/proc/{}", status.pid));
        let start = Instant::now();
        while process.exists() {
            if start.elapsed() > PATIENCE {
                let seconds = PATIENCE.as_secs();
                return Err(Failure::new(format!("the daemon has not ended in {seconds} seconds"))
                    .hint(format!(
                        "see its log, {} or the journal",
                        context.directories.log().display()
                    )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}
