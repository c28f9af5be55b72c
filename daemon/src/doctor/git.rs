//! The git program, which fetches metadata: by what it can do.

use std::io;
use std::process::Command;

use super::room::{Room, run};
use super::{Finding, Problem};

const REMEDY: &str = "Install git 2.36 or later (`apt-get install git`).";

/// Makes a repository, clones it as a real one is cloned, and lists its tree.
pub fn git(room: &Room) -> Finding {
    let origin = room.path("origin");
    let origin = origin.to_string_lossy();
    let clone = room.path("clone");
    let clone = clone.to_string_lossy();
    let url = format!("file://{origin}");

    let version = git_output(room, &["--version"])?;
    git_output(room, &["init", "-q", "--bare", &origin])?;
    let at = |arguments: &[&str]| {
        let arguments: Vec<_> = [&["-C", &*origin][..], arguments].concat();
        git_output(room, &arguments)
    };
    at(&["config", "uploadpack.allowFilter", "true"])?;
    let blob = at(&["hash-object", "-w", "--stdin"])?;
    let commit = format!(
        "tree=$(printf '100644 blob {blob}\\tf\\n' | git mktree) && \
         git update-ref HEAD $(git commit-tree -m x $tree)"
    );
    run_command(room, Command::new("sh").current_dir(&*origin).args(["-c", &commit]))?;

    git_output(
        room,
        &["clone", "-q", "--no-checkout", "--depth=1", "--filter=blob:none", &url, &clone],
    )?;
    let in_clone = |arguments: &[&str]| {
        let arguments: Vec<_> = [&["-C", &*clone][..], arguments].concat();
        git_output(room, &arguments)
    };
    let listing = in_clone(&["ls-tree", "-r", "-t", "-z", "--full-tree", "HEAD"])?;
    if listing != format!("100644 blob {blob}\tf\0") {
        return Err(Problem {
            detail: listing,
            ..Problem::new("git lists a tree wrongly", REMEDY)
        });
    }
    let missing = in_clone(&["rev-list", "--objects", "--all", "--missing=print"])?;
    if !missing.contains(&format!("?{blob}")) {
        let problem = "git has fetched content that was to be left out";
        return Err(Problem { detail: missing, ..Problem::new(problem, REMEDY) });
    }
    Ok(format!("{version} makes partial clones"))
}

fn git_output(room: &Room, arguments: &[&str]) -> Result<String, Problem> {
    run_command(room, Command::new("git").args(arguments))
}

fn run_command(room: &Room, command: &mut Command) -> Result<String, Problem> {
    // As it comes: nobody's configuration, no questions.
    command
        .env("HOME", room.path(""))
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_AUTHOR_NAME", "doctor")
        .env("GIT_AUTHOR_EMAIL", "doctor@localhost")
        .env("GIT_COMMITTER_NAME", "doctor")
        .env("GIT_COMMITTER_EMAIL", "doctor@localhost")
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .stdin(std::process::Stdio::null());
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let pause = || {
        std::thread::sleep(std::time::Duration::from_millis(1));
        Ok::<_, io::Error>(())
    };
    let output = run(command, pause).map_err(|error| Problem::step("run git", &error, REMEDY))?;
    if !output.status.success() {
        let detail =
            format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim_end());
        return Err(Problem { detail, ..Problem::new("git can't do what is needed", REMEDY) });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
