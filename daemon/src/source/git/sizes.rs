//! The sizes of blobs, without the blobs.
//!
//! Git's trees don't have them, but a file tree can't be shown without. In order: the command
//! `object-info`, a sidecar ref in the repository, the API of the forge. Each is exact; there is no
//! guessing. Who still doesn't know fetches the blobs.

pub mod forge;
mod info;
pub mod sidecar;

use std::collections::HashSet;
use std::sync::Arc;

use self::forge::Forge;
use super::Inner;
use super::http::Http;
use super::transport::Transport;
use crate::object::ObjectId;
use crate::source::FetchError;

/// Which sizes are wanted.
#[derive(Debug, Clone, Copy)]
pub struct SizesQuery<'a> {
    /// The tree that `entries` were listed from. Needed for the sidecar and for forges.
    pub tree: Option<ObjectId>,
    /// Every blob that `git ls-tree -r --full-tree <tree>` lists, in its order, with repetitions and
    /// without submodules. Not needed without `tree`.
    pub entries: &'a [ObjectId],
    /// Whose sizes are asked for, each once.
    pub wanted: &'a [ObjectId],
}

/// What could be found out.
#[derive(Debug, Clone, Default)]
pub struct SizesOutcome {
    /// What was asked for and found, each once.
    pub known: Vec<(ObjectId, u64)>,
    /// Each once, in the order of the query.
    pub unknown: Vec<ObjectId>,
    /// Where the sizes came from, in a word or two.
    pub how: &'static str,
    /// What the server's administrator or the user could do so that the sizes are there next time.
    pub advice: Option<String>,
}

const ADVICE: &str = "the server does not tell the sizes of files, so their content was fetched at \
    once. With git 2.32 or later on the server, `git config transfer.advertiseObjectInfo true` in the \
    repository makes it tell";

/// The sizes that are wanted, by the first way that works. An error only where trying again may help.
pub(super) async fn sizes(
    inner: &Inner,
    query: &SizesQuery<'_>,
) -> Result<SizesOutcome, FetchError> {
    let wanted = query.wanted;
    if wanted.is_empty() {
        return Ok(SizesOutcome { how: "nothing to ask", ..SizesOutcome::default() });
    }
    let capabilities = inner.transport.capabilities(inner.hash).await?;
    if capabilities.tells_sizes() {
        let known =
            info::object_info(&inner.transport, inner.hash, wanted, inner.connections).await?;
        return Ok(outcome("object-info", wanted, known, None));
    }
    let mut advice = ADVICE.to_owned();
    if let Some(tree) = query.tree {
        if capabilities.ls_refs {
            match sidecar::fetch(inner, tree, query.entries).await {
                Ok(Some(all)) => {
                    let known = wanted.iter().filter_map(|id| Some((*id, *all.get(id)?)));
                    return Ok(outcome("sidecar ref", wanted, known.collect(), None));
                }
                Ok(None) => {}
                Err(e @ FetchError::Retry { .. }) => return Err(e),
                Err(e) => {
                    advice = format!("the sizes in {} can't be used: {e}", sidecar::name(tree))
                }
            }
        }
        let http = match &inner.transport {
            Transport::Http(http) => Some(http),
            Transport::Pipe(_) => inner.web.as_ref(),
        };
        let guess = |http: &Arc<Http>| Forge::guess(http.home(), &capabilities);
        if let Some(http) = http
            && let Some(forge) = inner.forge.clone().or_else(|| guess(http))
        {
            let known = forge.sizes(http, tree, wanted).await;
            if let Some(reason) = known.trouble {
                advice = format!("{}: {reason}", forge.kind.name());
            }
            let (found, all) = (known.sizes.len(), wanted.len());
            if found > 0 {
                let advice = (found < all).then_some(advice);
                let known = known.sizes.into_iter().collect();
                return Ok(outcome(forge.kind.name(), wanted, known, advice));
            }
        }
    }
    Ok(outcome("nobody", wanted, Vec::new(), Some(advice)))
}

fn outcome(
    how: &'static str,
    wanted: &[ObjectId],
    known: Vec<(ObjectId, u64)>,
    advice: Option<String>,
) -> SizesOutcome {
    let unknown = if known.len() == wanted.len() {
        Vec::new()
    } else {
        let known: HashSet<_> = known.iter().map(|(id, _)| id).collect();
        wanted.iter().filter(|id| !known.contains(id)).copied().collect()
    };
    SizesOutcome { known, unknown, how, advice }
}
