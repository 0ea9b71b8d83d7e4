//! QEMU guests, attached through their QMP socket.
//!
//! [`QemuGuest`] reads RAM from the shared RAM files by content (`scan`), disks
//! through QEMU's own NBD server by dirty bitmap (`disk`, `tracking`,
//! `nbd_client`), device state from a refused migration (`stream`), and joins
//! them to one instant (`cut`). What an earlier session left is cleared at the
//! attach (`attach`).

use std::path::PathBuf;
use std::time::Duration;

use farhaven_storage_sync::unit::{Digest, Volume, VolumeIndex, VolumeKind};
use serde_json::json;

use super::{After, Cut, Guest, GuestError, Sink};
use attach::{Before, CUT_MARK, HELD_MARK};
use disk::{Disk, View};
use qmp::Qmp;
use scan::RamBlock;
use tracking::Bits;

mod attach;
mod cut;
mod disk;
pub mod nbd_client;
pub mod qmp;
mod template;
