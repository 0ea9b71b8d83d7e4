//! What the sim guest's pages and blocks hold: functions of numbers, so that
//! whoever knows the numbers knows every byte.

use std::sync::OnceLock;

use farhaven_storage_sync::unit::UNIT;

/// One page or block.
pub(super) type Content = [u8; UNIT];

/// Neighbours that hold the same kind of content.
const KIN: u64 = 16;

/// Blocks of a disk beyond this many hold zeros until they are written (512 MiB).
const IMAGE_BLOCKS: u64 = 128 << 10;

/// A number that looks like any other, of any number (the finalizer of SplitMix64).
pub(super) fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A number of several.
pub(super) fn blend(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0, |all, number| mix(all ^ number))
}

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Nothing compresses it.
pub(super) fn noise(number: u64, out: &mut Content) {
    let mut state = mix(number) | 1;
    for word in out.as_chunks_mut::<8>().0 {
        *word = next(&mut state)
            .wrapping_mul(0x2545_f491_4f6c_dd1d)
            .to_le_bytes();
    }
}

/// Compresses as text does.
pub(super) fn text(number: u64, out: &mut Content) {
    static PHRASES: OnceLock<Vec<[u8; 16]>> = OnceLock::new();
    let phrases = PHRASES.get_or_init(|| {
        let letter = |n: u64| b"etaoin shrdlu,cm"[(n & 15) as usize];
        let phrase = |n: u64| std::array::from_fn(|at| letter(blend(&[n, at as u64])));
        (0..256).map(phrase).collect()
    });
    let mut state = mix(number) | 1;
    for (at, chunk) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        if at % 8 == 0 {
            *chunk = [b'.'; 16];
            chunk[..8].copy_from_slice(&next(&mut state).to_le_bytes());
        } else if let Some(phrase) = phrases.get((next(&mut state) >> 20 & 255) as usize) {
            *chunk = *phrase;
        }
    }
}

/// A page of a database's table after write number `seq` to its region: all
/// but its head, one row and its tail are as ever. Number 0 is zeros: not written yet.
pub(super) fn table(seed: u64, item: u64, seq: u64, out: &mut Content) {
    if seq == 0 {
        out.fill(0);
        return;
    }
    text(blend(&[seed, item]), out);
    let row = 1 + mix(seq) % 62;
    let stamp = blend(&[seed, item, seq]);
    let (lines, _) = out.as_chunks_mut::<64>();
    let count = lines.len() as u64;
    for (at, line) in (0..count).zip(lines) {
        if at == 0 || at == row || at == count - 1 {
            for (word, value) in line
                .as_chunks_mut::<8>()
                .0
                .iter_mut()
                .zip([item, seq, stamp])
            {
                *word = value.to_le_bytes();
            }
        }
    }
}

/// Memory that never changes: mostly zeros, the rest repeated, text, noise, and
/// what is on the first disk too, somewhere behind block `on_disk`.
pub(super) fn still_page(seed: u64, page: u64, on_disk: Option<u64>, out: &mut Content) {
    match blend(&[seed, 1, page / KIN]) % 100 {
        0..60 => out.fill(0),
        60..70 => text(blend(&[seed, 2, page % 5]), out),
        70..82 => text(blend(&[seed, 3, page]), out),
        82..92 => match on_disk {
            Some(from) => something_of_a_disk(seed, page, from, out),
            None => text(blend(&[seed, 3, page]), out),
        },
        _ => noise(blend(&[seed, 4, page]), out),
    }
}

/// A disk's image where nothing was written.
pub(super) fn still_block(seed: u64, disk: u64, block: u64, out: &mut Content) {
    let kind = blend(&[seed, 5, disk, block / KIN]) % 100;
    if kind < 70 || block >= IMAGE_BLOCKS {
        out.fill(0);
    } else if kind < 92 {
        text(blend(&[seed, 6, disk, block]), out);
    } else {
        noise(blend(&[seed, 7, disk, block]), out);
    }
}

/// The nearest block of the first disk's image that is text, from a chosen one on.
fn something_of_a_disk(seed: u64, page: u64, from: u64, out: &mut Content) {
    let from = from + blend(&[seed, 8, page]) % 2048;
    let kind = |block: u64| blend(&[seed, 5, 0, block / KIN]) % 100;
    let block = (from..from + 64 * KIN)
        .step_by(KIN as usize)
        .find(|block| (70..92).contains(&kind(*block)))
        .unwrap_or(from);
    text(blend(&[seed, 6, 0, block]), out);
}
