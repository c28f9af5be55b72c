//! A layer's pool together with its source, which can't decode any part of the layer by itself.

use crate::range::ByteRange;
use crate::source::Fetch;
use crate::worker::ObjectNo;
use crate::worker::engine::Shelf;
use crate::worker::pool::{Pool, PoolError};
use crate::worker::readahead::Info;

/// See [`Shelf`].
#[derive(Debug)]
pub(super) struct Layered<'a, F> {
    pub(super) pool: &'a mut Pool,
    pub(super) source: &'a F,
}

impl<F: Fetch> Shelf for Layered<'_, F> {
    fn len(&self) -> u32 {
        Pool::len(self.pool)
    }

    fn info(&mut self, no: ObjectNo) -> Option<Info> {
        Shelf::info(self.pool, no)
    }

    fn is_present(&mut self, no: ObjectNo) -> bool {
        Shelf::is_present(self.pool, no)
    }

    fn along(&mut self, objects: &[ObjectNo], behind: u64) -> Vec<(ObjectNo, u64)> {
        let mut found = Vec::new();
        let runs: Vec<_> = objects.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)).collect();
        // between several places nothing more is to come
        let behind = if runs.len() == 1 { behind } else { 0 };
        for run in runs {
            match self.along_run(run, behind) {
                Ok(others) => found.extend(others),
                Err(error) => tracing::debug!(%error, "can't look at a segment"),
            }
        }
        found.retain(|(no, _)| !objects.contains(no));
        found.dedup();
        found
    }
}

impl<F: Fetch> Layered<'_, F> {
    /// Those that are decoded whole with the run and with so many bytes behind it.
    fn along_run(
        &mut self,
        run: &[ObjectNo],
        behind: u64,
    ) -> Result<Vec<(ObjectNo, u64)>, PoolError> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(Vec::new()) };
        let (Some(start), Some(end)) = (self.pool.object(*first)?, self.pool.object(*last)?) else {
            return Ok(Vec::new());
        };
        let Some(segment) = self.pool.segment_of(*first).map(|segment| segment.id) else {
            return Ok(Vec::new());
        };
        let size = self.pool.extents(segment)?.size();
        let asked = |end| ByteRange::between(start.range.offset(), end).clamp(size);
        let Some(mut decoded) = self.source.decoded_with(asked(end.range.end())) else {
            return Ok(Vec::new());
        };
        // nobody waits for a long span of which hardly anything was wanted
        let further = self.source.decoded_with(asked(end.range.end() + behind));
        if let Some(further) = further.filter(|of| of.len() <= decoded.len() + 2 * behind) {
            decoded = further;
        }
        let extents = self.pool.extents(segment)?;
        let mut others = Vec::new();
        for record in extents.overlapping(decoded) {
            let Some(extent) = extents.get(record) else { continue };
            let whole = decoded.offset() <= extent.range.offset()
                && extent.range.end() <= decoded.end()
                && !extent.range.is_empty();
            let no = self.pool.number(segment, u32::try_from(record).unwrap_or(u32::MAX))?;
            if whole && !run.contains(&no) && !self.pool.is_present(no)? {
                others.push((no, extent.size));
            }
        }
        Ok(others)
    }
}
