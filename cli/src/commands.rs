//! The commands, one file for each verb.

mod clone;
mod completions;
mod daemonize;
mod doctor;
mod image;
mod ls;
mod mount;
mod prefetch;
mod queue;
mod reload;
mod rm;
mod status;
mod stop;
mod umount;
mod workers;

use clap::Subcommand;

use crate::args::Args;
use crate::context::Context;
use crate::failure::Failure;

#[derive(Debug, Subcommand)]
pub enum Command {
    Clone(clone::Clone),
    Mount(mount::Mount),
    Umount(umount::Umount),
    Rm(rm::Rm),
    Status(status::Status),
    Ls(ls::Ls),
    Image(image::Image),
    Prefetch(prefetch::Prefetch),
    Queue(queue::Queue),
    Workers(workers::Workers),
    Doctor(doctor::Doctor),
    Reload(reload::Reload),
    Stop(stop::Stop),
    Completions(completions::Completions),
    #[command(hide = true)]
    Daemonize(daemonize::Daemonize),
}

pub async fn run(args: Args) -> Result<(), Failure> {
    // These need no daemon and no configuration.
    let command = match args.command {
        Command::Completions(command) => return command.run(),
        Command::Daemonize(command) => return command.run(),
        command => command,
    };
    let context = Context::new(args.global)?;
    match command {
        Command::Clone(command) => command.run(&context).await,
        Command::Mount(command) => command.run(&context).await,
        Command::Umount(command) => command.run(&context).await,
        Command::Rm(command) => command.run(&context).await,
        Command::Status(command) => command.run(&context).await,
        Command::Ls(command) => command.run(&context).await,
        Command::Image(command) => command.run(&context).await,
        Command::Prefetch(command) => command.run(&context).await,
        Command::Queue(command) => command.run(&context).await,
        Command::Workers(command) => command.run(&context).await,
        Command::Reload(command) => command.run(&context).await,
        Command::Stop(command) => command.run(&context).await,
        Command::Doctor(command) => command.run(&context),
        Command::Completions(_) | Command::Daemonize(_) => Ok(()),
    }
}
