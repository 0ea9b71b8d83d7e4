//! A recovery point's parts as a machine takes them: disks as block devices,
//! device state as bytes.

use std::io;
use std::sync::Arc;

use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::{UNIT, Volume, VolumeIndex, VolumeKind};

use super::nbd::BlockSource;
use crate::site::ActivateError;

/// A disk of a point, as a block device.
pub(super) struct PointDisk {
    replica: Arc<Replica>,
    volume: VolumeIndex,
    bytes: u64,
    /// What is not zero, ascending: (first unit, count).
    stored: Vec<(u64, u64)>,
}

impl PointDisk {
    pub(super) fn new(replica: &Arc<Replica>, volume: VolumeIndex, bytes: u64) -> Self {
        let stored = replica.nonzero_runs(volume).collect();
        Self {
            replica: replica.clone(),
            volume,
            bytes,
            stored,
        }
    }
}

impl BlockSource for PointDisk {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let unit = UNIT as u64;
        let first = offset / unit;
        let count = (offset + buf.len() as u64).div_ceil(unit) - first;
        let failed =
            |e: farhaven_storage_sync::replica::ReplicaError| io::Error::other(e.to_string());
        if offset.is_multiple_of(unit) && buf.len().is_multiple_of(UNIT) {
            return self
                .replica
                .read(self.volume, first, count, buf)
                .map_err(failed);
        }
        let mut whole = vec![0; count as usize * UNIT];
        self.replica
            .read(self.volume, first, count, &mut whole)
            .map_err(failed)?;
        let skip = (offset - first * unit) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        let unit = UNIT as u64;
        let end = offset + length;
        let mut found = Vec::new();
        let mut at = offset;
        let from = self
            .stored
            .partition_point(|(first, count)| (first + count) * unit <= offset);
        for (first, count) in &self.stored[from..] {
            let (start, stop) = ((first * unit).min(end), ((first + count) * unit).min(end));
            if start >= end {
                break;
            }
            if start > at {
                found.push((start - at, true));
                at = start;
            }
            found.push((stop - at, false));
            at = stop;
        }
        if at < end {
            found.push((end - at, true));
        }
        found
    }
}

/// Each of a guest's disks in a point, and its size.
pub(super) fn disks(
    replica: &Replica,
    wanted: &[(&str, u64)],
) -> Result<Vec<(VolumeIndex, u64)>, ActivateError> {
    let find = |(name, bytes): &(&str, u64)| {
        let volumes = (0..).zip(replica.volumes());
        let mut disks = volumes.filter(|(_, v)| v.kind == VolumeKind::Disk && v.name == *name);
        let (index, _) = disks.next().ok_or_else(|| {
            let point = replica.header().point;
            ActivateError::Context(point, format!("it has no disk {name}"))
        })?;
        Ok((index, *bytes))
    };
    wanted.iter().map(find).collect()
}

/// Those disks as block devices.
pub(super) fn sources(
    replica: &Arc<Replica>,
    disks: &[(VolumeIndex, u64)],
) -> Vec<Arc<dyn BlockSource>> {
    let source = |(volume, bytes): &(VolumeIndex, u64)| {
        Arc::new(PointDisk::new(replica, *volume, *bytes)) as Arc<dyn BlockSource>
    };
    disks.iter().map(source).collect()
}

/// Do these volumes hold disks alone, so that a guest boots from them?
pub(crate) fn boots(volumes: &[Volume]) -> bool {
    !volumes.iter().any(|volume| volume.kind == VolumeKind::Ram)
}

/// What the guest was beside memory and disks.
pub(super) fn device_state(replica: &Replica) -> Result<Vec<u8>, ActivateError> {
    let found = (0..)
        .zip(replica.volumes())
        .find(|(_, volume)| volume.kind == VolumeKind::DeviceState);
    let Some((index, volume)) = found else {
        let point = replica.header().point;
        return Err(ActivateError::Context(
            point,
            "it holds no device state".to_owned(),
        ));
    };
    let mut state = vec![0; volume.units() as usize * UNIT];
    replica.read(index, 0, volume.units(), &mut state)?;
    state.truncate(volume.bytes as usize);
    Ok(state)
}
