use std::time::{Duration, Instant};

use hydrant_api::Status;
use serde_json::{Map, Value};

use crate::context::Context;
use crate::failure::Failure;

/// How long the daemon may take: it finishes what it was asked for before, a clone among that.
const PATIENCE: Duration = Duration::from_secs(90);

/// Replace the daemon by the one that is installed now, with its configuration; nobody notices
#[derive(Debug, clap::Args)]
pub struct Reload {}

impl Reload {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let client = context.client()?;
        let before: Status = client.get("/v1/status").await?;
        let _: Map<String, Value> = client.post("/v1/reload", &Map::new()).await?;
        let start = Instant::now();
        loop {
            // it may hang up while it is replaced
            let now = match context.client() {
                Ok(client) => client.get::<Status>("/v1/status").await.ok(),
                Err(_) => None,
            };
            if now.is_some_and(|now| now.instance != before.instance) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                let seconds = PATIENCE.as_secs();
                let log = context.directories.log();
                return Err(Failure::new(format!("no new daemon serves after {seconds} seconds"))
                    .hint(format!("see its log, {} or the journal", log.display())));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
