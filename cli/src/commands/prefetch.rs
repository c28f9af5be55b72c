use std::path::PathBuf;

use hydrant_api::{PrefetchRequest, path_to_text};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::print;
use crate::progress::Reporter;
use crate::{place, render};

/// Fetch what is at these paths and below, before it is read
#[derive(Debug, clap::Args)]
pub struct Prefetch {
    /// Files and directories in trees, or trees
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
}

impl Prefetch {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let client = context.client_or_start().await?;
        for path in &self.paths {
            let request = PrefetchRequest { path: place::request_text(path)? };
            let summary = client.watch("/v1/prefetch", &request, &mut Reporter::new()).await?;
            print(&render::prefetched(&path_to_text(path), &summary))?;
        }
        Ok(())
    }
}
