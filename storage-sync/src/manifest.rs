//! A recovery point on disk: its header, the guest's context, and where its units lie.
//!
//! A manifest tells every run of units that differs from its base: an earlier
//! point, or nothing (point 0), which makes it a full one. It is put in place
//! whole (temporary file, sync, rename) and describes itself, so that a lost
//! catalogue can be made again from the manifests alone.

use std::path::{Path, PathBuf};

use crate::codec::varint;
use crate::disk::Disk;
use crate::files::{FileError, Unplaced, put_whole, read_front};
use crate::limits::{CONTEXT_BYTES, POINT, POINT_HEADER_BYTES, VOLUME_NAME, VOLUME_UNITS, VOLUMES};
use crate::map::Run;
use crate::unit::{GuestId, Place, Volume, VolumeIndex};

const MAGIC: [u8; 4] = *b"FHmf";
const VERSION: u16 = 1;
const FIXED: usize = 32;

/// What the source measured for a point, kept with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct PointStats {
    /// How long the guest stood still for the cut, in nanoseconds.
    pub pause_ns: u64,
    /// Bytes of guest data that were handed over for this point.
    pub guest_bytes: u64,
    /// Bytes that went over the WAN for it.
    pub wan_bytes: u64,
}

/// What is told of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PointHeader {
    /// Whose point.
    pub guest: GuestId,
    /// Its number, upward from 1; numbers may be left out.
    pub point: u64,
    /// The point it was cut after; 0 for none.
    pub parent: u64,
    /// The instant of the cut, nanoseconds since 1970.
    pub cut_at_unix_ns: u64,
    /// When it was sealed here, nanoseconds since 1970.
    pub sealed_at_unix_ns: u64,
    /// The guest's volumes at that instant.
    pub volumes: Vec<Volume>,
    /// Batches sent for it.
    pub batches: u64,
    /// Hash over those batches.
    pub chain: [u8; 32],
    /// Bytes of those batches.
    pub stored_bytes: u64,
    /// Units that read differently than at the parent.
    pub changed_units: u64,
    /// What the source measured.
    #[serde(default)]
    pub stats: PointStats,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Its bytes are damaged or incomplete.
    #[error("{} is damaged: {why}; this point cannot be restored, use another", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which check failed.
        why: String,
    },
    /// Written by a newer version.
    #[error("{} was written by a newer version ({version}): upgrade this site", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Checks volumes that a peer or a file names.
pub(crate) fn check_volumes(volumes: &[Volume]) -> Result<(), &'static str> {
    if volumes.len() > VOLUMES {
        return Err("more volumes than a guest may have");
    }
    for volume in volumes {
        if volume.units() > VOLUME_UNITS {
            return Err("a volume over 4 PiB");
        }
        if volume.name.len() > VOLUME_NAME {
            return Err("a volume's name over 256 bytes");
        }
    }
    Ok(())
}

/// A manifest's parts: everything but the runs.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) header: PointHeader,
    /// The point that the runs are told against, 0 for none.
    pub(crate) base: u64,
    pub(crate) context: Vec<u8>,
}

/// The bytes of a manifest.
pub(crate) fn encode(
    header: &PointHeader,
    base: u64,
    context: &[u8],
    runs: impl Iterator<Item = Run>,
) -> Vec<u8> {
    let mut cbor = Vec::new();
    // Writing plain data into memory: no case in which this fails.
    ciborium::into_writer(header, &mut cbor).expect("a point header has a CBOR form");
    let mut out = Vec::with_capacity(FIXED + cbor.len() + context.len() + 64);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&(cbor.len() as u32).to_le_bytes());
    out.extend_from_slice(&(context.len() as u32).to_le_bytes());
    out.extend_from_slice(&base.to_le_bytes());
    out.extend_from_slice(&header.point.to_le_bytes());
    out.extend_from_slice(&cbor);
    out.extend_from_slice(context);
    let head = *blake3::hash(&out).as_bytes();
    out.extend_from_slice(&head);
    let mut at = Cursor::default();
    for run in runs {
        at.put(&mut out, &run);
    }
    let whole = *blake3::hash(&out).as_bytes();
    out.extend_from_slice(&whole);
    out
}

/// Where the next run is counted from.
#[derive(Default)]
struct Cursor {
    volume: VolumeIndex,
    unit: u64,
    place: u64,
}

