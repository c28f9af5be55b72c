use std::path::PathBuf;

use hydrant_api::{RmRequest, path_to_text};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean_line, print};
use crate::place;
use crate::progress::Reporter;

/// Remove a tree; refused where it has changes, unless they are kept or discarded
#[derive(Debug, clap::Args)]
pub struct Rm {
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Throw away what was changed
    #[arg(long, conflicts_with = "keep")]
    pub discard: bool,
    /// Leave an ordinary repository with everything in it
    #[arg(long)]
    pub keep: bool,
}

impl Rm {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let shown = path_to_text(&self.directory);
        let request = RmRequest {
            directory: place::request_text(&self.directory)?,
            discard: self.discard,
            keep: self.keep,
        };
        let client = context.client_or_start().await?;
        let summary = client.watch("/v1/rm", &request, &mut Reporter::new()).await?;
        let done = if self.keep { "is an ordinary repository now" } else { "removed" };
        print(&match summary.message {
            Some(message) => format!("{}\n", clean_line(&message)),
            None => format!("{shown} {done}\n"),
        })
    }
}
