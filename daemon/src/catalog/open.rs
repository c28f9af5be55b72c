//! Opening the database, or what is done about one that is damaged.

use std::ffi::OsString;
use std::fs::Permissions;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::sequence::Used;
use super::{CatalogError, schema};

pub(super) fn open(path: &Path) -> Result<Connection, CatalogError> {
    match try_open(path) {
        Err(error) if is_damage(&error) => {
            let aside = set_aside(path)?;
            tracing::error!(
                catalog = %path.display(), aside = %aside.display(), reason = ?error,
                "the catalog is damaged; it was moved aside and a new one begun. Trees that were \
                 mounted are not known any more; what was changed in them is still in mounts/*/upper"
            );
            try_open(path)
        }
        result => result,
    }
}

fn try_open(path: &Path) -> Result<Connection, CatalogError> {
    let failed = |source| CatalogError::Open { path: path.to_owned(), source };
    make_private(path)?;
    let mut connection = Connection::open(path).map_err(failed)?;
    connection.busy_timeout(Duration::from_secs(5)).map_err(failed)?;
    let version = version(&connection, path)?;
    let verdict: String =
        connection.pragma_query_value(None, "quick_check", |row| row.get(0)).map_err(failed)?;
    if verdict != "ok" {
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
        return Err(failed(rusqlite::Error::SqliteFailure(code, Some(verdict))));
    }
    connection.pragma_update(None, "journal_mode", "wal").map_err(failed)?;
    connection.pragma_update(None, "synchronous", "full").map_err(failed)?;
    connection.pragma_update(None, "foreign_keys", "on").map_err(failed)?;
    schema::migrations()
        .to_latest(&mut connection)
        .map_err(|source| CatalogError::Migrate { path: path.to_owned(), source })?;
    if version == 0 {
        let state = path.parent().unwrap_or(Path::new("."));
        Used::find(state)?.skip(&connection).map_err(failed)?;
    }
    Ok(connection)
}

/// A catalog that another process may be using.
fn open_to_read(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    Ok(connection)
}

pub(super) fn directories(path: &Path) -> Result<Vec<(String, PathBuf)>, CatalogError> {
    let read = || {
        let connection = open_to_read(path)?;
        let mut mounts = connection.prepare("SELECT id, directory FROM mounts")?;
        let rows = mounts.query_map([], |row| {
            let directory = OsString::from_vec(row.get(1)?);
            Ok((row.get::<_, i64>(0)?.to_string(), PathBuf::from(directory)))
        })?;
        rows.collect::<rusqlite::Result<Vec<_>>>()
    };
    read().map_err(|source| CatalogError::Open { path: path.to_owned(), source })
}

/// Looks at the version of a catalog that may be in use.
pub(super) fn check(path: &Path) -> Result<(), CatalogError> {
    if !path.exists() {
        return Ok(());
    }
    let failed = |source| CatalogError::Open { path: path.to_owned(), source };
    version(&open_to_read(path).map_err(failed)?, path).map(drop)
}

/// 0: it is new. An error where a later program has written it.
fn version(connection: &Connection, path: &Path) -> Result<i64, CatalogError> {
    let path = path.to_owned();
    match connection.pragma_query_value(None, "user_version", |row| row.get(0)) {
        Ok(found) if found > schema::VERSION => Err(CatalogError::Newer { path, found }),
        Ok(found) => Ok(found),
        Err(source) => Err(CatalogError::Open { path, source }),
    }
}

/// The catalog knows users' environments and credentials: only root reads it. SQLite gives its
/// other files the mode of this one.
fn make_private(path: &Path) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
}

/// Damage in the file, as opposed to trouble with the disk or the machine, which a new file does
/// not cure.
fn is_damage(error: &CatalogError) -> bool {
    let source = match error {
        CatalogError::Open { source, .. } => source,
        CatalogError::Migrate { source, .. } => match source {
            rusqlite_migration::Error::RusqliteError { err, .. } => err,
            rusqlite_migration::Error::InvalidUserVersion
            | rusqlite_migration::Error::ForeignKeyCheck(_) => return true,
            _ => return false,
        },
        _ => return false,
    };
    matches!(source.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let aside = with_suffix(path, &format!(".damaged-{seconds}"));
    fs::rename(path, &aside)?;
    // Whoever looks into the damage needs these as well.
    for suffix in ["-wal", "-shm"] {
        match fs::rename(with_suffix(path, suffix), with_suffix(&aside, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(aside)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
