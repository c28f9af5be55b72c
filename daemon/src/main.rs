//! `hydrantd`: the supervisor, and the roles of the processes that it starts.

use std::io::{BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use hydrant_api::EXIT_ALREADY_RUNNING;
use hydrant_api::doctor::{is_usable, to_text};
use hydrant_daemon::admin::LockError;
use hydrant_daemon::supervisor::Kept;
use hydrant_daemon::sys::spawn::inherited;
use hydrant_daemon::{builder, config::Config, doctor, importer, standalone, supervisor, worker};
use tracing_subscriber::EnvFilter;

/// The Hydrant daemon.
#[derive(Debug, Parser)]
#[command(name = "hydrantd", version)]
struct Cli {
    #[command(flatten)]
    supervisor: SupervisorArgs,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Args)]
struct SupervisorArgs {
    /// Where segments, images and changes are kept
    #[arg(long, value_name = "DIR", global = true)]
    state_dir: Option<PathBuf>,
    /// Where the admin socket is
    #[arg(long, value_name = "DIR", global = true)]
    run_dir: Option<PathBuf>,
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/hydrant/config.toml", global = true)]
    config: PathBuf,
    /// Run without a service manager
    #[arg(long)]
    standalone: bool,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Fetches content; started by the supervisor
    #[command(hide = true)]
    Worker(Unprivileged),
    /// Makes a manifest of a revision; started by the supervisor
    #[command(hide = true)]
    Importer(Unprivileged),
    /// Makes a tree's files of a manifest; started by the supervisor
    #[command(hide = true)]
    Builder,
    /// Checks what this machine can do
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Who a process without privileges is.
#[derive(Debug, Clone, Copy, Args)]
struct Unprivileged {
    #[arg(long)]
    uid: u32,
    #[arg(long)]
    gid: u32,
    /// The kernel may have no Landlock
    #[arg(long)]
    without_landlock: bool,
    /// Only for `ps`
    #[arg(long)]
    shard: Option<u16>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            match error.downcast_ref() {
                Some(LockError::Held { .. }) => ExitCode::from(EXIT_ALREADY_RUNNING),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let SupervisorArgs { state_dir, run_dir, config, standalone } = cli.supervisor;
    match cli.role {
        None if standalone => {
            let mut arguments = Vec::new();
            let options =
                [("--state-dir", state_dir), ("--run-dir", run_dir), ("--config", Some(config))];
            for (option, path) in options {
                if let Some(path) = path {
                    // the supervisor's directory is another one
                    arguments.extend([option.into(), std::path::absolute(path)?.into_os_string()]);
                }
            }
            let code = standalone::run(Path::new("/proc/self/exe"), &arguments)?;
            Ok(ExitCode::from(code))
        }
        None => {
            // before anything else is opened
            let kept = Kept::take_back().context("can't take over from a supervisor before")?;
            let config = Config::load(&config)?;
            let directories = config.directories(state_dir, run_dir);
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("can't start the runtime")?;
            runtime.block_on(supervisor::run(directories, config, kept))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Worker(who)) => {
            worker::main(who.uid, who.gid, who.without_landlock, inherited()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Importer(who)) => {
            importer::main(who.uid, who.gid, who.without_landlock, inherited()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Builder) => {
            let [socket] = inherited()?;
            let socket = std::os::unix::net::UnixStream::from(socket);
            let input = BufReader::new(socket.try_clone().context("can't use the socket")?);
            builder::run(input, socket).context("can't talk to the supervisor")?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Doctor { json }) => {
            let config = Config::load(&config)?;
            let directories = config.directories(state_dir, run_dir);
            let checks = doctor::run(&directories.state);
            if json {
                println!("{}", serde_json::to_string_pretty(&checks)?);
            } else {
                print!("{}", to_text(&checks));
            }
            Ok(if is_usable(&checks) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}