impl Cursor {
    /// volume step, gap, count × 2 (+1 for zeros), step of the place.
    fn put(&mut self, out: &mut Vec<u8>, run: &Run) {
        let start = if run.volume == self.volume {
            self.unit
        } else {
            0
        };
        varint::put(out, u64::from(run.volume - self.volume));
        varint::put(out, run.unit - start);
        varint::put(out, run.count << 1 | u64::from(run.place == Place::ZERO));
        if run.place != Place::ZERO {
            varint::put_step(out, self.place, run.place.0);
            self.place = run.place.0 + run.count;
        }
        self.volume = run.volume;
        self.unit = run.unit + run.count;
    }

    fn take(&mut self, rest: &mut &[u8]) -> Option<Run> {
        let step = varint::take(rest)?;
        let volume = VolumeIndex::try_from(u64::from(self.volume).checked_add(step)?).ok()?;
        let start = if step == 0 { self.unit } else { 0 };
        let unit = start.checked_add(varint::take(rest)?)?;
        let count = varint::take(rest)?;
        let (count, zeros) = (count >> 1, count & 1 == 1);
        let end = unit.checked_add(count)?;
        if count == 0 || end > VOLUME_UNITS || usize::from(volume) >= VOLUMES {
            return None;
        }
        let mut place = Place::ZERO;
        if !zeros {
            place = Place(varint::take_step(rest, self.place)?);
            self.place = place.0.checked_add(count)?;
            if place.seq() == 0 {
                return None;
            }
        }
        self.volume = volume;
        self.unit = end;
        Some(Run {
            volume,
            unit,
            count,
            place,
        })
    }
}

fn damaged(path: &Path, why: &str) -> ManifestError {
    ManifestError::Damaged {
        path: path.to_path_buf(),
        why: why.to_string(),
    }
}

/// Reads and verifies everything but the runs, from the front of a file's bytes.
/// Returns it with the offset of the runs.
fn decode_head(path: &Path, bytes: &[u8]) -> Result<(Head, usize), ManifestError> {
    let Some(fixed) = bytes.first_chunk::<FIXED>() else {
        return Err(damaged(path, "it is cut short"));
    };
    let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| fixed[at + i])) as usize;
    let u64_at = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| fixed[at + i]));
    if fixed[..4] != MAGIC {
        return Err(damaged(path, "it is no manifest"));
    }
    let version = u16::from_le_bytes([fixed[4], fixed[5]]);
    if version > VERSION || fixed[6] != 0 || fixed[7] != 0 {
        return Err(ManifestError::Newer {
            path: path.to_path_buf(),
            version,
        });
    }
    let (cbor, context) = (u32_at(8), u32_at(12));
    if cbor > POINT_HEADER_BYTES || context > CONTEXT_BYTES {
        return Err(damaged(path, "its header is too long"));
    }
    let end = FIXED + cbor + context;
    let (Some(head), Some(hash)) = (bytes.get(..end), bytes.get(end..end + 32)) else {
        return Err(damaged(path, "it is cut short"));
    };
    if blake3::hash(head).as_bytes() != hash {
        return Err(damaged(path, "its header does not match its hash"));
    }
    let header: PointHeader = ciborium::from_reader(&head[FIXED..FIXED + cbor])
        .map_err(|error| damaged(path, &error.to_string()))?;
    let base = u64_at(16);
    check_volumes(&header.volumes).map_err(|why| damaged(path, why))?;
    if header.point == 0 || header.point > POINT || header.point != u64_at(24) {
        return Err(damaged(path, "its point number is out of range"));
    }
    if base >= header.point {
        return Err(damaged(path, "it builds on a later point"));
    }
    let context = head[FIXED + cbor..].to_vec();
    Ok((
        Head {
            header,
            base,
            context,
        },
        end + 32,
    ))
}

/// Reads a whole manifest from memory, calling `each` for every run.
pub(crate) fn decode(
    path: &Path,
    bytes: &[u8],
    each: &mut dyn FnMut(Run),
) -> Result<Head, ManifestError> {
    let (head, start) = decode_head(path, bytes)?;
    let end = bytes.len().checked_sub(32).filter(|&end| end >= start);
    let end = end.ok_or_else(|| damaged(path, "it is cut short"))?;
    if blake3::hash(&bytes[..end]).as_bytes() != &bytes[end..] {
        return Err(damaged(path, "its runs do not match their hash"));
    }
    let mut rest = &bytes[start..end];
    let mut at = Cursor::default();
    while !rest.is_empty() {
        let run = at
            .take(&mut rest)
            .ok_or_else(|| damaged(path, "a run is out of range"))?;
        each(run);
    }
    Ok(head)
}

