//! What an honest site may tell of volumes and points.

use farhaven_storage_sync::unit::{Volume, VolumeKind};

use super::Opened;

/// Most bytes of a guest's device state.
pub const MOST_DEVICE_STATE: u64 = 256 << 20;

/// A volume that an honest site may tell of: its name and its size can be worked with.
pub fn sound_volume(volume: &Volume) -> bool {
    const MOST: u64 = 1 << 50;
    const LONGEST_NAME: usize = 255;
    let name = &volume.name;
    let named = name.len() <= LONGEST_NAME && !name.contains(char::is_control);
    let workable = match volume.kind {
        VolumeKind::DeviceState => volume.bytes <= MOST_DEVICE_STATE,
        VolumeKind::Ram | VolumeKind::Disk => volume.bytes <= MOST,
    };
    named && workable
}

impl Opened {
    /// Are these numbers that an honest site gives?
    pub fn is_sound(&self) -> bool {
        const MOST: u64 = 1 << 56;
        self.newest < MOST
            && self.next_point < MOST
            && self.last_seq < MOST
            && self.volumes.iter().all(sound_volume)
    }
}
