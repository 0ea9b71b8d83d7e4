//! Whole numbers in as few bytes as they need: seven bits a byte, lowest first.

/// Appends `value`, at most ten bytes.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes one number off the front; `None` when there is none, or it is longer
/// than it needs to be, or over 64 bits: every number has one spelling.
pub(crate) fn take(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for at in 0..10 {
        let byte = *from.get(at)?;
        if at == 9 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            if byte == 0 && at > 0 {
                return None;
            }
            *from = from.get(at + 1..)?;
            return Some(value);
        }
    }
    None
}

/// A signed step as an unsigned number, small steps small.
pub(crate) fn zigzag(step: i64) -> u64 {
    (step << 1 ^ step >> 63) as u64
}

/// The reverse of [`zigzag`].
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Appends the step from `from` to `to`. Both are under 2^63.
pub(crate) fn put_step(out: &mut Vec<u8>, from: u64, to: u64) {
    put(out, zigzag((to as i64).wrapping_sub(from as i64)));
}

/// Takes a step from `origin`; `None` when it leads below zero or to 2^63 and over.
pub(crate) fn take_step(from: &mut &[u8], origin: u64) -> Option<u64> {
    let step = unzigzag(take(from)?);
    let to = (origin as i64).checked_add(step)?;
    u64::try_from(to).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_come_back(value: u64, from in 0u64..1 << 63, to in 0u64..1 << 63) {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            put_step(&mut bytes, from, to);
            let mut rest = &bytes[..];
            prop_assert_eq!(take(&mut rest), Some(value));
            prop_assert_eq!(take_step(&mut rest, from), Some(to));
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn any_bytes_have_one_spelling(bytes: Vec<u8>) {
            let mut rest = &bytes[..];
            if let Some(value) = take(&mut rest) {
                let mut again = Vec::new();
                put(&mut again, value);
                prop_assert_eq!(&again[..], &bytes[..bytes.len() - rest.len()]);
            }
        }
    }
}
