//! Many small files, quickly.

use anyhow::Result;

use super::{Change, Import, MAIN, Random, Repository, TOPIC, cached};

/// `files` files of 20 to 600 bytes, a hundred in a directory; [`TOPIC`] differs in 50 of them.
pub fn generated(files: usize) -> Result<Repository> {
    cached(&format!("generated-{files}-1"), "sha1", |path| {
        let mut random = Random::new(7);
        let mut import = Import::start(path)?;
        let name = |n: usize| format!("d{:03}/e{:02}/file-{n}.txt", n / 5000, n / 100 % 50);
        let mut changes = Vec::with_capacity(files);
        for n in 0..files {
            let filler = "0123456789abcdef ".repeat(random.below(35));
            let blob = import.blob(format!("file {n} {filler}\n").as_bytes())?;
            changes.push(Change::file(name(n), blob));
        }
        let first = import.commit(MAIN, None, &changes)?;
        let mut changes = Vec::new();
        for k in 0..50.min(files) {
            let n = k * files / 50.min(files);
            let blob = import.blob(format!("changed {n}\n").as_bytes())?;
            changes.push(Change::file(name(n), blob));
        }
        import.commit(TOPIC, Some(first), &changes)?;
        import.finish()
    })
}
