//! Passwords, from the user's credential helpers.

use super::{Git, GitError};
use crate::queue::wire::Credential;

impl Git {
    /// What the user's credential helpers know for a URL. `rejected` is forgotten by them first.
    pub async fn credential(
        &self,
        url: &str,
        rejected: Option<&Credential>,
    ) -> Result<Option<Credential>, GitError> {
        let mut description = format!("url={url}\n");
        if let Some(rejected) = rejected {
            let (username, password) = (&rejected.username, &rejected.password);
            if [username, password].iter().all(|text| !text.contains(['\n', '\0'])) {
                let input = format!("{description}username={username}\npassword={password}\n\n");
                self.output_of(&["credential", "reject"], input.as_bytes()).await?;
            }
        }
        description.push('\n');
        let output = match self.output_of(&["credential", "fill"], description.as_bytes()).await {
            Ok(output) => output,
            // no helper knows one, and nobody can be asked
            Err(GitError::Failed { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let output = String::from_utf8_lossy(&output);
        let field =
            |name: &str| output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let found = field("username").zip(field("password"));
        Ok(found.map(|(username, password)| Credential {
            username: username.to_owned(),
            password: password.to_owned(),
        }))
    }
}
