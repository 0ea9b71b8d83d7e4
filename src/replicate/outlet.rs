//! Where the changes of one point go: over the link, or into a seed.

use std::time::Duration;

use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex};

use super::send::{Shipment, Shipped};
use crate::guest::{Sink, SinkError};

/// Takes everything that belongs to one point.
pub trait Outlet: Sink {
    /// Key of the digests that [`Sink::units`] gets.
    fn key(&self) -> &DigestKey;

    /// Lets go of what is still being collected.
    ///
    /// # Errors
    /// When nobody takes it any more.
    fn flush(&mut self) -> Result<(), SinkError>;

    /// What was taken so far, and the chain over it, for the seal.
    fn sum(&self) -> (Shipped, [u8; 32]);

    /// A cut waits for the disks: data that does not go out for long is worth
    /// an end now.
    fn hurry(&mut self, hurry: bool) {
        let _ = hurry;
    }

    /// Takes the changed units of the device state. `known` is the state as
    /// the peer has it after this; padded with zeros to whole units.
    ///
    /// # Errors
    /// As for [`Sink::units`].
    fn device_state(
        &mut self,
        volume: VolumeIndex,
        state: &[u8],
        known: &mut Vec<Digest>,
    ) -> Result<(), SinkError> {
        let mut padded = state.to_vec();
        padded.resize(state.len().next_multiple_of(UNIT), 0);
        let mut digests = Vec::new();
        self.key().digests(&padded, &mut digests);
        for (unit, (bytes, digest)) in padded.chunks_exact(UNIT).zip(&digests).enumerate() {
            if known.get(unit) != Some(digest) {
                self.units(volume, unit as u64, bytes, std::slice::from_ref(digest))?;
            }
        }
        *known = digests;
        Ok(())
    }
}

/// While the guest waits for nothing, the copy-before-write images of a cut
/// grow with every write: give the cut up when the link takes no data for so long.
const STALLED: Duration = Duration::from_secs(20);

impl Outlet for Shipment {
    fn key(&self) -> &DigestKey {
        Shipment::key(self)
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        Shipment::flush(self)
    }

    fn sum(&self) -> (Shipped, [u8; 32]) {
        Shipment::sum(self)
    }

    fn hurry(&mut self, hurry: bool) {
        self.patience(hurry.then_some(STALLED));
    }
}
