//! Against real git, over real sockets.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use crate::object::ObjectId;
use crate::source::{Content, Sink};

/// Keeps everything in memory.
#[derive(Debug, Default)]
pub struct Collect {
    pub objects: HashMap<ObjectId, Vec<u8>>,
    /// Objects that came through a file.
    pub spooled: usize,
    /// Files that were asked for.
    pub spools: usize,
    pub received: u64,
}

impl Sink for Collect {
    fn object(&mut self, key: ObjectId, content: Content) -> io::Result<()> {
        let bytes = match content {
            Content::Memory(bytes) => bytes,
            Content::Spooled { file, len } => {
                self.spooled += 1;
                let bytes = read_spooled(file)?;
                assert_eq!(bytes.len() as u64, len);
                bytes
            }
        };
        assert!(self.objects.insert(key, bytes).is_none(), "{key} given twice");
        Ok(())
    }

    fn spool(&mut self) -> io::Result<File> {
        self.spools += 1;
        tempfile::tempfile()
    }

    fn received(&mut self, bytes: u64) {
        self.received += bytes;
    }
}

pub fn read_spooled(mut file: File) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}
