//! The floor: what zstd-3 makes of the distinct non-zero units, in groups of 64.
//!
//! Nothing that copies units whole can be much smaller, so what went over the
//! wire is measured against it. Content told by [`Floor::known`] does not
//! count: what the peer holds already.

use std::collections::HashSet;
use std::io;

use zstd::bulk::Compressor;

use crate::digest::{DigestKey, is_zero};
use crate::unit::{Digest, GROUP, UNIT};

/// Collects units and computes their floor.
pub struct Floor {
    key: DigestKey,
    seen: HashSet<Digest>,
    group: Vec<u8>,
    compressor: Compressor<'static>,
    distinct: u64,
    bytes: u64,
}

impl std::fmt::Debug for Floor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Floor({} distinct units)", self.distinct)
    }
}

impl Floor {
    /// An empty one.
    ///
    /// # Errors
    /// When there is no memory for the compressor.
    pub fn new() -> io::Result<Floor> {
        Ok(Floor {
            key: DigestKey::random(),
            seen: HashSet::new(),
            group: Vec::with_capacity(GROUP * UNIT),
            compressor: Compressor::new(3)?,
            distinct: 0,
            bytes: 0,
        })
    }

    /// Content that is there already: it will not count.
    pub fn known(&mut self, unit: &[u8]) {
        self.seen.insert(self.key.of(unit));
    }

    /// Counts a unit (4 KiB; the last of a file is padded by the caller).
    ///
    /// # Errors
    /// When the compressor fails.
    pub fn unit(&mut self, unit: &[u8]) -> io::Result<()> {
        if is_zero(unit) || !self.seen.insert(self.key.of(unit)) {
            return Ok(());
        }
        self.distinct += 1;
        self.group.extend_from_slice(unit);
        if self.group.len() >= GROUP * UNIT {
            self.close()
        } else {
            Ok(())
        }
    }

    fn close(&mut self) -> io::Result<()> {
        self.bytes += self.compressor.compress(&self.group)?.len() as u64;
        self.group.clear();
        Ok(())
    }

    /// Distinct non-zero units so far.
    pub fn distinct(&self) -> u64 {
        self.distinct
    }

    /// Their floor in bytes. Ends the open group.
    ///
    /// # Errors
    /// When the compressor fails.
    pub fn bytes(&mut self) -> io::Result<u64> {
        if !self.group.is_empty() {
            self.close()?;
        }
        Ok(self.bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn repeats_zeros_and_known_units_are_free() {
        let mut floor = Floor::new().unwrap();
        let unit = |of: u8| [of; UNIT];
        floor.known(&unit(9));
        for of in [0, 1, 2, 1, 9, 0, 2] {
            floor.unit(&unit(of)).unwrap();
        }
        assert_eq!(floor.distinct(), 2);
        let group = [unit(1), unit(2)].concat();
        let expected = zstd::bulk::compress(&group, 3).unwrap().len() as u64;
        assert_eq!(floor.bytes().unwrap(), expected);
        assert_eq!(floor.bytes().unwrap(), expected);
    }
}
