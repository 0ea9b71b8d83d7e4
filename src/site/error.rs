//! Why a site does not start.

use std::path::PathBuf;

use farhaven_storage_sync::catalogue::CatalogueError;
use farhaven_storage_sync::store::StoreError;
use farhaven_wan::link::StartError;
use farhaven_wan::peer::IdentityError;

use super::limits;
use crate::activate::fence::FenceError;
use crate::activate::nbd::NbdError;

/// Why a site does not start.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Its directory.
    #[error(
        "{path} cannot be written ({source}); give this user a directory of its own there, or name another in {key}"
    )]
    Directory {
        /// Which.
        path: PathBuf,
        /// What names it in the configuration.
        key: &'static str,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Its key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its network.
    #[error(transparent)]
    Node(StartError),
    /// Its port.
    #[error(
        "listen.address is {address}, but {source}; `ss -lunp 'sport = :{}'` shows who has the port. End that, or name another address",
        address.port()
    )]
    Listen {
        /// As configured.
        address: std::net::SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Its catalogue.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its terms.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The time zone of its windows.
    #[error(transparent)]
    Zone(#[from] limits::ZoneError),
    /// Its exports of points.
    #[error(transparent)]
    Exports(#[from] NbdError),
}

impl From<StartError> for SiteError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Listen { address, source } => Self::Listen { address, source },
            other => Self::Node(other),
        }
    }
}
