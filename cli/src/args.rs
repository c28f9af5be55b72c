//! The command line's arguments.

use std::path::PathBuf;

use clap::Parser;

use crate::commands::Command;

/// File trees that are there at once; their content comes when it is read.
#[derive(Debug, Parser)]
#[command(name = "hydrant", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Which daemon to talk to.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Global {
    /// Where the daemon keeps its trees [env: HYDRANT_STATE_DIR] [default: /var/lib/hydrant]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Daemon")]
    pub state_dir: Option<PathBuf>,
    /// Where the daemon's socket is [env: HYDRANT_RUN_DIR] [default: /run/hydrant]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Daemon")]
    pub run_dir: Option<PathBuf>,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed (also: no daemon runs and there is nothing \
                          to show), 2 wrong usage, 3 the daemon can't be reached or started.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use hydrant_api::History;

    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn clone() {
        let args = parse("hydrant clone --rev v1 u d --history none --read-only").unwrap();
        let Command::Clone(clone) = args.command else { panic!("not clone") };
        assert_eq!((clone.url.as_str(), clone.rev.as_deref()), ("u", Some("v1")));
        assert_eq!(clone.directory, Some(PathBuf::from("d")));
        assert_eq!((History::from(clone.history), clone.read_only), (History::None, true));
        let Command::Clone(clone) = parse("hydrant clone u").unwrap().command else { panic!() };
        assert_eq!(History::from(clone.history), History::Background);
    }

    #[test]
    fn global_options_stand_anywhere() {
        for line in ["hydrant --run-dir /r ls", "hydrant ls --run-dir /r"] {
            assert_eq!(parse(line).unwrap().global.run_dir, Some(PathBuf::from("/r")));
        }
    }

    #[test]
    fn what_goes_together() {
        for good in [
            "hydrant umount --all",
            "hydrant umount d",
            "hydrant rm d --keep",
            "hydrant rm d --discard",
            "hydrant queue",
            "hydrant queue --json",
            "hydrant queue --failed --json",
            "hydrant queue --failed --clear",
            "hydrant queue show 7",
            "hydrant queue show 7 --json",
            "hydrant queue retry 7",
            "hydrant queue deny 7",
            "hydrant workers --json",
            "hydrant workers restart",
            "hydrant workers restart 1 --json",
            "hydrant status --json",
            "hydrant status d --json",
            "hydrant ls --json",
            "hydrant doctor --json",
            "hydrant prefetch a b c",
            "hydrant image pull r",
            "hydrant image ls --json",
            "hydrant image rm r",
            "hydrant image evict r",
            "hydrant image index r",
            "hydrant image trace show r --json",
            "hydrant image trace record r",
            "hydrant image trace record r -- /bin/sh -c x",
            "hydrant image trace push r --key f",
            "hydrant image index r --push --key f",
            "hydrant mount d",
            "hydrant mount oci://r d --read-only",
            "hydrant completions bash",
            "hydrant stop",
        ] {
            parse(good).unwrap_or_else(|e| panic!("{good}: {e}"));
        }
        for bad in [
            "hydrant",
            "hydrant umount",
            "hydrant umount d --all",
            "hydrant rm d --keep --discard",
            "hydrant rm",
            "hydrant queue show",
            "hydrant queue show x",
            "hydrant queue --clear",
            "hydrant clone",
            "hydrant image",
            "hydrant image pull",
            "hydrant image index r --push",
            "hydrant image trace",
            "hydrant image trace r",
            "hydrant image trace record",
            "hydrant image trace push r",
            "hydrant mount d --read-only",
            "hydrant clone u d e",
            "hydrant clone u --history some",
            "hydrant prefetch",
            "hydrant completions cobol",
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
