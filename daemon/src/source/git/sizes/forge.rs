//! Sizes from the API of a forge: GitHub, Gitea and Forgejo, Gitiles.

use std::collections::{HashMap, HashSet, VecDeque};

use reqwest::Url;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::object::ObjectId;
use crate::source::FetchError;
use crate::source::git::capabilities::Capabilities;
use crate::source::git::http::{Http, shown};
use crate::source::git::{refused, wrong};

/// No more requests than this for one tree: an anonymous user of GitHub has 60 an hour.
const REQUESTS: usize = 500;

/// The longest answer in bytes, unpacked.
const ANSWER: usize = 256 << 20;

/// Entries of a Gitea page; a server's own maximum may be lower.
const PAGE: usize = 1000;

/// The kinds of forges whose API tells sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForgeKind {
    /// `GET <api>/git/trees/<tree>?recursive=1`
    GitHub,
    /// The same in pages; Forgejo too.
    Gitea,
    /// `GET <api>/+/<tree>/?format=JSON&long=1`
    Gitiles,
}

impl ForgeKind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GitHub => "GitHub's API",
            Self::Gitea => "Gitea's API",
            Self::Gitiles => "Gitiles",
        }
    }

    /// What a user can do when it says no.
    fn remedy(self) -> &'static str {
        match self {
            Self::GitHub => {
                " (without a token GitHub answers 60 requests an hour, about public repositories; a \
                 token that git knows for the repository is used, if it is cloned over https)"
            }
            Self::Gitea | Self::Gitiles => "",
        }
    }
}

/// A repository's place in the API of its forge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forge {
    pub kind: ForgeKind,
    /// The repository's URL in the API, such as `https://api.github.com/repos/git/git`.
    pub api: Url,
}

/// What a forge told.
#[derive(Debug, Default)]
pub struct ForgeSizes {
    pub sizes: HashMap<ObjectId, u64>,
    /// Why it did not tell all.
    pub trouble: Option<String>,
}

/// A tree in the form of GitHub and Gitea.
#[derive(Debug, Deserialize)]
struct Tree {
    #[serde(default)]
    tree: Vec<TreeEntry>,
    #[serde(default)]
    truncated: bool,
    total_count: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct TreeEntry {
    r#type: String,
    sha: String,
    size: Option<u64>,
}

/// A tree in the form of Gitiles.
#[derive(Debug, Deserialize)]
struct GitilesTree {
    #[serde(default)]
    entries: Vec<GitilesEntry>,
}

#[derive(Debug, Deserialize)]
struct GitilesEntry {
    r#type: String,
    id: String,
    size: Option<u64>,
}

/// One tree's listing, in a common form.
struct Listing {
    blobs: Vec<(ObjectId, u64)>,
    subtrees: Vec<ObjectId>,
    complete: bool,
}

impl Forge {
    /// The forge that a URL and an agent suggest, if any.
    #[must_use]
    pub fn guess(repository: &Url, capabilities: &Capabilities) -> Option<Self> {
        let host = repository.host_str()?;
        let path = repository.path().trim_matches('/');
        let path = path.strip_suffix(".git").unwrap_or(path);
        let agent = capabilities.agent.as_deref().unwrap_or_default();
        let at = |kind, url: String| Some(Self { kind, api: Url::parse(&url).ok()? });
        let root = repository.origin().ascii_serialization();
        let named = |name: &str| host.split('.').any(|label| label == name);
        if host == "github.com" {
            at(ForgeKind::GitHub, format!("https://api.github.com/repos/{path}"))
        } else if agent.starts_with("git/github-") {
            at(ForgeKind::GitHub, format!("{root}/api/v3/repos/{path}"))
        } else if host.ends_with(".googlesource.com") {
            // authenticated URLs have an /a/ in front
            let path = path.strip_prefix("a/").unwrap_or(path);
            at(ForgeKind::Gitiles, format!("{root}/{path}"))
        } else if host == "codeberg.org" || named("gitea") || named("forgejo") {
            at(ForgeKind::Gitea, format!("{root}/api/v1/repos/{path}"))
        } else {
            None
        }
    }

