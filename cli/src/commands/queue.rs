mod deny;
mod list;
mod retry;
mod show;

use clap::Subcommand;

use crate::context::Context;
use crate::failure::Failure;

/// Show the readers that wait for content
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Queue {
    #[command(subcommand)]
    pub command: Option<QueueCommand>,
    #[command(flatten)]
    pub list: list::List,
}

#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    Show(show::Show),
    Retry(retry::Retry),
    Deny(deny::Deny),
}

impl Queue {
    pub async fn run(self, context: &Context) -> Result<(), Failure> {
        match self.command {
            None => self.list.run(context).await,
            Some(QueueCommand::Show(command)) => command.run(context).await,
            Some(QueueCommand::Retry(command)) => command.run(context).await,
            Some(QueueCommand::Deny(command)) => command.run(context).await,
        }
    }
}
