//! A model of the peer: what was handed over is what it holds.

use farhaven::guest::{Sink, SinkError};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, UNIT, Volume, VolumeIndex, VolumeKind};

/// The key of the digests.
pub const KEY: [u8; 32] = [42; 32];

/// The peer's copy of a guest, and a sink that may refuse.
#[derive(Clone)]
pub struct Model {
    /// Each RAM block and disk, padded to whole units.
    pub volumes: Vec<Vec<u8>>,
    /// Units that were handed over and are not told as zeros.
    pub units: u64,
    /// Refuses every call after so many units...
    pub refuse_after: u64,
    /// ...with this.
    pub refuse_with: SinkError,
    key: DigestKey,
}

impl Model {
    /// A peer that holds nothing of these volumes.
    pub fn new(volumes: &[Volume]) -> Self {
        let bytes = |v: &Volume| vec![0; (v.units() as usize) * UNIT];
        Self {
            volumes: volumes
                .iter()
                .filter(|v| v.kind != VolumeKind::DeviceState)
                .map(bytes)
                .collect(),
            units: 0,
            refuse_after: u64::MAX,
            refuse_with: SinkError::Full,
            key: DigestKey::new(KEY),
        }
    }

    /// The same, but it refuses after so many more units.
    pub fn refusing(&self, more: u64, with: SinkError) -> Self {
        Self {
            refuse_after: self.units + more,
            refuse_with: with,
            ..self.clone()
        }
    }

    /// What a peer tells of a volume to a source that has restarted.
    pub fn digests(&self, volume: usize) -> Vec<Digest> {
        let mut digests = Vec::new();
        self.key.digests(&self.volumes[volume], &mut digests);
        digests
    }

    /// Bit for bit the same.
    #[track_caller]
    pub fn assert_is(&self, content: &[Vec<u8>]) {
        assert_eq!(self.volumes.len(), content.len());
        for (index, (is, model)) in content.iter().zip(&self.volumes).enumerate() {
            assert_same(&format!("volume {index}"), is, model);
        }
    }

    /// Units in all volumes.
    pub fn whole(&self) -> u64 {
        self.volumes.iter().map(|v| (v.len() / UNIT) as u64).sum()
    }
}

impl Sink for Model {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        assert_eq!(bytes.len(), digests.len() * UNIT);
        if self.units + digests.len() as u64 > self.refuse_after {
            self.units = self.refuse_after;
            return Err(self.refuse_with);
        }
        self.units += digests.len() as u64;
        let mut right = Vec::new();
        self.key.digests(bytes, &mut right);
        assert_eq!(digests, right, "digests of volume {volume}, unit {unit}");
        let at = unit as usize * UNIT;
        self.volumes[usize::from(volume)][at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        if self.units >= self.refuse_after {
            return Err(self.refuse_with);
        }
        let at = unit as usize * UNIT;
        self.volumes[usize::from(volume)][at..at + count as usize * UNIT].fill(0);
        Ok(())
    }
}

/// The same bytes, or which units differ.
#[track_caller]
pub fn assert_same(what: &str, is: &[u8], model: &[u8]) {
    assert_eq!(is.len(), model.len(), "{what}");
    let differ: Vec<usize> = is
        .chunks(UNIT)
        .zip(model.chunks(UNIT))
        .enumerate()
        .filter_map(|(i, (a, b))| (a != b).then_some(i))
        .collect();
    assert!(
        differ.is_empty(),
        "{what}: {} units differ, first {:?}",
        differ.len(),
        &differ[..differ.len().min(5)]
    );
}
