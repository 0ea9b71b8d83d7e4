//! The body of the batch that is being filled, and the choice what is told as
//! a difference.
//!
//! A unit that has an older version at the peer is weighed when it comes: what
//! its difference costs, against about what the unit would cost in its group.
//! When the group is full and the differences do not win by far, the group is
//! compressed both ways, and the smaller one goes. So a difference never makes
//! a batch larger, whatever the estimates were worth.

use zstd::bulk::Compressor;

use crate::codec::compress::{self, Codec, Probe};
use crate::codec::delta;
use crate::codec::entry::{Content, Delta, Entry, EntryReader, EntryWriter};
use crate::unit::{Place, UNIT, VolumeIndex};

/// Bytes of a difference's entry beyond what a literal's takes: kind, step of
/// the base, length, hash. None of them compresses.
const ENTRY: usize = 15;
/// A unit in its group costs about this many hundredths of what it costs alone
/// (measured over RAM and disk: 67.6 MB for 82.7 MB).
const GROUPED: usize = 80;
/// What a unit costs for all that is known without looking at it.
const USUAL: usize = UNIT * 3 / 10;
/// Differences that cost less than one in this many of what the units would
/// cost need no second try.
const BY_FAR: usize = 4;

/// Which unit of the guest.
type At = (VolumeIndex, u64);

/// The units of a batch, and differences for some of them.
#[derive(Default)]
pub(crate) struct Group {
    /// All slots' units, whole.
    units: Vec<u8>,
    told: Vec<At>,
    /// Bit of every slot that has a difference.
    changed: u64,
    differences: Vec<u8>,
    mixed: Vec<u8>,
    packed: Vec<u8>,
    other: Vec<u8>,
    cost_of_differences: usize,
    cost_of_units: usize,
}

/// What a group became; its body is [`Group::packed`].
pub(crate) struct Packed {
    pub(crate) count: usize,
    pub(crate) entries: Vec<u8>,
    pub(crate) raw: usize,
    pub(crate) codec: Codec,
    pub(crate) deltas: u8,
}

impl Group {
    pub(crate) fn slots(&self) -> u8 {
        self.told.len() as u8
    }

    /// Makes it empty; keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.units.clear();
        self.told.clear();
        self.changed = 0;
        self.differences.clear();
        self.cost_of_differences = 0;
        self.cost_of_units = 0;
    }

    /// Takes a unit as a literal.
    pub(crate) fn whole(&mut self, at: At, bytes: &[u8; UNIT]) -> Content {
        let index = self.slots();
        self.told.push(at);
        self.units.extend_from_slice(bytes);
        Content::Literals(index)
    }

    /// Takes a unit that has a version at the peer: as a difference when there
    /// is one short enough, as a reference when both are the same.
    pub(crate) fn change(
        &mut self,
        at: At,
        bytes: &[u8; UNIT],
        place: Place,
        base: &[u8; UNIT],
    ) -> Content {
        match delta::diff(base, bytes, &mut self.differences) {
            Some(0) => Content::Refs(place),
            Some(length) => {
                self.whole(at, bytes);
                Content::Delta(Delta {
                    index: self.slots() - 1,
                    base: place,
                    length: length as u16,
                    check: [0; 8],
                })
            }
            None => self.whole(at, bytes),
        }
    }

    /// The last unit as it goes: a difference stays one only if that is cheaper.
    /// `hurried`: time is short and the link is not, so it is guessed.
    pub(crate) fn weigh(&mut self, content: Content, probe: &mut Probe, hurried: bool) -> Content {
        let Content::Delta(mut delta) = content else {
            return content;
        };
        let start = self.differences.len() - usize::from(delta.length);
        let Some(unit) = self.units.last_chunk::<UNIT>() else {
            return content;
        };
        let difference = &self.differences[start..];
        let told = match difference.len() {
            short @ ..=64 => short,
            long if hurried => long,
            long => probe.cost(difference).min(long),
        } + ENTRY;
        let whole = match hurried {
            true => USUAL,
            false => probe.cost(unit) * GROUPED / 100,
        };
        if told >= whole {
            self.differences.truncate(start);
            return Content::Literals(delta.index);
        }
        delta.check = delta::check_of(unit);
        self.cost_of_differences += told;
        self.cost_of_units += whole;
        self.changed |= 1 << delta.index;
        Content::Delta(delta)
    }

    /// Compresses the group into the smaller of its forms.
    pub(crate) fn pack(
        &mut self,
        seq: u64,
        (count, entries): (usize, Vec<u8>),
        compressor: &mut Compressor<'static>,
        probe: &mut Probe,
    ) -> Packed {
        if self.changed == 0 {
            let codec = shrink(compressor, probe, &self.units, &mut self.packed);
            return self.as_units(count, entries, codec);
        }
        self.mixed.clear();
        let units = self.units.as_chunks::<UNIT>().0;
        for (index, unit) in units.iter().enumerate() {
            if self.changed >> index & 1 == 0 {
                self.mixed.extend_from_slice(unit);
            }
        }
        self.mixed.extend_from_slice(&self.differences);
        let codec = shrink(compressor, probe, &self.mixed, &mut self.packed);
        if self.cost_of_differences * BY_FAR > self.cost_of_units {
            let (whole_count, whole_entries) = all_whole(seq, &entries);
            let whole = shrink(compressor, probe, &self.units, &mut self.other);
            if self.other.len() + whole_entries.len() <= self.packed.len() + entries.len() {
                std::mem::swap(&mut self.packed, &mut self.other);
                self.changed = 0;
                return self.as_units(whole_count, whole_entries, whole);
            }
        }
        Packed {
            count,
            entries,
            raw: self.mixed.len(),
            codec,
            deltas: self.changed.count_ones() as u8,
        }
    }

    fn as_units(&self, count: usize, entries: Vec<u8>, codec: Codec) -> Packed {
        Packed {
            count,
            entries,
            raw: self.units.len(),
            codec,
            deltas: 0,
        }
    }

    /// The body as it is stored, once the group was packed.
    pub(crate) fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The slots that go as literals: which unit, which slot, its bytes.
    pub(crate) fn told_whole(&self) -> impl Iterator<Item = (At, u8, &[u8; UNIT])> {
        let units = self.units.as_chunks::<UNIT>().0;
        let slots = self.told.iter().zip(units).enumerate();
        slots
            .filter(|(index, _)| self.changed >> index & 1 == 0)
            .map(|(index, (&at, bytes))| (at, index as u8, bytes))
    }
}

fn shrink(
    compressor: &mut Compressor<'static>,
    probe: &mut Probe,
    body: &[u8],
    out: &mut Vec<u8>,
) -> Codec {
    if body.is_empty() || probe.incompressible(body) {
        out.clear();
        out.extend_from_slice(body);
        return Codec::Raw;
    }
    compress::shrink(compressor, body, out)
}

/// The same entries, every difference as a literal: never longer than before.
fn all_whole(seq: u64, entries: &[u8]) -> (usize, Vec<u8>) {
    let mut reader = EntryReader::new(entries, seq);
    let mut writer = EntryWriter::new(seq);
    while let Ok(Some(entry)) = reader.take() {
        writer.push(Entry {
            content: match entry.content {
                Content::Delta(delta) => Content::Literals(delta.index),
                other => other,
            },
            ..entry
        });
    }
    writer.finish()
}
