use std::path::PathBuf;

use clap::Subcommand;
use hydrant_api::{
    Evicted, Image as Pulled, ImageRequest, IndexRequest, PullRequest, TraceRequest, TracedLayer,
};

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
    Trace(Trace),
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

/// Traces: what is fetched first of an image's layers when they are mounted, as it was read in the first two minutes before
#[derive(Debug, clap::Args)]
pub struct Trace {
    #[command(subcommand)]
    pub command: TraceCommand,
}

#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    Show(ShowTrace),
    Record(RecordTrace),
    Push(PushTrace),
}

/// Show what is fetched first: how much of each layer, and what lies there
#[derive(Debug, clap::Args)]
pub struct ShowTrace {
    /// As it was pulled
    #[arg(value_name = "REF")]
    pub reference: String,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Forget what is there: what is read after the next mount is recorded anew
#[derive(Debug, clap::Args)]
pub struct RecordTrace {
    /// As it was pulled
    #[arg(value_name = "REF")]
    pub reference: String,
}

/// Put the traces beside the image at its registry, signed
///
/// Who has the public key in `index_keys` (section `[images]` of the configuration) begins with them after a first pull.
#[derive(Debug, clap::Args)]
pub struct PushTrace {
    /// As it was pulled
    #[arg(value_name = "REF")]
    pub reference: String,
    /// A private key, as `openssl genpkey -algorithm ed25519` makes it
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
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

/// Makes indexes, or traces; puts them there if they are to be.
async fn publish(
    context: &Context,
    reference: String,
    (push, traces): (bool, bool),
    key: Option<PathBuf>,
) -> Result<(), Failure> {
    let owner = environment::sudo_caller();
    let environment = environment::for_git(owner);
    let key = key.map(fs_err::read_to_string).transpose();
    let key = key.map_err(|error| Failure::new(error.to_string()))?;
    let request = IndexRequest { reference, push, traces, key, environment, owner };
    let client = context.client()?;
    let summary = client.watch("/v1/image/index", &request, &mut Reporter::new()).await?;
    print(&format!(
        "{}: {}, {}\n",
        clean_line(&request.reference),
        clean_line(summary.message.as_deref().unwrap_or_default()),
        render::bytes(summary.tree_bytes)
    ))
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
                publish(context, reference, (push, false), key).await
            }
            ImageCommand::Trace(Trace { command }) => command.run(context).await,
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

impl TraceCommand {
    async fn run(self, context: &Context) -> Result<(), Failure> {
        match self {
            Self::Show(ShowTrace { reference, json }) => {
                let request = TraceRequest { reference, record: false };
                let layers: Vec<TracedLayer> =
                    context.client()?.post("/v1/image/trace", &request).await?;
                if json { print_json(&layers) } else { print(&render::traces(&layers)) }
            }
            Self::Record(RecordTrace { reference }) => {
                let request = TraceRequest { reference: reference.clone(), record: true };
                let _: Vec<TracedLayer> =
                    context.client()?.post("/v1/image/trace", &request).await?;
                print(&format!("{}: the next mount is recorded\n", clean_line(&reference)))
            }
            Self::Push(PushTrace { reference, key }) => {
                publish(context, reference, (true, true), Some(key)).await
            }
        }
    }
}
