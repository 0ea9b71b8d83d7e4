//! Makes hashes, lengths and counts right in bytes that were changed, so that what is behind
//! them is read.

use std::ops::Range;

use crate::codec::{Content, EntryReader, MAGIC, hash_of};
use crate::limits::{BATCH_ENTRIES, BATCH_HEADER};
use crate::unit::GROUP;

use super::GUEST;

fn u16_at(bytes: &[u8], at: usize) -> usize {
    u16::from_le_bytes([bytes[at], bytes[at + 1]]).into()
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([0, 1, 2, 3].map(|index| bytes[at + index])) as usize
}

fn set(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes[at..at + new.len()].copy_from_slice(new);
}

/// Where the entries of a batch lie, as far as there are bytes.
fn entries_in(bytes: &[u8]) -> Range<usize> {
    let end = BATCH_HEADER.saturating_add(u32_at(bytes, 40));
    BATCH_HEADER..end.min(bytes.len())
}

/// A batch with its two hashes made right.
pub(super) fn hashes(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes.len() < BATCH_HEADER {
        return bytes;
    }
    let entries = entries_in(&bytes);
    let end = entries.end.saturating_add(u32_at(&bytes, 52));
    let body = blake3::hash(&bytes[entries.end..end.min(bytes.len())]);
    set(&mut bytes, 56, body.as_bytes());
    let hash = hash_of(&bytes, &bytes[entries]);
    set(&mut bytes, 88, &hash);
    bytes
}

/// A batch whose header says of its entries and its body what they are; entries from the
/// first that is none on are left out.
pub(super) fn batch(bytes: &[u8]) -> Vec<u8> {
    if bytes.len() < BATCH_HEADER {
        return bytes.to_vec();
    }
    let mut fixed = bytes[..BATCH_HEADER].to_vec();
    let old = entries_in(bytes);
    let body = &bytes[old.end..];
    let (source, seq) = (&bytes[old], u64_at(bytes, 8));
    let mut reader = EntryReader::new(source, seq);
    let (mut count, mut sound, mut deltas, mut images) = (0, 0, false, false);
    while count < BATCH_ENTRIES {
        // Its own slots only, which are not all known yet: judged below.
        match reader.take() {
            Ok(Some(entry)) => {
                deltas |= matches!(entry.content, Content::Delta(_));
                images |= entry.of_image(seq);
                count += 1;
                sound = source.len() - reader.left();
            }
            _ => break,
        }
    }
    let mut reader = EntryReader::new(&source[..sound], seq);
    while let Ok(Some(_)) = reader.take() {}
    let (literals, differences) = reader.body_bytes();
    let raw = literals + differences;
    fixed[6] = u8::from(deltas) | u8::from(images) << 1;
    // Stored as it is, unless it is shorter than what it is to become.
    let stored = match fixed[7] {
        1 if body.len() < raw => body.to_vec(),
        _ => {
            fixed[7] = 0;
            let mut stored = body.to_vec();
            stored.resize(raw, 0x5a);
            stored
        }
    };
    set(&mut fixed, 40, &(sound as u32).to_le_bytes());
    set(&mut fixed, 44, &(count as u16).to_le_bytes());
    fixed[46] = reader.slots().min(GROUP) as u8;
    set(&mut fixed, 48, &(raw as u32).to_le_bytes());
    set(&mut fixed, 52, &(stored.len() as u32).to_le_bytes());
    hashes(&[&fixed[..], &source[..sound], &stored].concat())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|index| bytes[at + index]))
}

/// The batches of a segment, each [`batch`]; what is before the first stays as it is.
pub(super) fn pieces(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut starts: Vec<usize> = bytes
        .windows(MAGIC.len())
        .enumerate()
        .filter(|(_, window)| *window == MAGIC)
        .map(|(at, _)| at)
        .collect();
    starts.push(bytes.len());
    let mut pieces = Vec::new();
    if starts[0] > 0 {
        pieces.push(bytes[..starts[0]].to_vec());
    }
    pieces.extend(
        starts
            .windows(2)
            .map(|pair| batch(&bytes[pair[0]..pair[1]])),
    );
    pieces
}

/// The batch as one of point 1 of one guest, with a number that others may refer to.
pub(super) fn of_one_point(bytes: &[u8]) -> Vec<u8> {
    if bytes.len() < BATCH_HEADER {
        return bytes.to_vec();
    }
    let mut bytes = bytes.to_vec();
    let seq = 1 + (u64_at(&bytes, 8).wrapping_sub(1) & 63);
    set(&mut bytes, 8, &seq.to_le_bytes());
    set(&mut bytes, 16, &GUEST.0);
    set(&mut bytes, 32, &1u64.to_le_bytes());
    batch(&bytes)
}

/// A manifest with its two hashes made right.
pub(super) fn manifest(bytes: &[u8]) -> Vec<u8> {
    const FIXED: usize = 32;
    let mut bytes = bytes.to_vec();
    if bytes.len() < FIXED + 64 {
        return bytes;
    }
    let head = FIXED
        .saturating_add(u32_at(&bytes, 8))
        .saturating_add(u32_at(&bytes, 12));
    let end = bytes.len() - 32;
    if head <= end - 32 {
        let hash = blake3::hash(&bytes[..head]);
        set(&mut bytes, head, hash.as_bytes());
    }
    let hash = blake3::hash(&bytes[..end]);
    set(&mut bytes, end, hash.as_bytes());
    bytes
}

/// A catalogue's journal with the sum of each record made right.
pub(super) fn journal(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = 8;
    while at + 6 < bytes.len() {
        let value = match u32_at(&bytes, at + 2) {
            0xffff_ffff => 0,
            value => value,
        };
        let end = at
            .saturating_add(6 + u16_at(&bytes, at))
            .saturating_add(value);
        if end.saturating_add(16) > bytes.len() {
            break;
        }
        let sum = blake3::hash(&bytes[at..end]);
        set(&mut bytes, end, &sum.as_bytes()[..16]);
        at = end + 16;
    }
    bytes
}

/// The name of a kept point, or a file of hints, with the sums made right.
pub(super) fn notes(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes.starts_with(b"FHkp") && bytes.len() >= 24 {
        let end = bytes.len() - 16;
        set(&mut bytes, 6, &((end - 8) as u16).to_le_bytes());
        let sum = blake3::hash(&bytes[..end]);
        set(&mut bytes, end, &sum.as_bytes()[..16]);
    }
    if bytes.starts_with(b"FHhn") && bytes.len() >= 64 {
        let sum = blake3::hash(&bytes[..40]);
        set(&mut bytes, 40, &sum.as_bytes()[..24]);
        let mut at = 64;
        while at + 13 <= bytes.len() {
            let end = at + 9 + 6 * usize::from(bytes[at + 8]);
            if end + 4 > bytes.len() {
                break;
            }
            let sum = blake3::hash(&bytes[at..end]);
            set(&mut bytes, end, &sum.as_bytes()[..4]);
            at = end + 4;
        }
    }
    bytes
}