/// Is a manifest, of whatever version, as it was written? Every version ends with a hash
/// over all that is before.
pub(crate) fn is_whole(disk: &dyn Disk, path: &Path) -> bool {
    has_its_hash(&read_front(disk, path, u64::MAX).unwrap_or_default())
}

/// Is a manifest not as it was written, as far as the disk reads it?
pub(crate) fn is_rotten(disk: &dyn Disk, path: &Path) -> bool {
    let bytes = read_front(disk, path, u64::MAX);
    bytes.is_ok_and(|bytes| !has_its_hash(&bytes))
}

fn has_its_hash(bytes: &[u8]) -> bool {
    let parts = bytes.split_last_chunk::<32>();
    parts.is_some_and(|(told, hash)| blake3::hash(told).as_bytes() == hash)
}

/// Reads header and context of the manifest at `path`.
pub(crate) fn read_head(disk: &dyn Disk, path: &Path) -> Result<Head, ManifestError> {
    // Usually a few KiB; read on only when the header says so.
    const FRONT: usize = 64 * 1024;
    let most = FIXED + POINT_HEADER_BYTES + CONTEXT_BYTES + 32;
    let mut bytes = read_front(disk, path, FRONT as u64)?;
    if let Err(error) = decode_head(path, &bytes)
        && bytes.len() == FRONT
    {
        tracing::trace!(%error, "manifest with a long header");
        bytes = read_front(disk, path, most as u64)?;
    }
    Ok(decode_head(path, &bytes)?.0)
}

/// Reads the manifest at `path`, calling `each` for every run.
pub(crate) fn read(
    disk: &dyn Disk,
    path: &Path,
    each: &mut dyn FnMut(Run),
) -> Result<Head, ManifestError> {
    let bytes = read_front(disk, path, u64::MAX)?;
    decode(path, &bytes, each)
}

/// Where a point's manifest is, under the store's directory of manifests.
pub(crate) fn path_of(dir: &Path, guest: GuestId, point: u64) -> PathBuf {
    dir.join(guest.to_string()).join(format!("{point:020}.man"))
}

/// The point whose manifest was set aside under this name.
pub(crate) fn set_aside_as(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.split_once(".man.bad-")?.0.parse().ok()
}

/// Puts a manifest in place, durably.
pub(crate) fn write(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), Unplaced> {
    put_whole(disk, path, &[bytes])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::unit::VolumeKind;

    fn header() -> PointHeader {
        PointHeader {
            guest: GuestId([7; 16]),
            point: 9,
            parent: 8,
            cut_at_unix_ns: 1,
            sealed_at_unix_ns: 2,
            volumes: vec![Volume {
                name: "ram".into(),
                kind: VolumeKind::Ram,
                bytes: 1 << 30,
            }],
            batches: 3,
            chain: [5; 32],
            stored_bytes: 4,
            changed_units: 5,
            stats: PointStats::default(),
        }
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let run = (
            0u16..3,
            0u64..1000,
            1u64..600,
            64u64..1 << 50,
            any::<bool>(),
        );
        prop::collection::vec(run, 0..40).prop_map(|steps| {
            let mut runs = Vec::new();
            let (mut volume, mut unit) = (0, 0);
            for (step, gap, count, place, zero) in steps {
                if step > 0 && volume + step < 1000 {
                    volume += step;
                    unit = 0;
                }
                let place = if zero { Place::ZERO } else { Place(place) };
                runs.push(Run {
                    volume,
                    unit: unit + gap,
                    count,
                    place,
                });
                unit += gap + count;
            }
            runs
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_manifest_comes_back_and_any_change_is_noticed(
            runs in runs(), at: prop::sample::Index, flip in 1u8.., cut: prop::sample::Index,
        ) {
            let path = Path::new("test.man");
            let mut bytes = encode(&header(), 4, b"definition", runs.iter().copied());
            let mut back = Vec::new();
            let head = decode(path, &bytes, &mut |run| back.push(run)).unwrap();
            prop_assert_eq!(head.header, header());
            prop_assert_eq!((head.base, &head.context[..]), (4, &b"definition"[..]));
            prop_assert_eq!(back, runs);
            let cut = cut.index(bytes.len());
            prop_assert!(decode(path, &bytes[..cut], &mut drop).is_err());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(path, &bytes, &mut drop).is_err());
        }

        #[test]
        fn runs_are_never_trusted(bytes: Vec<u8>) {
            let (mut rest, mut at) = (&bytes[..], Cursor::default());
            while let Some(run) = at.take(&mut rest) {
                prop_assert!(run.count > 0 && run.unit + run.count <= VOLUME_UNITS);
            }
        }
    }
}
