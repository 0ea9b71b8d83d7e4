//! A disk: read whole once while the guest runs, then by what changed.
//!
//! The first copy reads the disk node itself through QEMU's NBD server, after a
//! dirty bitmap began to record: what the guest writes meanwhile is in the
//! bitmap and comes with the next cut. At a cut the disk is read from a fleece,
//! a copy-before-write image that shows the instant while the guest runs on
//! (or, of a held guest, from the node itself).

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex};
use serde_json::json;

use super::super::{DiskInstant, GuestError, Sink};
use super::lost::Lost;
use super::nbd_client::{ALLOCATION, NbdClient, READS_ZERO};
use super::qmp::Qmp;

use super::tracking::{Chain, PREFIX};
use super::units::{Hasher, hand_over};

/// Bytes of disk between two steps of noted progress.
const WINDOW: u64 = 64 << 20;
/// Bytes of disk whose changed extents are asked for at once.
const CHANGED_WINDOW: u64 = 1 << 30;
/// How long QEMU's NBD server may be silent: its storage may be slow.
const SILENCE: Duration = Duration::from_secs(60);

/// One disk of the guest.
pub(super) struct Disk {
    pub(super) volume: VolumeIndex,
    pub(super) node: String,
    pub(super) bytes: u64,
    pub(super) chain: Chain,
    /// First unit that was never handed over.
    pub(super) next: u64,
    /// What the peer holds, where it is to be compared instead of copied.
    pub(super) compare: Option<Arc<Vec<Digest>>>,
    /// The peer has a sealed point with all of this disk.
    pub(super) established: bool,
    /// But for these, which were damaged there.
    pub(super) lost: Lost,
}

impl Disk {
    pub(super) fn new(volume: VolumeIndex, node: &str, replica: &str, bytes: u64) -> Self {
        let chain = Chain::new(node, replica, bytes);
        let node = node.to_owned();
        Self {
            volume,
            node,
            bytes,
            chain,
            next: 0,
            compare: None,
            established: false,
            lost: Lost::default(),
        }
    }

    pub(super) fn units(&self) -> u64 {
        self.bytes.div_ceil(UNIT as u64)
    }

    pub(super) fn export(&self) -> String {
        format!("{PREFIX}disk-{}", self.volume)
    }

    pub(super) fn fleece(&self) -> String {
        format!("{PREFIX}fleece-{}", self.volume)
    }

    pub(super) fn fleece_file(&self) -> String {
        format!("{PREFIX}file-{}", self.volume)
    }

    /// What keeps for the fleece what the guest overwrites, between it and the disk.
    pub(super) fn filter(&self) -> String {
        format!("{PREFIX}filter-{}", self.volume)
    }

    pub(super) fn job(&self) -> String {
        format!("{PREFIX}job-{}", self.volume)
    }

    /// The disk is at the peer as a whole, as of some sealed point.
    pub(super) fn establish(&mut self) {
        self.next = self.units();
        self.compare = None;
        self.established = true;
    }

    /// A reader of `node` (the disk or its fleece), exported for it.
    pub(super) fn open(
        &self,
        qmp: &mut Qmp,
        node: &str,
        bitmap: Option<&str>,
        view: &View,
    ) -> Result<DiskReader, GuestError> {
        let name = self.export();
        let mut export =
            json!({"type": "nbd", "id": name, "node-name": node, "name": name, "writable": false});
        if let Some(bitmap) = bitmap {
            export["bitmaps"] = json!([{"node": self.node, "name": bitmap}]);
        }
        qmp.execute("block-export-add", export)?;
        Ok(DiskReader {
            view: view.clone(),
            export: name,
            volume: self.volume,
            bytes: self.bytes,
            looked: 0,
        })
    }
}

/// What every reader of a guest's disks needs.
#[derive(Clone)]
pub(super) struct View {
    pub(super) socket: PathBuf,
    pub(super) work_dir: PathBuf,
    pub(super) hasher: Hasher,
    /// Bytes that must stay free beside the fleeces.
    pub(super) reserve: u64,
}

