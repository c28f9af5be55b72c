//! Where the importer puts objects that come in.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Seek, Write};

use crate::importer::Importer;
use crate::object::ObjectId;
use crate::source::{Content, Sink};

/// Learns the sizes of blobs, passes the content of files on to the builder, and keeps some in
/// memory. An object that comes twice is taken once.
#[derive(Debug)]
pub struct Collector<'a, W> {
    importer: &'a mut Importer<W>,
    keep: HashSet<ObjectId>,
    memory: HashMap<ObjectId, Vec<u8>>,
}

impl<'a, W: Write + Send> Collector<'a, W> {
    pub fn new(importer: &'a mut Importer<W>, keep: HashSet<ObjectId>) -> Self {
        Self { importer, keep, memory: HashMap::new() }
    }

    /// What was to be kept in memory. An object too large for that is not there.
    pub fn finish(self) -> HashMap<ObjectId, Vec<u8>> {
        self.memory
    }
}

impl<W: Write + Send> Sink for Collector<'_, W> {
    fn object(&mut self, key: ObjectId, content: Content) -> io::Result<()> {
        let len = match &content {
            Content::Memory(bytes) => bytes.len() as u64,
            Content::Spooled { len, .. } => *len,
        };
        let is_file = self.importer.blobs.has(&key);
        self.importer.know(&key, len);
        let pass_on = is_file && self.importer.kept.insert(key);
        match content {
            Content::Memory(bytes) => {
                if pass_on {
                    self.importer.contents.object(&key, len, &bytes[..])?;
                }
                if self.keep.contains(&key) {
                    self.memory.insert(key, bytes);
                }
            }
            Content::Spooled { mut file, .. } => {
                if pass_on {
                    file.rewind()?;
                    self.importer.contents.object(&key, len, file)?;
                }
            }
        }
        Ok(())
    }

    fn spool(&mut self) -> io::Result<File> {
        (self.importer.spool.0)()
    }

    fn received(&mut self, _bytes: u64) {}
}
