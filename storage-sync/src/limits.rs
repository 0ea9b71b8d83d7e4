//! Every limit of the formats and of the store, in one place. What a peer, a
//! file or a caller asks for is checked against these before memory is taken.

use crate::unit::{GROUP, UNIT};

/// Bytes of a batch before its entries.
pub const BATCH_HEADER: usize = 120;
/// Most bytes of a batch's entries.
pub const BATCH_ENTRIES_BYTES: usize = 16 * 1024;
/// Most entries of a batch.
pub const BATCH_ENTRIES: usize = 4096;
/// Most bytes of one encoded entry: kind, volume, gap, count, place.
pub const ENTRY_BYTES: usize = 1 + 3 + 10 + 10 + 10;
/// Bytes of a full group of literals, uncompressed.
pub const BATCH_BODY_RAW: usize = GROUP * UNIT;
/// Fewest bytes of a unit told as a difference: kept, new, one byte.
pub const DELTA_BYTES_LEAST: usize = 3;
/// Most bytes of a unit told as a difference: beyond half a unit a literal is as small.
pub const DELTA_BYTES: usize = UNIT / 2;
/// Bytes of differences that wait for their bases while a volume is read, per thread.
pub const DELTAS_WAITING_BYTES: usize = 16 << 20;
/// Bytes of old versions kept to tell differences against, unless configured.
pub const BASES_BYTES: usize = 64 << 20;
/// Most bytes of a whole batch. A body that does not shrink is stored raw.
pub const BATCH_BYTES: usize = BATCH_HEADER + BATCH_ENTRIES_BYTES + BATCH_BODY_RAW;

/// Volumes a guest may have.
pub const VOLUMES: usize = 1024;
/// Units a volume may have: 4 PiB.
pub const VOLUME_UNITS: u64 = 1 << 40;
/// Bytes of a volume's name.
pub const VOLUME_NAME: usize = 256;
/// Bytes of the opaque context kept with a point (the guest's definition).
pub const CONTEXT_BYTES: usize = 1024 * 1024;
/// Bytes of a point's header in a manifest.
pub const POINT_HEADER_BYTES: usize = 1024 * 1024;

/// Largest batch number.
pub const SEQ: u64 = (1 << 58) - 1;
/// First number of the batches of stored images. Sources number theirs below
/// it, so that a site can store an image without asking anybody for numbers.
pub const IMAGE_SEQ: u64 = 1 << 56;
/// Largest point number.
pub const POINT: u64 = 1 << 62;

/// Manifests that may build on one another before a full one is written.
pub const MANIFEST_CHAIN: usize = 64;
/// Units covered by one leaf of a point's map.
pub const MAP_LEAF: usize = 512;
/// Leaves under one branch of a point's map.
pub const MAP_BRANCH: usize = 512;

/// Smallest segment size that may be configured: tests use it, sites use 64 MiB.
pub const SEGMENT_BYTES_LEAST: u64 = 4 * 1024;
/// Largest segment: offsets in the index have 32 bits.
pub const SEGMENT_BYTES_MOST: u64 = 1 << 31;

/// Memory for hints which batch holds which content, unless configured.
pub const HINT_BYTES: usize = 256 << 20;
/// Batches whose digests are kept in memory once they were asked for: 1 KiB each.
pub const ANSWERS_KEPT: usize = 4096;
/// Most digests of one question.
pub const ASKED: usize = 4096;
/// Most batches of one answer: their digests are 512 KiB.
pub const ANSWER_BATCHES: usize = 512;

/// Most bytes of a kept point's name.
pub const KEPT_NAME: usize = 128;
/// Most kept points of one guest.
pub const KEPT_POINTS: usize = 1000;

/// Segment files kept open for reading.
pub const SEGMENTS_OPEN: usize = 64;

/// Most bytes of a catalogue key.
pub const CATALOGUE_KEY: usize = 512;
/// Most bytes of a catalogue value.
pub const CATALOGUE_VALUE: usize = 4 * 1024 * 1024;

const _: () = assert!(BATCH_ENTRIES_BYTES > ENTRY_BYTES);
const _: () = assert!(
    1 + 3 + 10 + 10 + 2 + 8 <= ENTRY_BYTES,
    "a difference fits an entry"
);
const _: () = assert!(DELTA_BYTES < UNIT && DELTA_BYTES < 1 << 14);
const _: () = assert!(GROUP == 64, "places have 6 bits of index");
const _: () = assert!(UNIT == 4096 && UNIT.is_power_of_two());
const _: () = assert!(SEGMENT_BYTES_MOST + (BATCH_BYTES as u64) < u32::MAX as u64);
const _: () = assert!(
    IMAGE_SEQ < SEQ && IMAGE_SEQ << 7 == 1 << 63,
    "steps between places of images have 63 bits"
);
const _: () = assert!(VOLUMES <= u16::MAX as usize);
const _: () = assert!(
    BATCH_BYTES < 512 * 1024,
    "several in flight must fit small buffers"
);
const _: () = assert!(VOLUME_UNITS.checked_mul(UNIT as u64).is_some());
