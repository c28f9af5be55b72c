//! `hydrantd`: the supervisor, and the roles of the processes that it starts.

use std::io::{BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use hydrant_api::EXIT_ALREADY_RUNNING;
use hydrant_api::doctor::{is_usable, to_text};
use hydrant_daemon::admin::LockError;
use hydrant_daemon::catalog::Catalog;
use hydrant_daemon::queue::inflight;
use hydrant_daemon::standalone::Programs;
use hydrant_daemon::supervisor::{Kept, Outcome};
use hydrant_daemon::sys::fdstore;
use hydrant_daemon::sys::replace::{hold_orders, installed_program, replace};
use hydrant_daemon::sys::spawn::inherited;
use hydrant_daemon::sys::user_namespace;
use hydrant_daemon::{builder, config::Config, doctor, importer, standalone, supervisor, worker};
use tracing_subscriber::EnvFilter;

/// The very file that runs now, even if it has been replaced.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// The role of the keeper, on the command line.
const KEEPER: &str = "keeper";

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
    Worker {
        #[command(flatten)]
        who: Unprivileged,
        /// Segments, where their events come from the kernel's queue
        #[arg(long)]
        event_files: Option<PathBuf>,
    },
    /// Makes a manifest of a revision; started by the supervisor
    #[command(hide = true)]
    Importer(Unprivileged),
    /// Fetches container images; started by the supervisor
    #[command(hide = true)]
    Puller(Unprivileged),
    /// Makes a tree's files of a manifest; started by the supervisor
    #[command(hide = true)]
    Builder,
    /// Makes a user namespace; started by the supervisor
    #[command(hide = true)]
    UserNamespace,
    /// Keeps file descriptors in a restart; started by the supervisor
    #[command(hide = true)]
    Guard,
    /// Takes the parent's place should that and the supervisor be killed; started by the parent
    #[command(hide = true)]
    Keeper,
    /// Whether this program could take over from a supervisor; started by that one
    #[command(hide = true)]
    Check {
        #[arg(long)]
        table_version: u64,
    },
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
            // of a supervisor that has taken the place of its parent
            let kept = fdstore::take().context("can't take what is to be kept")?;
            let mut arguments = Vec::new();
            let options =
                [("--state-dir", state_dir), ("--run-dir", run_dir), ("--config", Some(config))];
            for (option, path) in options {
                if let Some(path) = path {
                    // the supervisor's directory is another one
                    arguments.extend([option.into(), std::path::absolute(path)?.into_os_string()]);
                }
            }
            let programs =
                Programs { installed: installed_program()?, own: Path::new(OWN_PROGRAM) };
            let keeper: Vec<_> = [KEEPER.into()].into_iter().chain(arguments.clone()).collect();
            let code = standalone::run(programs, &arguments, Some(&keeper), kept)?;
            Ok(ExitCode::from(code))
        }
        None => {
            let program = installed_program()?;
            hold_orders().context("can't hold signals back")?;
            // before anything else is opened
            let kept = Kept::take_back();
            let inherits = kept.as_ref().map_or(true, |kept| !kept.is_empty());
            let supervise = || {
                let kept = kept.context("can't take over from a supervisor before")?;
                let config = Config::load(&config)?;
                let directories = config.directories(state_dir, run_dir);
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()
                    .context("can't start the runtime")?;
                let outcome = runtime.block_on(supervisor::run(directories, config, kept))?;
                let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
                let (program, fds) = match outcome {
                    Outcome::Ended => return Ok(ExitCode::SUCCESS),
                    Outcome::Replace(fds) => (program, fds),
                    Outcome::Parent(fds) => {
                        arguments.push("--standalone".into());
                        (Path::new(OWN_PROGRAM), fds)
                    }
                };
                runtime.shutdown_background();
                let error = replace(program, &arguments, fds);
                Err(error).with_context(|| format!("can't become {}", program.display()))
            };
            supervise().inspect_err(|_| {
                // readers wait and we are started again at once, but not in a tight loop
                if inherits {
                    std::thread::sleep(Duration::from_secs(1));
                }
            })
        }
        Some(Role::Keeper) => {
            let [lifeline] = inherited()?;
            let kept = standalone::keeper::run(&lifeline)?;
            if kept.is_empty() {
                return Ok(ExitCode::SUCCESS);
            }
            drop(lifeline);
            let arguments = std::env::args_os().skip(1).filter(|argument| argument != KEEPER);
            let arguments: Vec<_> = arguments.chain(["--standalone".into()]).collect();
            let error = replace(Path::new(OWN_PROGRAM), &arguments, kept);
            Err(error).context("can't become the parent of a supervisor")
        }
        Some(Role::Guard) => {
            let kept = fdstore::take().context("can't take what is to be guarded")?;
            let directories = Config::load(&config)?.directories(state_dir.clone(), run_dir);
            // the admin socket is the service's
            let run_dir = directories.run.join("stopping");
            let mut arguments = vec!["--run-dir".into(), run_dir.into_os_string()];
            for (option, path) in [("--state-dir", state_dir), ("--config", Some(config))] {
                arguments.extend(
                    path.map(|path| [option.into(), path.into_os_string()]).into_iter().flatten(),
                );
            }
            let awaited = supervisor::awaited();
            let code = standalone::guard(Path::new(OWN_PROGRAM), &arguments, kept, awaited)?;
            Ok(ExitCode::from(code))
        }
        Some(Role::Check { table_version }) => {
            let config = Config::load(&config)?;
            let directories = config.directories(state_dir, run_dir);
            Catalog::check(&directories.state.join("catalog.sqlite"))?;
            inflight::check_version(table_version)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Worker { who, event_files }) => {
            worker::main(who.uid, who.gid, who.without_landlock, event_files, inherited()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Importer(who)) => {
            importer::main(who.uid, who.gid, who.without_landlock, inherited()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Puller(who)) => {
            importer::puller::main(who.uid, who.gid, who.without_landlock, inherited()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Builder) => {
            let [socket] = inherited()?;
            let socket = std::os::unix::net::UnixStream::from(socket);
            let input = BufReader::new(socket.try_clone().context("can't use the socket")?);
            builder::run(input, socket).context("can't talk to the supervisor")?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::UserNamespace) => {
            let [socket] = inherited()?;
            user_namespace::main(socket.into()).context("can't make a user namespace")?;
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
