use std::path::PathBuf;

use hydrant_api::{Mount as Mounted, MountImageRequest, PathRequest, path_to_text};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{clean_line, print};
use crate::progress::Reporter;
use crate::{environment, place, render};

/// Mount a container image, or a tree again that was unmounted
///
/// `hydrant mount DIR` mounts again what was at DIR. `hydrant mount oci://REF DIR` puts an image in place, and
/// pulls it first if it is not here.
#[derive(Debug, clap::Args)]
pub struct Mount {
    #[arg(
        value_name = "DIR|oci://REF",
        help = "Where it was, or oci://[registry/]repository[:tag]"
    )]
    pub what: PathBuf,
    /// An empty or new directory, for an image
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// Nobody can change anything in the image's tree
    #[arg(long, requires = "directory")]
    pub read_only: bool,
}

impl Mount {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let image = self.what.to_str().and_then(|text| text.strip_prefix("oci://"));
        match (image, self.directory) {
            (Some(image), Some(directory)) => {
                let owner = environment::sudo_caller();
                let request = MountImageRequest {
                    reference: image.to_owned(),
                    directory: place::request_text(&directory)?,
                    read_only: self.read_only,
                    environment: environment::for_git(owner),
                    owner,
                };
                let client = context.client_or_start().await?;
                let summary =
                    client.watch("/v1/image/mount", &request, &mut Reporter::new()).await?;
                print(&render::summary(&path_to_text(&directory), &summary))
            }
            (Some(image), None) => {
                Err(Failure::usage(format!("say where oci://{image} is to be mounted: which DIR")))
            }
            (None, Some(_)) => {
                let what = self.what.display();
                Err(Failure::usage(format!("{what} is no image: they begin with oci://")))
            }
            (None, None) => {
                let request = PathRequest { directory: place::request_text(&self.what)? };
                let client = context.client_or_start().await?;
                let mounted: Mounted = client.post("/v1/mount", &request).await?;
                print(&format!("mounted {}\n", clean_line(&mounted.directory)))
            }
        }
    }
}
