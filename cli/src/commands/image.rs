use std::path::PathBuf;

use clap::Subcommand;
use hydrant_api::{Evicted, Image as Pulled, ImageRequest, IndexRequest, PullRequest};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean_line, print, print_json};
use crate::progress::Reporter;
use crate::{environment, render};

/// Container images: `hydrant mount oci://REF DIR` puts one in place
#[derive(Debug, clap::Args)]
pub struct Image {
    #[command(subcommand)]
    pub command: ImageCommand,
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    Pull(Pull),
    Ls(Ls),
    Index(Index),
    Evict(Evict),
    Rm(Rm),
}

/// Fetch an image from its registry
#[derive(Debug, clap::Args)]
pub struct Pull {
    #[arg(value_name = "REF", help = "[registry/]repository[:tag][@digest]")]
    pub reference: String,
}

/// List the images
#[derive(Debug, clap::Args)]
pub struct Ls {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Make indexes of an image's layers, by which parts of them can be fetched
///
/// With --push they are put beside the image at its registry, signed. Who has the public key in `index_keys` (section
/// `[images]` of the configuration) does not have to stream the layers at a first pull.
#[derive(Debug, clap::Args)]
pub struct Index {
    /// As it was pulled; all of it has to be here
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Put them into the image's repository
    #[arg(long, requires = "key")]
    pub push: bool,
    /// A private key, as `openssl genpkey -algorithm ed25519` makes it
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

/// Let go of an image's content; it is fetched again, in parts, when it is read
#[derive(Debug, clap::Args)]
pub struct Evict {
    /// As it was pulled; layers that are mounted stay
    #[arg(value_name = "REF")]
    pub reference: String,
}

/// Remove an image; layers that another one has stay
#[derive(Debug, clap::Args)]
pub struct Rm {
    /// As it was pulled
    #[arg(value_name = "REF")]
    pub reference: String,
}

impl Image {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        match self.command {
            ImageCommand::Pull(Pull { reference }) => {
                let owner = environment::sudo_caller();
                let environment = environment::for_git(owner);
                let request = PullRequest { reference: reference.clone(), environment, owner };
                let client = context.client_or_start().await?;
                let summary =
                    client.watch("/v1/image/pull", &request, &mut Reporter::new()).await?;
                print(&render::summary(&reference, &summary))
            }
            ImageCommand::Index(Index { reference, push, key }) => {
                let owner = environment::sudo_caller();
                let environment = environment::for_git(owner);
                let key = key.map(fs_err::read_to_string).transpose();
                let key = key.map_err(|error| Failure::new(error.to_string()))?;
                let request =
                    IndexRequest { reference: reference.clone(), push, key, environment, owner };
                let client = context.client()?;
                let summary =
                    client.watch("/v1/image/index", &request, &mut Reporter::new()).await?;
                print(&format!(
                    "{}: {}, {}\n",
                    clean_line(&reference),
                    clean_line(summary.message.as_deref().unwrap_or_default()),
                    render::bytes(summary.tree_bytes)
                ))
            }
            ImageCommand::Ls(Ls { json }) => {
                let images: Vec<Pulled> = context.client()?.get("/v1/images").await?;
                if json { print_json(&images) } else { print(&render::images(&images)) }
            }
            ImageCommand::Evict(Evict { reference }) => {
                let request = ImageRequest { reference };
                let client = context.client()?;
                let Evicted { bytes, in_use } = client.post("/v1/image/evict", &request).await?;
                let stay = if in_use > 0 {
                    format!("; {} layers are mounted and stay", render::number(in_use))
                } else {
                    String::new()
                };
                print(&format!("{} freed{stay}\n", render::bytes(bytes)))
            }
            ImageCommand::Rm(Rm { reference }) => {
                let request = ImageRequest { reference: reference.clone() };
                let client = context.client()?;
                let _: serde_json::Value = client.post("/v1/image/rm", &request).await?;
                print(&format!("removed {}\n", clean_line(&reference)))
            }
        }
    }
}
