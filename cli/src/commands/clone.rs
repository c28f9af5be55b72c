use std::path::PathBuf;

use hydrant_api::{CloneRequest, History, path_to_text};

use crate::context::Context;
use crate::failure::Failure;
use crate::output::print;
use crate::progress::Reporter;
use crate::{environment, origin, place, render};

/// Put the tree of a git repository in place; content comes when it is read
#[derive(Debug, clap::Args)]
pub struct Clone {
    /// As git takes it: https://…, host:path, or a local path
    #[arg(value_name = "URL")]
    pub url: String,
    /// An empty or new directory [default: the last part of the URL]
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// A branch, tag or commit [default: what the origin has checked out]
    #[arg(long)]
    pub rev: Option<String>,
    /// How much of the history comes with it, and when
    #[arg(long, value_enum, default_value_t = HistoryChoice::Background)]
    pub history: HistoryChoice,
    /// Nobody can change anything in the tree
    #[arg(long)]
    pub read_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum HistoryChoice {
    /// Only the newest commit
    None,
    /// All of it, once the tree is there
    Background,
    /// All of it, before the tree is there
    Full,
}

impl From<HistoryChoice> for History {
    fn from(choice: HistoryChoice) -> Self {
        match choice {
            HistoryChoice::None => Self::None,
            HistoryChoice::Background => Self::Background,
            HistoryChoice::Full => Self::Full,
        }
    }
}

impl Clone {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        let url = origin::resolve(&self.url)?;
        let directory = match self.directory {
            Some(directory) => directory,
            None => origin::directory_name(&self.url).map(PathBuf::from).ok_or_else(|| {
                Failure::usage(format!("{} does not end in a name: say which DIR", self.url))
            })?,
        };
        let shown = path_to_text(&directory);
        let owner = environment::sudo_caller();
        let request = CloneRequest {
            url,
            directory: place::request_text(&directory)?,
            revision: self.rev,
            history: self.history.into(),
            read_only: self.read_only,
            environment: environment::for_git(owner),
            owner,
        };
        let client = context.client_or_start().await?;
        let summary = client.watch("/v1/clone", &request, &mut Reporter::new()).await?;
        print(&render::summary(&shown, &summary))
    }
}
