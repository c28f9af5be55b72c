//! Commits and trees from the origin.

use std::process::Stdio;

use tokio::sync::oneshot;

use super::run::{Fetched, run, run_until, run_with_progress};
use super::{CONFIG, Git, GitError, LOCAL_UPLOAD_PACK, Remote, program};
use crate::object::ObjectId;

/// Nobody waits for the disk while git clones: see [`Synced`](crate::supervisor::durable::Synced).
const NO_SYNC: [&str; 2] = ["-c", "core.fsync=none"];

/// The commit with its parents: beside nothing, all that it has would be new, and `git show` would read it all.
const DEPTH: &str = "--depth=2";

/// Commits and trees alone.
const NO_BLOBS: &str = "--filter=blob:none";

/// How much is cloned.
#[derive(Debug, Clone, Copy)]
pub struct Extent<'a> {
    /// A branch, a tag or the id of a commit.
    pub revision: Option<&'a str>,
    /// Without the history.
    pub shallow: bool,
    /// With all content.
    pub whole: bool,
}

/// What the clone found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub commit: ObjectId,
    pub tree: ObjectId,
    /// Seconds since the epoch.
    pub commit_time: i64,
}

impl Git {
    /// Clones commits and trees into [`directory`](Self::directory), which is empty; no files, and no blobs
    /// unless it is to be `whole`. `progress` gets git's progress lines.
    pub async fn clone_metadata(
        &self,
        url: &str,
        remote: &Remote,
        Extent { revision, shallow, whole }: Extent<'_>,
        mut progress: impl FnMut(&str),
    ) -> Result<(), GitError> {
        if let Some(id) = revision.filter(|r| ObjectId::from_hex(r.as_bytes()).is_ok()) {
            return self.fetch_commit(url, remote, id, [shallow, whole], progress).await;
        }
        let mut args: Vec<&str> = vec![
            "-c",
            "protocol.version=2",
            "-c",
            "advice.detachedHead=false",
            NO_SYNC[0],
            NO_SYNC[1],
            "clone",
        ];
        args.extend(["--no-checkout", "--progress"]);
        if !whole {
            args.push(NO_BLOBS);
        }
        if shallow {
            args.extend([DEPTH, "--no-tags"]);
        }
        if let Some(revision) = revision {
            args.extend(["--branch", revision]);
        }
        for setting in CONFIG {
            args.extend(["-c", setting]);
        }
        let upload_pack = format!("remote.origin.uploadpack={LOCAL_UPLOAD_PACK}");
        if matches!(remote, Remote::Local(_)) {
            args.extend(["--no-local", "--upload-pack", LOCAL_UPLOAD_PACK, "-c", &upload_pack]);
        }
        args.extend(["--", url, "."]);
        run_with_progress(self.command(&args)?, "clone", &mut progress).await
    }

    /// `--depth` means `--single-branch`, but the user expects every branch and tag at the next
    /// fetch.
    pub async fn track_all_branches(&self) -> Result<(), GitError> {
        let refspec = "+refs/heads/*:refs/remotes/origin/*";
        self.output(&["config", "--replace-all", "remote.origin.fetch", refspec]).await?;
        self.output(&["config", "--unset-all", "remote.origin.tagOpt"]).await.ok();
        Ok(())
    }

    /// The same for a commit that is given by its id, which `git clone` can't start from.
    async fn fetch_commit(
        &self,
        url: &str,
        remote: &Remote,
        id: &str,
        [shallow, whole]: [bool; 2],
        mut progress: impl FnMut(&str),
    ) -> Result<(), GitError> {
        let format = if id.len() == 64 { "sha256" } else { "sha1" };
        self.output(&["init", "--quiet", &format!("--object-format={format}")]).await?;
        self.output(&["remote", "add", "origin", "--", url]).await?;
        let mut settings: Vec<String> = CONFIG.iter().map(|s| (*s).to_owned()).collect();
        if !whole {
            settings.push("remote.origin.promisor=true".into());
            settings.push("remote.origin.partialCloneFilter=blob:none".into());
        }
        if matches!(remote, Remote::Local(_)) {
            settings.push(format!("remote.origin.uploadpack={LOCAL_UPLOAD_PACK}"));
        }
        for setting in &settings {
            let (name, value) = setting.split_once('=').unwrap_or((setting, "true"));
            self.output(&["config", name, value]).await?;
        }
        let mut args =
            vec!["-c", "protocol.version=2", NO_SYNC[0], NO_SYNC[1], "fetch", "--progress"];
        if !whole {
            args.push(NO_BLOBS);
        }
        if shallow {
            args.extend([DEPTH, "--no-tags"]);
        }
        args.extend(["origin", id]);
        run_with_progress(self.command(&args)?, "fetch", &mut progress).await?;
        self.output(&["update-ref", "--no-deref", "HEAD", id]).await?;
        Ok(())
    }

    /// What `HEAD` is. An error when the origin has no commit.
    pub async fn head(&self) -> Result<Head, GitError> {
        let args = ["log", "-1", "--no-show-signature", "--format=%H %T %ct", "HEAD"];
        let line = self.line(&args).await.map_err(|error| match error {
            GitError::Failed { message, .. } if message.contains("does not have any commits") => {
                GitError::Origin("the origin has no commits yet".into())
            }
            GitError::Failed { message, .. } if message.contains("unknown revision") => {
                GitError::Origin("the origin has no default branch: name one with --rev".into())
            }
            error => error,
        })?;
        let wrong = || GitError::Output { command: "log".into(), output: line.clone() };
        let mut words = line.split(' ');
        let mut next = || words.next().ok_or_else(wrong);
        let commit = ObjectId::from_hex(next()?.as_bytes()).map_err(|_| wrong())?;
        let tree = ObjectId::from_hex(next()?.as_bytes()).map_err(|_| wrong())?;
        let commit_time = next()?.parse().map_err(|_| wrong())?;
        Ok(Head { commit, tree, commit_time })
    }

    /// The branch that `HEAD` is on, or the id of its commit.
    pub async fn revision(&self) -> Result<String, GitError> {
        match self.line(&["symbolic-ref", "--quiet", "--short", "HEAD"]).await {
            Ok(branch) => Ok(branch),
            Err(GitError::Failed { .. }) => self.line(&["rev-parse", "HEAD"]).await,
            Err(error) => Err(error),
        }
    }

    /// Takes a clone back: the directory is empty again. As the user, to whom all of it belongs.
    pub async fn remove_clone(&self) -> Result<(), GitError> {
        let mut command = program(self, "rm")?;
        command.args(["-rf", "--", ".git"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        run(command, &["clone"], None).await.map(drop)
    }

    /// Fetches the rest of the history until `stopped` resolves; without content, where the clone is without.
    pub async fn fetch_history(
        &self,
        stopped: &mut oneshot::Receiver<()>,
    ) -> Result<Fetched, GitError> {
        // a repository around the tree is none of ours
        let here = "--git-dir=.git";
        let shallow = self.line(&[here, "rev-parse", "--is-shallow-repository"]).await? == "true";
        let mut args = vec![here, "-c", "core.fsync=all", "fetch", "--quiet"];
        args.push("--tags");
        if shallow {
            args.push("--unshallow");
        }
        args.push("origin");
        run_until(self.command(&args)?, &args, stopped).await
    }
}
