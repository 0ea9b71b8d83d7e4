//! Changed units in, batches out.
//!
//! One encoder serves one guest's way to one point. Its batches come out in
//! the order of their numbers; encoders of other guests take numbers from the
//! same [`Sequence`] in between.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::codec::bases::Bases;
use crate::codec::batch::Batch;
use crate::codec::compress::Probe;
use crate::codec::dedup::DedupIndex;
use crate::codec::entry::{Content, Delta, Entry, EntryWriter};
use crate::codec::group::Group;
use crate::codec::pack::{Crew, Full, Packing, Tools};
use crate::codec::sequence::Sequence;
use crate::digest::is_zero;
use crate::limits::{
    BATCH_ENTRIES, BATCH_ENTRIES_BYTES, ENTRY_BYTES, IMAGE_SEQ, POINT, VOLUME_UNITS, VOLUMES,
};
use crate::unit::{Digest, GROUP, GuestId, Place, UNIT, VolumeIndex};

/// Levels below this one are for links faster than the encoder.
const HURRIED: i32 = 1;

/// Why units could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Units are handed over one by one.
    #[error("a unit has 4096 bytes, not {0}; this is a fault in the caller")]
    Length(usize),
    /// The volume or unit is beyond what a batch can name.
    #[error(
        "volume {volume}, units {unit}+{count} are beyond the limits of the format \
         ({VOLUMES} volumes of 4 PiB); exclude that disk from protection"
    )]
    Range {
        /// The volume.
        volume: VolumeIndex,
        /// First unit.
        unit: u64,
        /// Units.
        count: u64,
    },
    /// All numbers are used, or the point's number is out of range.
    #[error("batch or point numbers are used up; start with a new, empty store at the peer")]
    Numbers,
    /// No memory for the compressor.
    #[error("cannot start the compressor; free some memory and try again")]
    Compressor(#[source] io::Error),
}

/// The batch being filled.
struct Open {
    seq: u64,
    entries: EntryWriter,
    group: Group,
    digests: HashMap<Digest, u8>,
    units: u64,
    images: bool,
}

/// Encodes one guest's units for one point.
pub struct Encoder {
    guest: GuestId,
    point: u64,
    seqs: Arc<Sequence>,
    index: Arc<Mutex<DedupIndex>>,
    bases: Option<Arc<Mutex<Bases>>>,
    level: i32,
    /// Weighs differences.
    probe: Probe,
    /// For what is not packed beside.
    tools: Option<Tools>,
    crew: Option<Arc<Crew>>,
    /// Batches that may be with the crew.
    ahead: usize,
    alone: bool,
    /// Full batches that have not been returned, oldest first.
    packing: VecDeque<Packing>,
    open: Option<Open>,
    spare: Vec<Group>,
    compressing: Duration,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoder({} point {})", self.guest, self.point)
    }
}

impl Encoder {
    /// An encoder for `guest`'s units of `point`, with zstd at `level`.
    pub fn new(
        guest: GuestId,
        point: u64,
        seqs: Arc<Sequence>,
        index: Arc<Mutex<DedupIndex>>,
        level: i32,
    ) -> Encoder {
        Encoder {
            guest,
            point,
            seqs,
            index,
            bases: None,
            level,
            probe: Probe::new(),
            tools: None,
            crew: None,
            ahead: 0,
            alone: false,
            packing: VecDeque::new(),
            open: None,
            spare: Vec::new(),
            compressing: Duration::ZERO,
        }
    }

    /// Tells units as differences from these versions where that is smaller,
    /// and keeps in it what is told whole. Without it nothing is.
    pub fn with_bases(mut self, bases: Arc<Mutex<Bases>>) -> Encoder {
        self.bases = Some(bases);
        self
    }

    /// Full batches are compressed by this crew while the next is filled, so that
    /// [`Encoder::unit`] returns an earlier batch than the one that it completed.
    pub fn with_crew(mut self, crew: Arc<Crew>) -> Encoder {
        self.crew = Some(crew);
        self.beside(true);
        self
    }

    /// From now on full batches are compressed here: nobody else's are waited for.
    pub fn alone(&mut self) {
        self.ahead = 0;
        self.alone = true;
        if self.tools.is_none() {
            self.tools = Tools::new(self.level).ok();
        }
    }

    /// Whether the crew, if there is one, takes full batches from now on. Without
    /// it a batch leaves as soon as it is full, which is right where the link, and
    /// not the encoder, is what others wait for.
    pub fn beside(&mut self, beside: bool) {
        self.ahead = match &self.crew {
            Some(crew) if beside && !self.alone => crew.size() + 1,
            _ => 0,
        };
    }

    /// The zstd level of the batches from now on, the open one included.
    pub fn level(&mut self, level: i32) {
        self.level = level;
    }

    /// Time spent compressing, by all threads, from the beginning.
    pub fn compressing(&self) -> Duration {
        self.compressing
    }