    /// The sizes of the blobs of a tree, as many of `wanted` as the forge tells.
    pub(in crate::source::git) async fn sizes(
        &self,
        http: &Http,
        tree: ObjectId,
        wanted: &[ObjectId],
    ) -> ForgeSizes {
        let mut missing: HashSet<ObjectId> = wanted.iter().copied().collect();
        let mut found = ForgeSizes::default();
        let mut seen = HashSet::from([tree]);
        let mut trees = VecDeque::from([tree]);
        let mut requests = 0;
        while let Some(tree) = trees.pop_front() {
            if missing.is_empty() {
                break;
            }
            let listing = match self.list(http, tree, &mut requests).await {
                Ok(listing) => listing,
                Err(e) => {
                    found.trouble = Some(format!("{e}{}", self.kind.remedy()));
                    break;
                }
            };
            for (id, size) in listing.blobs {
                if missing.remove(&id) {
                    found.sizes.insert(id, size);
                }
            }
            if !listing.complete {
                trees.extend(listing.subtrees.into_iter().filter(|id| seen.insert(*id)));
            }
        }
        found
    }

    /// One tree with all below it; if that is too much for the forge, its own entries.
    async fn list(
        &self,
        http: &Http,
        tree: ObjectId,
        requests: &mut usize,
    ) -> Result<Listing, FetchError> {
        match self.kind {
            ForgeKind::GitHub => {
                let whole: Tree = self.get(http, tree, &["recursive=1"], requests).await?;
                if !whole.truncated {
                    return listing(whole.tree, true);
                }
                // Its subtrees one by one, besides what the cut listing has.
                let mut flat =
                    listing(self.get::<Tree>(http, tree, &[], requests).await?.tree, false)?;
                flat.blobs.extend(listing(whole.tree, false)?.blobs);
                Ok(flat)
            }
            ForgeKind::Gitea => {
                let mut all = Vec::new();
                for page in 1.. {
                    let (page, per_page) = (format!("page={page}"), format!("per_page={PAGE}"));
                    let query = ["recursive=true", &page, &per_page];
                    let some: Tree = self.get(http, tree, &query, requests).await?;
                    let last = some.tree.is_empty();
                    all.extend(some.tree);
                    // "truncated" means that there are more pages
                    let counted = some.total_count.is_some_and(|count| all.len() >= count);
                    if last || counted || !some.truncated {
                        break;
                    }
                }
                listing(all, true)
            }
            ForgeKind::Gitiles => {
                let query = ["format=JSON", "recursive=1", "long=1"];
                let tree: GitilesTree = self.get(http, tree, &query, requests).await?;
                let entries = tree.entries.into_iter().map(|entry| TreeEntry {
                    r#type: entry.r#type,
                    sha: entry.id,
                    size: entry.size,
                });
                listing(entries.collect(), true)
            }
        }
    }

    async fn get<T: DeserializeOwned>(
        &self,
        http: &Http,
        tree: ObjectId,
        query: &[&str],
        requests: &mut usize,
    ) -> Result<T, FetchError> {
        *requests += 1;
        if *requests > REQUESTS {
            return Err(refused(format!("the tree takes more than {REQUESTS} requests")));
        }
        let mut url = self.api.clone();
        let base = self.api.path().trim_end_matches('/');
        let path = match self.kind {
            ForgeKind::GitHub | ForgeKind::Gitea => format!("{base}/git/trees/{tree}"),
            ForgeKind::Gitiles => format!("{base}/+/{tree}/"),
        };
        url.set_path(&path);
        url.set_query((!query.is_empty()).then(|| query.join("&")).as_deref());
        let body = http.get(url.clone(), ANSWER).await?;
        // Gitiles puts this before its JSON, against scripts that include it
        let body = body.strip_prefix(b")]}'").unwrap_or(&body);
        serde_json::from_slice(body)
            .map_err(|e| wrong(format!("{} does not answer as expected: {e}", shown(&url))))
    }
}

fn listing(entries: Vec<TreeEntry>, complete: bool) -> Result<Listing, FetchError> {
    let (mut blobs, mut subtrees) = (Vec::new(), Vec::new());
    for entry in entries {
        let id = ObjectId::from_hex(entry.sha.as_bytes()).map_err(|e| wrong(e.to_string()))?;
        match (entry.r#type.as_str(), entry.size) {
            ("blob", Some(size)) => blobs.push((id, size)),
            ("tree", _) => subtrees.push(id),
            // a submodule, or a blob whose size is not told
            _ => {}
        }
    }
    Ok(Listing { blobs, subtrees, complete })
}
