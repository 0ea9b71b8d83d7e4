//! Between a guest and the encoder: the bounded buffer that takes changed RAM
//! while the guest is stopped, so that a cut never waits for the WAN.
//!
//! What lies here is of one instant and is sent as it is, also when the guest has
//! written over it meanwhile: the point is what the guest was then. So nothing
//! of it can be replaced by something newer. In a round nothing lies here: units
//! are read when the session has room for them, and the session takes a batch
//! only when it leaves within a few hundred milliseconds
//! (`farhaven_wan::session::queue_bytes`); what is overwritten before it is read is
//! sent once, as it is when it is read.

use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex};

use crate::guest::{Sink, SinkError};

/// Changed units of one cut, in memory, at most `limit` bytes.
pub struct CaptureBuffer {
    limit: usize,
    bytes: Vec<u8>,
    digests: Vec<Digest>,
    runs: Vec<Run>,
}

enum Run {
    Units {
        volume: VolumeIndex,
        unit: u64,
        at: usize,
        count: usize,
    },
    Zeros {
        volume: VolumeIndex,
        unit: u64,
        count: u64,
    },
}

impl CaptureBuffer {
    /// A buffer of at most `limit` bytes of units; memory is taken as it fills.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: Vec::new(),
            digests: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// Bytes of units held.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Holds nothing.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Hands everything on, in the order it came.
    ///
    /// # Errors
    /// When the next sink refuses.
    pub fn drain_into(self, sink: &mut dyn Sink) -> Result<(), SinkError> {
        for run in &self.runs {
            match *run {
                Run::Units {
                    volume,
                    unit,
                    at,
                    count,
                } => sink.units(
                    volume,
                    unit,
                    &self.bytes[at * UNIT..(at + count) * UNIT],
                    &self.digests[at..at + count],
                )?,
                Run::Zeros {
                    volume,
                    unit,
                    count,
                } => sink.zeros(volume, unit, count)?,
            }
        }
        Ok(())
    }
}

impl Sink for CaptureBuffer {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(SinkError::Full);
        }
        let at = self.digests.len();
        self.bytes.extend_from_slice(bytes);
        self.digests.extend_from_slice(digests);
        self.runs.push(Run::Units {
            volume,
            unit,
            at,
            count: digests.len(),
        });
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        self.runs.push(Run::Zeros {
            volume,
            unit,
            count,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_buffer_refuses_and_keeps_what_it_has() {
        let mut buffer = CaptureBuffer::new(2 * UNIT);
        let two = vec![7; 2 * UNIT];
        buffer
            .units(0, 5, &two, &[Digest([1; 16]), Digest([2; 16])])
            .expect("fits");
        assert_eq!(
            buffer.units(0, 9, &two[..UNIT], &[Digest([3; 16])]),
            Err(SinkError::Full)
        );
        buffer.zeros(1, 3, 4).expect("zeros take no room");
        let mut next = CaptureBuffer::new(usize::MAX);
        buffer.drain_into(&mut next).expect("unbounded");
        assert_eq!(next.len(), 2 * UNIT);
        assert_eq!(next.runs.len(), 2);
    }
}
