//! What operators ask of a site, and what it does by itself in the background.

use std::sync::Weak;
use std::time::Duration;

use super::Site;

/// How long a failover by force waits for a living source to stop its guest.
pub(super) const FENCE_WAIT: Duration = Duration::from_secs(30);

/// Why an operator's request was not done.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// No such thing.
    #[error("{0}")]
    Unknown(String),
    /// It contradicts what is.
    #[error("{0}")]
    Conflict(String),
    /// Whoever asked has no right to it.
    #[error("{0}")]
    Forbidden(String),
    /// A move would take longer than the guest's policy allows, or an evacuation
    /// longer than its deadline, and nobody accepted that: nothing was done.
    #[error("{0}")]
    TooLong(String),
    /// It went wrong.
    #[error("{0}")]
    Failed(String),
}

pub(super) fn failed(error: impl ToString) -> OperateError {
    OperateError::Failed(error.to_string())
}

/// Takes in the sites that accepted an invitation of ours.
pub(super) async fn pairings(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        let node = strong.node.clone();
        drop(strong);
        let Some(pairing) = node.pairing().await else {
            return;
        };
        let Some(site) = site.upgrade() else { return };
        if let Err(error) = site.add_peer(pairing.record) {
            tracing::error!(%error, "a pairing cannot be kept");
        }
    }
}
