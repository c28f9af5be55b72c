//! Sources: where content comes from.
//!
//! A source fetches objects by key, several in one request, and hands over each as soon as it has
//! been *verified*: nothing that a source hands over is ever wrong. Scheduling, batching and
//! retrying are the worker's business, not the source's.

pub mod git;
pub mod oci;

use std::fs::File;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::object::ObjectId;
use crate::range::ByteRange;

/// Content larger than this many bytes does not stay in memory but goes through a spool file.
pub const SPOOL_FROM: u64 = 8 << 20;

/// One verified object.
#[derive(Debug)]
pub enum Content {
    Memory(Vec<u8>),
    /// An unlinked file with `len` bytes, from its start.
    Spooled {
        file: File,
        len: u64,
    },
}

/// Where a source puts what it fetched. Calls are short and don't wait for the network.
pub trait Sink: Send {
    /// An object, verified. An error ends the request ([`FetchError::Sink`]).
    fn object(&mut self, key: ObjectId, content: Content) -> io::Result<()>;
    /// A new unlinked file for an object larger than [`SPOOL_FROM`].
    fn spool(&mut self) -> io::Result<File>;
    /// So many bytes have just come in from the origin. Also the sign that it is not stalled.
    fn received(&mut self, bytes: u64);
    /// So many bytes of a request's body have gone out, compressed if it was. Told again for one that
    /// is sent again.
    fn sent(&mut self, bytes: u64) {
        let _ = bytes;
    }
}

/// Why a request failed. Objects that were handed over before stay valid.
#[derive(Debug, Error)]
pub enum FetchError {
    /// Try again: connection refused or reset, 5xx, 429, cut short, stalled.
    #[error("{message}")]
    Retry {
        message: String,
        /// What the origin asked for (`Retry-After`).
        after: Option<Duration>,
    },
    /// The origin says no, also after asking for credentials anew: 401, 403, 404.
    #[error("{message}")]
    Refused { message: String },
    /// Nothing of the origin's can be asked for by its id: its protocol is too old for that.
    #[error("{message}")]
    Unable { message: String },
    /// The origin says that it doesn't have the object, or doesn't give it to those who ask for it by its id:
    /// its words are the same.
    #[error("the origin does not give object {key}: {message}")]
    Missing { key: ObjectId, message: String },
    /// What came is not what was asked for: a wrong object, a damaged pack. Worth one or two more
    /// tries, never data.
    #[error("the origin sent wrong data: {message}")]
    Wrong { message: String },
    /// What was fetched could not be written.
    #[error("can't keep what was fetched")]
    Sink(#[source] io::Error),
}

/// An origin, ready to be asked. Cheap to share; requests run side by side.
pub trait Fetch: Send + Sync + 'static {
    /// Fetches the objects in one request. Each is given to `sink` once, in any order; objects that
    /// the origin sent unasked are dropped. `Ok` only when all that were asked for were given.
    ///
    /// Cancelled by dropping the future.
    fn fetch(
        &self,
        keys: &[ObjectId],
        sink: &mut dyn Sink,
    ) -> impl Future<Output = Result<(), FetchError>> + Send;

    /// A segment was attached that has an access index: its extent index, and that.
    fn attach(&self, extents: Arc<File>, access: Arc<File>) {
        let _ = (extents, access);
    }

    /// What of the segment is decoded anyway when this range of it is asked for, if that is known by now. Needs no network.
    fn decoded_with(&self, range: ByteRange) -> Option<ByteRange> {
        let _ = range;
        None
    }
}
