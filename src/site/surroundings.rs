//! What a site is put into: who builds its guests, the disk of its stores, its
//! way to its peers. The system's own, unless a simulation brings others.

use std::path::Path;
use std::sync::Arc;

use farhaven_storage_sync::catalogue::{Catalogue, CatalogueError, CatalogueReport};
use farhaven_storage_sync::disk::{Disk, SystemDisk};
use farhaven_wan::link::{Port, StartError};
use farhaven_wan::{Identity, Node, NodeOptions};

use crate::activate::machine::Builders;

/// What a site is put into.
pub struct Surroundings {
    /// Who builds the embedded guests that peers send here, by their kind.
    pub builders: Builders,
    /// What the stores are on, and the catalogue's journal.
    pub disk: Arc<dyn Disk>,
    /// What peers are reached through; `None`: a UDP socket.
    pub port: Option<Arc<dyn Port>>,
    /// Whether the catalogue's rows are in sled, which takes no other disk than
    /// the system's, or in memory.
    pub sled: bool,
}

impl Surroundings {
    /// The system's.
    pub fn of_system(builders: Builders) -> Self {
        Self {
            builders,
            disk: Arc::new(SystemDisk),
            port: None,
            sled: true,
        }
    }

    pub(super) fn catalogue(
        &self,
        directory: &Path,
    ) -> Result<(Catalogue, CatalogueReport), CatalogueError> {
        let disk = self.disk.clone();
        match self.sled {
            true => Catalogue::open_on(disk, directory, &directory.join("catalogue.sled")),
            false => Catalogue::open_in_memory(disk, directory),
        }
    }

    pub(super) fn node(
        &self,
        identity: &Identity,
        options: NodeOptions,
    ) -> Result<Node, StartError> {
        match &self.port {
            Some(port) => Node::start_on(identity, options, port.clone()),
            None => Node::start(identity, options),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
pub(super) mod tests;
