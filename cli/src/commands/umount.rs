use std::path::PathBuf;

use hydrant_api::{Mount, UmountRequest};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean_line, print};
use crate::place;

/// Unmount a tree; what was fetched and changed is kept
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Umount {
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// All of them
    #[arg(long)]
    pub all: bool,
}

impl Umount {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let directory = self.directory.as_deref().map(place::request_text).transpose()?;
        let request = UmountRequest { directory, all: self.all };
        let client = context.client_or_start().await?;
        let unmounted: Vec<Mount> = client.post("/v1/umount", &request).await?;
        let line = |mount: &Mount| format!("unmounted {}\n", clean_line(&mount.directory));
        print(&unmounted.iter().map(line).collect::<String>())
    }
}
