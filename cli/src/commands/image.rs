use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Subcommand;
use hydrant_api::{
    Evicted, Image as Pulled, ImageRequest, IndexRequest, MountImageRequest, PullRequest,
    RmRequest, Status, Summary, TraceRequest, TracedLayer, path_from_text,
};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean_line, print, print_json};
use crate::progress::Reporter;
use crate::{environment, place, render};

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

/// Forget what is there, and record what is read in the first two minutes after the next mount
///
/// The image's content goes, as with `hydrant image evict`: what is here is read without anybody's knowing. With COMMAND, the image is
/// mounted for that, COMMAND runs in it, and the mount is removed again with all changes. It runs by chroot(1), which is no
/// container: as the caller, and nothing keeps it from the rest of the machine.
#[derive(Debug, clap::Args)]
pub struct RecordTrace {
    /// As it was pulled
    #[arg(value_name = "REF")]
    pub reference: String,
    /// What is to be recorded, with its arguments
    #[arg(value_name = "COMMAND", last = true)]
    pub command: Vec<OsString>,
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

/// The daemon knows of all that was read by then.
const TOLD: Duration = Duration::from_secs(2);

/// Mounts an image at `directory`, runs a command in it, and removes the mount.
async fn record(
    context: &Context,
    reference: &str,
    directory: &Path,
    command: &[OsString],
) -> Result<(), Failure> {
    let owner = environment::sudo_caller();
    let directory_text = place::request_text(directory)?;
    let request = MountImageRequest {
        reference: reference.to_owned(),
        directory: directory_text.clone(),
        read_only: false,
        environment: environment::for_git(owner),
        owner,
    };
    let client = context.client()?;
    let _: Summary = client.watch("/v1/image/mount", &request, &mut Reporter::new()).await?;
    let ended = Command::new("chroot").arg(directory).args(command).status();
    tokio::time::sleep(TOLD).await;
    let request = RmRequest { directory: directory_text, discard: true, keep: false };
    let _: Summary = client.watch("/v1/rm", &request, &mut Reporter::new()).await?;
    // it was made for this
    std::fs::remove_dir(directory).ok();
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(format!("the command ended with {status}"))
            .hint("what it read until then is recorded")),
        Err(error) => Err(Failure::new(format!("can't run chroot: {error}"))),
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
            Self::Record(RecordTrace { reference, command }) => {
                let client = context.client()?;
                let request = TraceRequest { reference: reference.clone(), record: true };
                let _: Vec<TracedLayer> = client.post("/v1/image/trace", &request).await?;
                let request = ImageRequest { reference: reference.clone() };
                let evicted: Evicted = client.post("/v1/image/evict", &request).await?;
                if evicted.in_use > 0 {
                    let message = format!("{} layers are mounted", render::number(evicted.in_use));
                    let hint = "they are recorded at the next mount after these: `hydrant ls` and `hydrant status` show them";
                    return Err(Failure::new(message).hint(hint));
                }
                if command.is_empty() {
                    return print(&format!(
                        "{}: the next mount is recorded\n",
                        clean_line(&reference)
                    ));
                }
                // where nobody else can put anything
                let status: Status = client.get("/v1/status").await?;
                let name = format!("record-{}", std::process::id());
                let directory = path_from_text(&status.run_dir).join(name);
                record(context, &reference, &directory, &command).await?;
                let request = TraceRequest { reference, record: false };
                let layers: Vec<TracedLayer> = client.post("/v1/image/trace", &request).await?;
                print(&render::traces(&layers))
            }
            Self::Push(PushTrace { reference, key }) => {
                publish(context, reference, (true, true), Some(key)).await
            }
        }
    }
}
