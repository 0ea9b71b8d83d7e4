//! What operators ask of a site, and what it does by itself in the background.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use super::Site;
use super::standby::Standby;

/// How often points are looked through for those past their time.
const PRUNE_EVERY: Duration = Duration::from_secs(30);

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

/// Drops points past their time, and frees what nothing refers to any more.
pub(super) async fn prune(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        let pause = strong.prune_pause();
        drop(strong);
        tokio::time::sleep(pause).await;
        let Some(site) = site.upgrade() else { return };
        let mut by_peer: BTreeMap<String, Vec<Arc<Standby>>> = BTreeMap::new();
        for standby in site
            .standbys
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
        {
            by_peer.entry(standby.from()).or_default().push(standby);
        }
        for (peer, standbys) in by_peer {
            if let Some(remote) = site.remote(&peer)
                && let Err(error) = super::guests::prune_store(&remote, &standbys).await
            {
                tracing::warn!(peer, error, "old points were not pruned");
            }
        }
    }
}

impl Site {
    /// Points that are kept for seconds are looked at every few seconds.
    fn prune_pause(&self) -> Duration {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let shortest = standbys
            .values()
            .map(|s| s.opening().retention.all.duration())
            .min();
        let shortest = shortest.unwrap_or(PRUNE_EVERY);
        (shortest / 2).clamp(Duration::from_secs(2), PRUNE_EVERY)
    }
}
