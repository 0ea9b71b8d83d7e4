//! One unit as a difference from another: which bytes stay, which are new.
//!
//! New bytes are told as they are, not as XOR: a group's compressor finds in
//! them what it finds in the literals beside them. [`diff`] writes, [`apply`]
//! reads and trusts nothing.

use crate::codec::varint;
use crate::limits::{DELTA_BYTES, DELTA_BYTES_LEAST};
use crate::unit::UNIT;

/// Two changes with fewer equal bytes between them are told as one: the step
/// from one to the next takes two bytes.
const JOIN: usize = 3;
const WORD: usize = 8;

/// First eight bytes of BLAKE3 of a unit: what a difference must come to.
pub fn check_of(unit: &[u8; UNIT]) -> [u8; 8] {
    let mut check = [0; 8];
    check.copy_from_slice(&blake3::hash(unit).as_bytes()[..8]);
    check
}

/// Appends the difference that makes `base` into `unit`. Returns its length;
/// `None`, and nothing is appended, when it would be over [`DELTA_BYTES`]. An
/// empty one means that both are the same.
pub fn diff(base: &[u8; UNIT], unit: &[u8; UNIT], out: &mut Vec<u8>) -> Option<usize> {
    // Counting is several times faster than telling what will not be short.
    let differing = base.iter().zip(unit).filter(|(a, b)| a != b).count();
    if differing > DELTA_BYTES {
        return None;
    }
    let start = out.len();
    let mut told = 0; // Bytes of the unit that are told up to now.
    let mut at = differs_from(base, unit, 0);
    while at < UNIT {
        // The change reaches to where JOIN bytes are equal again.
        let mut end = at + 1;
        let mut next = differs_from(base, unit, end);
        while next < UNIT && next - end < JOIN {
            end = next + 1;
            next = differs_from(base, unit, end);
        }
        if out.len() - start + (end - at) > DELTA_BYTES {
            out.truncate(start);
            return None;
        }
        varint::put(out, (at - told) as u64);
        varint::put(out, (end - at) as u64);
        out.extend_from_slice(&unit[at..end]);
        told = end;
        at = next;
    }
    if out.len() - start > DELTA_BYTES {
        out.truncate(start);
        return None;
    }
    Some(out.len() - start)
}

/// The first byte from `from` on that differs; [`UNIT`] when none does.
fn differs_from(base: &[u8; UNIT], unit: &[u8; UNIT], mut from: usize) -> usize {
    while from < UNIT && !from.is_multiple_of(WORD) {
        if base[from] != unit[from] {
            return from;
        }
        from += 1;
    }
    let words = base[from..].chunks_exact(WORD);
    for (base, unit) in words.zip(unit[from..].chunks_exact(WORD)) {
        if base != unit {
            let at = base.iter().zip(unit).position(|(a, b)| a != b);
            return from + at.unwrap_or(0);
        }
        from += WORD;
    }
    UNIT
}

/// Makes `unit`, which holds the base, into what the difference says. `None`
/// when it is none; `unit` may be partly changed then.
pub fn apply(difference: &[u8], unit: &mut [u8; UNIT]) -> Option<()> {
    if !(DELTA_BYTES_LEAST..=DELTA_BYTES).contains(&difference.len()) {
        return None;
    }
    let mut rest = difference;
    let mut at = 0usize;
    while !rest.is_empty() {
        let keep = usize::try_from(varint::take(&mut rest)?).ok()?;
        let new = usize::try_from(varint::take(&mut rest)?).ok()?;
        if new == 0 || keep == 0 && at > 0 {
            return None;
        }
        let start = at.checked_add(keep)?;
        let end = start.checked_add(new)?;
        let (bytes, after) = rest.split_at_checked(new)?;
        unit.get_mut(start..end)?.copy_from_slice(bytes);
        rest = after;
        at = end;
    }
    Some(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: u64) -> [u8; UNIT] {
        use rand::{RngCore, SeedableRng};
        let mut unit = [0; UNIT];
        rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut unit);
        unit
    }

    proptest! {
        #[test]
        fn a_difference_makes_the_unit_again(
            seed: u64,
            changes in prop::collection::vec((0..UNIT, 1usize..300, any::<u8>()), 0..40),
        ) {
            let base = noise(seed);
            let mut unit = base;
            for (at, count, value) in changes {
                let end = (at + count).min(UNIT);
                unit[at..end].fill(value);
            }
            let mut out = vec![7];
            match diff(&base, &unit, &mut out) {
                Some(0) => prop_assert!(base == unit && out == [7]),
                Some(length) => {
                    prop_assert!(length <= DELTA_BYTES && out.len() == 1 + length);
                    let mut again = base;
                    prop_assert_eq!(apply(&out[1..], &mut again), Some(()));
                    prop_assert!(again == unit);
                }
                None => {
                    let differing = base.iter().zip(&unit).filter(|(a, b)| a != b).count();
                    prop_assert!(differing > DELTA_BYTES / 4 && out == [7]);
                }
            }
        }

        #[test]
        fn any_bytes_are_applied_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut unit = noise(1);
            let _ = apply(&bytes, &mut unit);
        }
    }

    #[test]
    fn eight_words_cost_a_hundred_bytes() {
        let base = noise(3);
        let mut unit = base;
        for word in 0..8 {
            unit[word * 500..word * 500 + 8].copy_from_slice(&[0x55; 8]);
        }
        let mut out = Vec::new();
        assert!(diff(&base, &unit, &mut out).unwrap() <= 8 * (8 + 3));
        assert_eq!(diff(&base, &noise(4), &mut out), None);
    }

    #[test]
    fn what_reaches_too_far_is_refused() {
        for bad in [
            &[0, 0, 0][..],         // no new bytes
            &[0, 2, 1],             // cut short
            &[0, 1, 1, 0, 1, 1],    // a step of nothing
            &[0xff, 0x1f, 2, 1, 1], // over the end
            &[0, 1],                // too short
            &[
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1, 1,
            ],
        ] {
            assert_eq!(apply(bad, &mut noise(1)), None, "{bad:?}");
        }
        let mut unit = noise(1);
        assert_eq!(apply(&[0xff, 0x1f, 1, 9], &mut unit), Some(()));
        assert_eq!(unit[UNIT - 1], 9);
    }
}
