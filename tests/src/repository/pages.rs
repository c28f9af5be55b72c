//! Files that lie close to each other.

use anyhow::Result;

use super::{Change, Import, MAIN, Random, Repository, TOPIC, cached};

/// Where file `n` of [`pages`] is.
#[must_use]
pub fn page_path(n: usize) -> String {
    format!("d{}/f{:02}", n / 100, n % 100)
}

/// 800 files of 4,096 random bytes, a hundred in a directory; four commits on [`MAIN`], the last three of which change
/// five files each, and [`TOPIC`], which differs from it in twenty: ten neighbours and ten far apart.
pub fn pages() -> Result<Repository> {
    cached("pages-1", "sha1", |path| {
        let mut random = Random::new(4096);
        let mut import = Import::start(path)?;
        let mut changes = |import: &mut Import, files: &[usize]| -> Result<Vec<Change>> {
            let change =
                |n: &usize| Ok(Change::file(page_path(*n), import.blob(&random.bytes(4096))?));
            files.iter().map(change).collect()
        };
        let all: Vec<usize> = (0..800).collect();
        let first = changes(&mut import, &all)?;
        let mut last = import.commit(MAIN, None, &first)?;
        for commit in 0..3 {
            let some: Vec<usize> = (0..5).map(|n| 700 + commit + 20 * n).collect();
            let changes = changes(&mut import, &some)?;
            last = import.commit(MAIN, None, &changes)?;
        }
        let near = 230..240;
        let far = (0..10).map(|n| 5 + 70 * n);
        let changes = changes(&mut import, &near.chain(far).collect::<Vec<_>>())?;
        import.commit(TOPIC, Some(last), &changes)?;
        import.finish()
    })
}
