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
        let start = Instant::now();
        while is_running(status.pid) {
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

/// A process that nobody has waited for yet has ended all the same (proc_pid_stat(5)).
fn is_running(pid: i32) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = String::from_utf8_lossy(&stat).rsplit(") ").next().and_then(|s| s.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_dead_do_not_run() {
        assert!(is_running(std::process::id() as i32));
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        assert!(is_running(pid));
        drop(child.stdin.take());
        let start = Instant::now();
        while is_running(pid) {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(!is_running(pid));
    }
}
