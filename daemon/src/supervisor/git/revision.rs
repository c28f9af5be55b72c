//! What a user may name to be cloned.

use super::{Git, GitError};
use crate::object::ObjectId;

/// A branch, a tag or a full id, by whatever name.
#[derive(Debug, Clone, Copy)]
pub struct Revision<'a> {
    asked: &'a str,
    /// What `git clone --branch` takes; `None`: what the origin has checked out.
    pub name: Option<&'a str>,
    is_tag: bool,
}

impl<'a> Revision<'a> {
    /// `HEAD` and whole names of branches and tags are understood as well.
    #[must_use]
    pub fn new(asked: &'a str) -> Self {
        let tag = asked.strip_prefix("refs/tags/");
        let name = tag.or_else(|| asked.strip_prefix("refs/heads/")).unwrap_or(asked);
        Self { asked, name: (name != "HEAD").then_some(name), is_tag: tag.is_some() }
    }

    /// Why it could not be cloned.
    #[must_use]
    pub fn explain(&self, error: GitError) -> GitError {
        let asked = self.asked;
        let id = ObjectId::from_hex(asked.as_bytes()).is_ok();
        match error {
            GitError::Failed { message, .. } if id && message.contains("not our ref") => {
                GitError::Origin(format!("the origin has no commit {asked}"))
            }
            // git-clone(1), remote_find_tag
            GitError::Failed { message, .. } if message.contains("not found in upstream") => {
                GitError::Origin(format!(
                    "the origin has no {asked}: name a branch, a tag or a full commit id"
                ))
            }
            error => error,
        }
    }

    /// Where a branch has the name of a tag, git has cloned the branch.
    pub async fn check(&self, git: &Git) -> Result<(), GitError> {
        if self.is_tag && git.output(&["symbolic-ref", "--quiet", "HEAD"]).await.is_ok() {
            let asked = self.asked;
            return Err(GitError::Origin(format!(
                "the origin has a branch of the same name as {asked}: name the commit by its id"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_git_clone_takes() {
        let id = "0123456789012345678901234567890123456789";
        for (asked, name) in [
            ("HEAD", None),
            ("main", Some("main")),
            ("refs/heads/a/b", Some("a/b")),
            ("refs/tags/v1", Some("v1")),
            ("refs/remotes/x", Some("refs/remotes/x")),
            (id, Some(id)),
        ] {
            assert_eq!(Revision::new(asked).name, name, "{asked}");
        }
    }

    #[test]
    fn what_is_not_there() {
        let failed =
            |message: &str| GitError::Failed { command: "clone".into(), message: message.into() };
        let message = "warning: x\nfatal: Remote branch 1234567 not found in upstream origin";
        let error = Revision::new("1234567").explain(failed(message)).to_string();
        assert_eq!(error, "the origin has no 1234567: name a branch, a tag or a full commit id");
        let id = "0123456789012345678901234567890123456789";
        let message = format!("fatal: remote error: upload-pack: not our ref {id}");
        let error = Revision::new(id).explain(failed(&message)).to_string();
        assert_eq!(error, format!("the origin has no commit {id}"));
        let other = Revision::new("x").explain(failed("fatal: unable to access")).to_string();
        assert!(other.contains("unable to access"), "{other}");
    }
}