impl View {
    /// A full fleece would fail the guest's writes: the cut is given up before.
    pub(super) fn room(&self) -> Result<(), GuestError> {
        let free = free_bytes(&self.work_dir)?;
        if free < self.reserve {
            return Err(GuestError::State(format!(
                "only {} MiB are free at {}, where disk writes go during a cut; {} MiB are needed. Free some, or name another run directory; the guest runs on",
                free >> 20,
                self.work_dir.display(),
                self.reserve >> 20
            )));
        }
        Ok(())
    }
}

fn free_bytes(dir: &Path) -> Result<u64, GuestError> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| GuestError::Io {
        what: format!("asking for the room at {}", dir.display()),
        source: e.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Reads one export.
pub(super) struct DiskReader {
    view: View,
    export: String,
    volume: VolumeIndex,
    bytes: u64,
    looked: u64,
}

impl DiskReader {
    fn connect(&self, context: &str) -> Result<NbdClient, GuestError> {
        let client = NbdClient::connect(&self.view.socket, &self.export, &[context], SILENCE)?;
        if client.size() != self.bytes {
            return Err(GuestError::State(format!(
                "a disk has {} bytes, but had {} when protection began; was it resized? Run farhaven unprotect, then protect it anew",
                client.size(),
                self.bytes
            )));
        }
        Ok(client)
    }

    /// Hands over all units from `next` on which the peer is not known to hold,
    /// and moves `next`.
    pub(super) fn copy(
        &mut self,
        next: &mut u64,
        compare: Option<&[Digest]>,
        sink: &mut dyn Sink,
    ) -> Result<(), GuestError> {
        let mut client = self.connect(ALLOCATION)?;
        let volume = self.volume;
        let differs = |unit: u64, digest: Digest| match compare {
            Some(held) => held.get(unit as usize) != Some(&digest),
            None => digest != Digest::ZERO_UNIT,
        };
        let mut at = *next * UNIT as u64;
        while at < self.bytes {
            let end = (at + WINDOW).min(self.bytes);
            let extents = client.extents(at..end)?;
            let data = whole_units(
                extents
                    .iter()
                    .filter(|e| e.flags & READS_ZERO == 0)
                    .map(|e| e.offset..e.offset + e.length),
                self.bytes,
            );
            if let Some(held) = compare {
                for gap in gaps(&data, at..end) {
                    zeros(sink, volume, held, gap)?;
                }
            }
            self.read(&mut client, data, sink, &differs)?;
            *next = end.div_ceil(UNIT as u64);
            sink.progress(end, self.bytes);
            at = end;
        }
        client.disconnect();
        Ok(())
    }

    /// Hands over what `bitmap` has as changed in the first `units` units.
    fn changes(&mut self, bitmap: &str, units: u64, sink: &mut dyn Sink) -> Result<(), GuestError> {
        let mut client = self.connect(&format!("qemu:dirty-bitmap:{bitmap}"))?;
        let stop = self.bytes.min(units.saturating_mul(UNIT as u64));
        let mut at = 0;
        while at < stop {
            let end = (at + CHANGED_WINDOW).min(stop);
            let extents = client.extents(at..end)?;
            let dirty = whole_units(
                extents
                    .iter()
                    .filter(|e| e.flags != 0)
                    .map(|e| e.offset..e.offset + e.length),
                self.bytes,
            );
            self.read(&mut client, dirty, sink, &|_, _| true)?;
            sink.progress(end, self.bytes);
            at = end;
        }
        client.disconnect();
        Ok(())
    }

    /// Hands over these units as they are, whatever the peer holds.
    fn again(&mut self, units: &[Range<u64>], sink: &mut dyn Sink) -> Result<(), GuestError> {
        if units.is_empty() {
            return Ok(());
        }
        let mut client = self.connect(ALLOCATION)?;
        let bytes = units
            .iter()
            .map(|units| units.start * UNIT as u64..units.end * UNIT as u64);
        let ranges = whole_units(bytes, self.bytes);
        self.read(&mut client, ranges, sink, &|_, _| true)?;
        client.disconnect();
        Ok(())
    }

    fn read(
        &mut self,
        client: &mut NbdClient,
        ranges: Vec<Range<u64>>,
        sink: &mut dyn Sink,
        wanted: &dyn Fn(u64, Digest) -> bool,
    ) -> Result<(), GuestError> {
        let (view, volume, looked) = (&self.view, self.volume, &mut self.looked);
        let mut digests = Vec::new();
        let mut padded = Vec::new();
        client.read_ranges(ranges, |offset, bytes| {
            *looked += bytes.len() as u64;
            if *looked >= 16 << 20 {
                *looked = 0;
                view.room()?;
            }
            let bytes = if bytes.len() % UNIT == 0 {
                bytes
            } else {
                padded.clear();
                padded.extend_from_slice(bytes);
                padded.resize(bytes.len().next_multiple_of(UNIT), 0);
                &padded
            };
            digests.clear();
            view.hasher.digests(bytes, &mut digests);
            hand_over(sink, volume, offset / UNIT as u64, bytes, &digests, wanted)?;
            Ok::<(), GuestError>(())
        })
    }
}

/// Ranges widened to whole units and merged; the last may end at the disk's end.
fn whole_units(ranges: impl Iterator<Item = Range<u64>>, size: u64) -> Vec<Range<u64>> {
    let unit = UNIT as u64;
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.filter(|r| !r.is_empty()) {
        let start = range.start / unit * unit;
        let end = range.end.next_multiple_of(unit).min(size);
        match merged.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => merged.push(start..end),
        }
    }
    merged
}

