use std::fs;
use std::time::Duration;

use super::*;

const LIMIT: Duration = Duration::from_secs(60);

async fn next(watched: &mut Watched) -> Change {
    tokio::time::timeout(LIMIT, watched.next()).await.expect("nothing was told")
}

async fn nothing(watched: &mut Watched) {
    // what is written to the other file later has arrived by then
    assert!(tokio::time::timeout(Duration::from_millis(50), watched.next()).await.is_err());
}

#[tokio::test]
async fn changes_and_the_end_of_a_file() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    fs::write(&path, "a").unwrap();
    let watcher = Watcher::new().unwrap();
    let mut file = watcher.file(&path).unwrap();
    let mut above = watcher.directory(root.path()).unwrap();
    nothing(&mut file).await;
    fs::write(&path, "b").unwrap();
    assert_eq!(next(&mut file).await, Change::Modified);
    nothing(&mut above).await;
    fs::remove_file(&path).unwrap();
    assert_eq!(next(&mut above).await, Change::Modified);
    // the write was two changes, the second of which may not have been told
    while next(&mut file).await != Change::Gone {}
    assert_eq!(next(&mut file).await, Change::Gone);
    assert_eq!(watcher.watches(), 1);
    drop(file);
    drop(above);
    assert_eq!(watcher.watches(), 0);
}

#[tokio::test]
async fn any_number_of_changes_are_one() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    fs::write(&path, "").unwrap();
    let watcher = Watcher::new().unwrap();
    let mut file = watcher.file(&path).unwrap();
    for n in 0..1000 {
        fs::write(&path, n.to_string()).unwrap();
    }
    // one, or two if the reader looked in between; the last is after the last write
    assert_eq!(next(&mut file).await, Change::Modified);
    while tokio::time::timeout(Duration::from_millis(50), file.next()).await.is_ok() {}
    fs::write(&path, "end").unwrap();
    assert_eq!(next(&mut file).await, Change::Modified);
}

#[tokio::test]
async fn one_kernel_watch_for_all_who_ask() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    fs::write(&path, "").unwrap();
    let watcher = Watcher::new().unwrap();
    let mut first = watcher.file(&path).unwrap();
    let second = watcher.file(&path).unwrap();
    assert_eq!(watcher.watches(), 1);
    drop(second);
    assert_eq!(watcher.watches(), 1);
    fs::write(&path, "x").unwrap();
    assert_eq!(next(&mut first).await, Change::Modified);
    drop(first);
    assert_eq!(watcher.watches(), 0);
    // a new watch is nobody's old one
    let mut third = watcher.file(&path).unwrap();
    nothing(&mut third).await;
    fs::write(&path, "y").unwrap();
    assert_eq!(next(&mut third).await, Change::Modified);
}

#[tokio::test]
async fn what_is_not_there_can_not_be_watched() {
    let watcher = Watcher::new().unwrap();
    let error = watcher.file(Path::new("/nonexistent/file")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(watcher.directory(Path::new("/proc/self/status")).is_err());
    assert_eq!(watcher.watches(), 0);
}