    /// Takes one unit and its digest ([`Digest::UNKNOWN`] when there is none).
    /// Returns a batch that this completed, if any.
    ///
    /// # Errors
    /// See [`EncodeError`]; the unit was not taken then.
    pub fn unit(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digest: Digest,
    ) -> Result<Option<Batch>, EncodeError> {
        let Some((bytes, [])) = bytes.split_first_chunk::<UNIT>() else {
            return Err(EncodeError::Length(bytes.len()));
        };
        if digest == Digest::ZERO_UNIT || digest == Digest::UNKNOWN && is_zero(bytes) {
            return self.zeros(volume, unit, 1);
        }
        check(volume, unit, 1)?;
        self.prepare()?;
        let known = self.known(digest);
        let open = self.open.as_mut().ok_or(EncodeError::Numbers)?;
        let content = match known {
            Some(place) => Content::Refs(place),
            None => {
                let at = (volume, unit);
                let bases = self.bases.as_ref();
                let content = match bases.map(|bases| held(bases)) {
                    Some(mut bases) => match bases.version(self.guest, volume, unit, open.seq) {
                        Some((place, base)) => open.group.change(at, bytes, place, base),
                        None => open.group.whole(at, bytes),
                    },
                    None => open.group.whole(at, bytes),
                };
                let content = open
                    .group
                    .weigh(content, &mut self.probe, self.level < HURRIED);
                match content {
                    Content::Literals(index) | Content::Delta(Delta { index, .. })
                        if digest != Digest::UNKNOWN =>
                    {
                        open.digests.insert(digest, index);
                    }
                    _ => {}
                }
                content
            }
        };
        let entry = Entry {
            volume,
            unit,
            count: 1,
            content,
        };
        open.images |= entry.of_image(open.seq);
        open.entries.push(entry);
        open.units += 1;
        Ok(self.flush_when_full())
    }

    /// `count` units from `unit` on read as zeros.
    ///
    /// # Errors
    /// See [`EncodeError`]; nothing was taken then.
    pub fn zeros(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        count: u64,
    ) -> Result<Option<Batch>, EncodeError> {
        if count == 0 {
            return Ok(None);
        }
        check(volume, unit, count)?;
        self.prepare()?;
        let open = self.open.as_mut().ok_or(EncodeError::Numbers)?;
        open.entries.push(Entry {
            volume,
            unit,
            count,
            content: Content::Zeros,
        });
        open.units += count;
        Ok(self.flush_when_full())
    }

    /// Completes the open batch, if there is one, and returns the oldest that was
    /// not returned yet. With a crew there may be several: call it until it
    /// returns nothing.
    pub fn flush(&mut self) -> Option<Batch> {
        self.close();
        self.packed()
    }

    /// The oldest full batch, if there are more than may be with the crew.
    pub fn overdue(&mut self) -> Option<Batch> {
        match self.packing.len() > self.ahead {
            true => self.packed(),
            false => None,
        }
    }

    fn packed(&mut self) -> Option<Batch> {
        let done = self.packing.pop_front()?.wait();
        self.compressing += done.took;
        let (batch, mut group) = (done.batch, done.group);
        if let Some(bases) = &self.bases {
            let mut bases = held(bases);
            for ((volume, unit), index, bytes) in group.told_whole() {
                let place = Place::new(batch.seq, index);
                bases.offer(self.guest, volume, unit, place, bytes);
            }
        }
        group.clear();
        self.spare.push(group);
        Some(batch)
    }

    /// The open batch takes no more.
    fn close(&mut self) {
        let Some(open) = self.open.take() else {
            return;
        };
        let digests: Vec<(Digest, u8)> = open.digests.into_iter().collect();
        self.index().insert_pending(self.guest, open.seq, &digests);
        let full = Full {
            seq: open.seq,
            guest: self.guest,
            point: self.point,
            level: self.level,
            entries: open.entries.finish(),
            group: open.group,
            images: open.images,
            units: open.units,
        };
        let packing = match (&self.crew, &mut self.tools) {
            (Some(crew), _) if self.ahead > 0 => crew.pack(full),
            (_, Some(tools)) => Packing::Here(Box::new(tools.pack(full))),
            (Some(crew), None) => crew.pack(full),
            // `prepare` made them before the batch was opened.
            (None, None) => return,
        };
        self.packing.push_back(packing);
    }

    fn index(&self) -> MutexGuard<'_, DedupIndex> {
        held(&self.index)
    }

    fn known(&self, digest: Digest) -> Option<Place> {
        let open = self.open.as_ref()?;
        if let Some(&index) = open.digests.get(&digest) {
            return Some(Place::new(open.seq, index));
        }
        // A place from a number after this batch's own (another guest's, sent
        // earlier but numbered later) cannot be referred to; a stored image's can.
        self.index()
            .get_for(self.guest, digest)
            .filter(|place| place.seq() < open.seq || place.seq() >= IMAGE_SEQ)
    }

    /// Makes sure that there is an open batch, and what packs it.
    fn prepare(&mut self) -> Result<(), EncodeError> {
        if self.tools.is_none() && self.ahead == 0 {
            self.tools = Some(Tools::new(self.level)?);
        }
        if self.open.is_none() {
            if self.point == 0 || self.point > POINT || self.seqs.is_spent() {
                return Err(EncodeError::Numbers);
            }
            let seq = self.seqs.take();
            let entries = EntryWriter::new(seq);
            self.open = Some(Open {
                seq,
                entries,
                group: self.spare.pop().unwrap_or_default(),
                digests: HashMap::new(),
                units: 0,
                images: false,
            });
        }
        Ok(())
    }

    fn flush_when_full(&mut self) -> Option<Batch> {
        let open = self.open.as_ref()?;
        // One entry is still open, and one more may come before this is asked again.
        let full = usize::from(open.group.slots()) >= GROUP
            || open.entries.entries() >= BATCH_ENTRIES
            || open.entries.bytes() + 2 * ENTRY_BYTES > BATCH_ENTRIES_BYTES;
        if full {
            self.close();
        }
        self.overdue()
    }
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves both tables whole: each step keeps them valid.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(volume: VolumeIndex, unit: u64, count: u64) -> Result<(), EncodeError> {
    let fits = unit
        .checked_add(count)
        .is_some_and(|end| end <= VOLUME_UNITS);
    if fits && usize::from(volume) < VOLUMES {
        return Ok(());
    }
    Err(EncodeError::Range {
        volume,
        unit,
        count,
    })
}