/// What lies between `ranges` in `window`.
fn gaps(ranges: &[Range<u64>], window: Range<u64>) -> Vec<Range<u64>> {
    let mut gaps = Vec::new();
    let mut at = window.start;
    for range in ranges {
        if range.start > at {
            gaps.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < window.end {
        gaps.push(at..window.end);
    }
    gaps
}

/// Hands over the units of a hole that the peer holds as something else.
fn zeros(
    sink: &mut dyn Sink,
    volume: VolumeIndex,
    held: &[Digest],
    hole: Range<u64>,
) -> Result<(), GuestError> {
    let unit = UNIT as u64;
    let end = hole.end.div_ceil(unit);
    let differs = |u: u64| {
        held.get(u as usize)
            .is_some_and(|d| *d != Digest::ZERO_UNIT)
    };
    let mut at = hole.start / unit;
    while at < end {
        let count = (at..end).take_while(|u| differs(*u)).count() as u64;
        if count > 0 {
            sink.zeros(volume, at, count)?;
        }
        at += count.max(1);
    }
    Ok(())
}

/// A disk as it was at a cut.
pub(super) struct Instant {
    pub(super) reader: DiskReader,
    /// What changed up to the cut.
    pub(super) bitmap: String,
    /// First unit that was not copied before: from there on all is handed over.
    pub(super) next: u64,
    pub(super) compare: Option<Arc<Vec<Digest>>>,
    /// Units that the peer lost: handed over, changed or not.
    pub(super) lost: Vec<Range<u64>>,
}

impl DiskInstant for Instant {
    fn volume(&self) -> VolumeIndex {
        self.reader.volume
    }

    fn changed(&mut self, sink: &mut dyn Sink) -> Result<(), GuestError> {
        self.reader.view.room()?;
        if self.next > 0 {
            self.reader.changes(&self.bitmap, self.next, sink)?;
        }
        let mut next = self.next;
        self.reader
            .copy(&mut next, self.compare.as_ref().map(|c| c.as_slice()), sink)?;
        self.reader.again(&self.lost, sink)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whole_units_and_gaps_cover_the_window_once(
            lengths in proptest::collection::vec((any::<bool>(), 1_u64..30_000), 1..40),
        ) {
            let mut at = 0;
            let mut wanted = Vec::new();
            for (data, length) in lengths {
                if data {
                    wanted.push(at..at + length);
                }
                at += length;
            }
            let data = whole_units(wanted.iter().cloned(), at);
            let between = gaps(&data, 0..at);
            let mut all: Vec<_> = data.iter().chain(&between).cloned().collect();
            all.sort_by_key(|r| r.start);
            let mut reached = 0;
            for range in &all {
                prop_assert_eq!(range.start, reached);
                prop_assert_eq!(range.start % UNIT as u64, 0);
                reached = range.end;
            }
            prop_assert_eq!(reached, at);
            for range in wanted {
                prop_assert!(data.iter().any(|d| d.start <= range.start && range.end <= d.end));
            }
        }
    }
}
