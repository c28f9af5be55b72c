use std::path::PathBuf;

use hydrant_api::{Mount as Mounted, PathRequest};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean_line, print};
use crate::place;

/// Mount a tree again that was unmounted
#[derive(Debug, clap::Args)]
pub struct Mount {
    /// Where it was
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

impl Mount {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let request = PathRequest { directory: place::request_text(&self.directory)? };
        let client = context.client_or_start().await?;
        let mounted: Mounted = client.post("/v1/mount", &request).await?;
        print(&format!("mounted {}\n", clean_line(&mounted.directory)))
    }
}
