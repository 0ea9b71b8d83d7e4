//! A disk as it was at a cut, while its guest writes on: what the cut has still
//! to read and the guest is about to overwrite is kept in memory first, up to a
//! limit. Past the limit the instant is lost, and the guest still never waits.
//!
//! A reader takes no lock while it reads: it reads the image, and then looks
//! which of these units were kept. A write keeps before it writes, so what was
//! read of any other unit is the instant's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use farhaven_storage_sync::unit::UNIT;

use super::{Below, State, TrackedDisk, parts, slice};
use crate::guest::embedded::Bitmap;

/// What the disk keeps for the reader of an instant.
pub(super) struct Frozen {
    number: u64,
    set: Arc<Bitmap>,
    /// Units before this one were read and are kept no more.
    from: u64,
    kept: BTreeMap<u64, Box<[u8]>>,
    kept_bytes: usize,
    limit: usize,
    lost: Option<String>,
    /// As it was: units that the image did not hold are read from there.
    below: Option<Arc<Below>>,
}

/// A disk at an instant: only the units of [`View::set`] can be read, each
/// until it was given up with [`View::read_until`]. Dropping it ends the instant.
pub struct View {
    disk: Arc<TrackedDisk>,
    number: u64,
    set: Arc<Bitmap>,
    below: Option<Arc<Below>>,
}

impl TrackedDisk {
    /// Fixes this instant: `owed` and what was written since the last call of
    /// this or of [`TrackedDisk::take_changed`] stay readable as they are now,
    /// as long as no more than `limit` bytes have to be kept for it. An
    /// instant that was fixed before ends.
    pub fn freeze(self: &Arc<Self>, mut owed: Bitmap, limit: usize) -> View {
        let mut state = self.state();
        owed.merge(&state.changed.take());
        let set = Arc::new(owed);
        state.instants += 1;
        let (number, below) = (state.instants, state.below.clone().map(Arc::new));
        state.frozen = Some(Frozen {
            number,
            set: set.clone(),
            from: 0,
            kept: BTreeMap::new(),
            kept_bytes: 0,
            limit,
            lost: None,
            below: below.clone(),
        });
        View {
            disk: self.clone(),
            number,
            set,
            below,
        }
    }
}

impl State {
    /// Keeps what an instant has still to read of `units`, which are about to be written.
    pub(super) fn keep(&mut self, image: &File, bytes: u64, units: Range<u64>) {
        let Some(frozen) = self.frozen.as_mut().filter(|f| f.lost.is_none()) else {
            return;
        };
        let mut at = units.start.max(frozen.from);
        while let Some((unit, _)) = frozen.set.run_from(at, 1)
            && unit < units.end
        {
            at = unit + 1;
            let below = frozen.below.as_ref();
            if frozen.kept.contains_key(&unit) || below.is_some_and(|b| !b.filled.contains(unit)) {
                continue;
            }
            let offset = unit * UNIT as u64;
            let mut content = vec![0; (UNIT as u64).min(bytes - offset) as usize];
            if frozen.kept_bytes + content.len() > frozen.limit {
                frozen.lose(format!(
                    "its guest overwrote more than the {} MiB that a cut keeps in memory before they were read",
                    frozen.limit >> 20
                ));
                return;
            }
            if let Err(error) = image.read_exact_at(&mut content, offset) {
                frozen.lose(format!("its image cannot be read: {error}"));
                return;
            }
            frozen.kept_bytes += content.len();
            frozen.kept.insert(unit, content.into_boxed_slice());
        }
    }
}

impl Frozen {
    fn lose(&mut self, why: String) {
        self.kept = BTreeMap::new();
        self.kept_bytes = 0;
        self.lost = Some(why);
    }
}

impl View {
    /// The units that can be read: what was owed, and what had changed.
    pub fn set(&self) -> &Arc<Bitmap> {
        &self.set
    }

    /// The disk's name.
    pub fn name(&self) -> &str {
        self.disk.name()
    }

    /// The disk's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    /// Bytes kept in memory now.
    pub fn kept_bytes(&self) -> usize {
        let state = self.disk.state();
        state.frozen.as_ref().map_or(0, |f| f.kept_bytes)
    }

    /// Reads units of the set from `unit` on, `into` being whole units: past
    /// the end of a disk whose last unit is partial are zeros.
    ///
    /// # Errors
    /// When the instant is lost or ended, or the disk cannot be read.
    pub fn read(&self, unit: u64, into: &mut [u8]) -> io::Result<()> {
        let start = unit * UNIT as u64;
        let end = (start + into.len() as u64).min(self.disk.bytes);
        let range = start..end.max(start);
        let (within, past) = into.split_at_mut((range.end - range.start) as usize);
        past.fill(0);
        match &self.below {
            None => self.disk.image.read_exact_at(within, start)?,
            Some(below) => {
                for (part, filled) in parts(&range, |unit| below.filled.contains(unit)) {
                    let into = slice(within, &range, &part)?;
                    if filled {
                        self.disk.image.read_exact_at(into, part.start)?;
                    } else {
                        below.source.read(part.start, into)?;
                    }
                }
            }
        }
        let state = self.disk.state();
        let frozen = self.frozen(&state)?;
        let units = unit..range.end.div_ceil(UNIT as u64);
        for (unit, content) in frozen.kept.range(units) {
            let at = (unit * UNIT as u64 - start) as usize;
            if let Some(place) = within.get_mut(at..at + content.len()) {
                place.copy_from_slice(content);
            }
        }
        Ok(())
    }

    /// Units before `unit` are not read any more.
    pub fn read_until(&self, unit: u64) {
        let mut state = self.disk.state();
        if let Some(frozen) = state.frozen.as_mut().filter(|f| f.number == self.number) {
            frozen.from = frozen.from.max(unit);
            let rest = frozen.kept.split_off(&unit);
            let gone: usize = frozen.kept.values().map(|c| c.len()).sum();
            frozen.kept = rest;
            frozen.kept_bytes -= gone;
        }
    }

    fn frozen<'a>(&self, state: &'a State) -> io::Result<&'a Frozen> {
        let frozen = state.frozen.as_ref().filter(|f| f.number == self.number);
        let frozen = frozen.ok_or_else(|| {
            io::Error::other(format!(
                "the instant of disk '{}' has ended; it comes with the next point",
                self.disk.name
            ))
        })?;
        match &frozen.lost {
            None => Ok(frozen),
            Some(why) => Err(io::Error::other(format!(
                "the instant of disk '{}' is lost, it comes with the next point: {why}",
                self.disk.name
            ))),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state
            .frozen
            .as_ref()
            .is_some_and(|f| f.number == self.number)
        {
            state.frozen = None;
        }
    }
}
