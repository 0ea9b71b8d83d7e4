//! Units on their way to a sink, from RAM and disks alike: their digests, and
//! runs of them that are wanted.

use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex};

use super::super::{Sink, SinkError};

/// Computes digests under the session's key.
pub(super) use farhaven_storage_sync::digest::DigestKey as Hasher;

/// Hands over the units of `bytes` for which `wanted` holds, zeros as zeros.
pub(in crate::guest) fn hand_over(
    sink: &mut dyn Sink,
    volume: VolumeIndex,
    first: u64,
    bytes: &[u8],
    digests: &[Digest],
    wanted: impl Fn(u64, Digest) -> bool,
) -> Result<(), SinkError> {
    let mut at = 0;
    while at < digests.len() {
        let zero = digests[at] == Digest::ZERO_UNIT;
        let is_run = |i: usize| {
            (digests[i] == Digest::ZERO_UNIT) == zero && wanted(first + i as u64, digests[i])
        };
        let count = (at..digests.len()).take_while(|i| is_run(*i)).count();
        if count == 0 {
            at += 1;
            continue;
        }
        let unit = first + at as u64;
        if zero {
            sink.zeros(volume, unit, count as u64)?;
        } else {
            let end = at + count;
            sink.units(
                volume,
                unit,
                &bytes[at * UNIT..end * UNIT],
                &digests[at..end],
            )?;
        }
        at += count;
    }
    Ok(())
}
