//! Pairing with other sites, as operators ask for it.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_wan::{Introduction, Invitation, PeerRecord};

use crate::replicate::receive::Incoming;

use super::operate::{OperateError, failed};
use super::remote::Remote;
use super::standby::Standby;
use super::view::PeerView;
use super::{Site, SiteError};

impl Site {
    /// An invitation for another site, valid for `valid`.
    ///
    /// # Errors
    /// When no address of this site can be told to peers, or too many
    /// invitations are open.
    pub fn invite(&self, valid: Duration) -> Result<Invitation, OperateError> {
        let valid = valid.clamp(Duration::from_secs(10), Duration::from_secs(7 * 24 * 3600));
        let expires = super::unix_ns(SystemTime::now() + valid) / 1_000_000_000;
        let invitation = Invitation::new(
            &self.config.site.name,
            self.key(),
            self.addresses()?,
            expires,
        )
        .map_err(failed)?;
        self.node.invite(&invitation).map_err(failed)?;
        Ok(invitation)
    }

    /// Where peers reach this site.
    fn addresses(&self) -> Result<Vec<String>, OperateError> {
        let configured = &self.config.listen.advertise;
        if !configured.is_empty() {
            return Ok(configured.clone());
        }
        let listens = self.local_addr();
        if listens.ip().is_unspecified() {
            return Err(OperateError::Conflict(
                "this site listens on every address and does not know which one peers reach; set listen.advertise = [\"HOST:PORT\"] in its configuration, and start it again".to_owned(),
            ));
        }
        Ok(vec![listens.to_string()])
    }

    fn introduction(&self) -> Result<Introduction, OperateError> {
        // The side that accepts an invitation dials; it need not be reachable itself.
        let addresses = self.addresses().unwrap_or_default();
        Introduction::new(self.config.site.name.clone(), addresses).map_err(failed)
    }

    /// Accepts another site's invitation: both pin each other's key.
    ///
    /// # Errors
    /// When the invitation is not valid, or its site cannot be reached.
    pub async fn pair(self: &Arc<Self>, invitation: &Invitation) -> Result<PeerView, OperateError> {
        if invitation.key() == self.key() {
            return Err(OperateError::Conflict(
                "this invitation is this site's own; accept it at the other site".to_owned(),
            ));
        }
        if self.remote(invitation.site()).is_some() {
            return Err(OperateError::Conflict(format!(
                "a site named '{0}' is paired already; run: farhaven peer remove {0}",
                invitation.site()
            )));
        }
        self.may_be_called(invitation.site(), &invitation.key())?;
        let record = self
            .node
            .accept_invitation(invitation, &self.introduction()?)
            .await
            .map_err(failed)?;
        let remote = self.add_peer(record)?;
        Ok(peer_view(&remote))
    }

    pub(super) fn add_peer(
        self: &Arc<Self>,
        record: PeerRecord,
    ) -> Result<Arc<Remote>, OperateError> {
        let same_key = {
            let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
            let mut known = remotes.values();
            known.find(|known| known.record.key == record.key).cloned()
        };
        // Its store is open, and its session served, once.
        if let Some(known) = &same_key
            && known.record.site != record.site
        {
            return Err(OperateError::Conflict(format!(
                "that site is paired already, under the name '{0}'; if it has another now, run: farhaven peer remove {0}, and pair again",
                known.record.site
            )));
        }
        if let Some(known) = self.remote(&record.site)
            && known.record.key != record.key
        {
            self.node.revoke(record.key);
            return Err(OperateError::Conflict(format!(
                "another site named '{0}' is paired already; run: farhaven peer remove {0}, or give the new one another name",
                record.site
            )));
        }
        if record.site == self.config.site.name {
            self.node.revoke(record.key);
            return Err(OperateError::Conflict(format!(
                "the other site has this one's name, '{}'; give one of them another",
                record.site
            )));
        }
        if same_key.is_none() {
            if let Err(taken) = self.may_be_called(&record.site, &record.key) {
                self.node.revoke(record.key);
                return Err(taken);
            }
            // What was found in the store of another site of that name is none of its.
            self.scrubs.forget(&record.site);
        }
        self.catalogue
            .put(Table::Peers, &record.site, &record)
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        if let Some(known) = same_key {
            tracing::info!(peer = %record.site, "paired again; it had lost its side of the pairing");
            self.node.trust(record);
            return Ok(known);
        }
        tracing::info!(peer = %record.site, key = %record.key, "paired");
        let remote = self.trust(record).map_err(failed)?;
        self.rebind_standbys(&remote);
        tokio::spawn(remote.clone().serve(Arc::downgrade(self)));
        Ok(remote)
    }

    /// Ends a pairing. Its guests must not be protected to it any more.
    ///
    /// # Errors
    /// When there is no such peer, or guests are still protected to it.
    pub fn remove_peer(&self, name: &str) -> Result<(), OperateError> {
        let remote = self.remote(name).ok_or_else(|| self.no_peer(name))?;
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        let mut all = drivers.values();
        if let Some(driver) = all.find(|driver| driver.to == remote.record.key) {
            let guest = driver.view.borrow().name.clone();
            return Err(OperateError::Conflict(format!(
                "'{guest}' is protected to '{name}'; run first: farhaven unprotect {guest}"
            )));
        }
        drop(drivers);
        self.drop_peer_note(&remote.record.key)
            .map_err(|error| failed(format!("the note of '{name}' cannot be removed: {error}")))?;
        self.catalogue.remove(Table::Peers, name).map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        self.node.revoke(remote.record.key);
        self.removed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(remote.record.key, remote.incoming.store.clone());
        self.remotes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        Ok(())
    }

    /// Opens what a paired site sent, and its session; [`Remote::serve`] begins to speak.
    pub(super) fn trust(self: &Arc<Self>, record: PeerRecord) -> Result<Arc<Remote>, SiteError> {
        let before = self
            .removed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&record.key);
        let store = match before {
            Some(store) => store,
            None => self.open_store(&record)?,
        };
        self.note_peer(&record);
        let peer = self.node.trust(record.clone());
        let incoming = Incoming::start(
            store,
            peer.clone(),
            self.store_directory(&record.key),
            self.config.store.min_free.bytes(),
        );
        let remote = Arc::new(Remote::new(record.clone(), peer, incoming));
        self.remotes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(record.site, remote.clone());
        Ok(remote)
    }

    /// Opens what a site sent.
    fn open_store(&self, record: &PeerRecord) -> Result<Store, SiteError> {
        let options = StoreOptions {
            segment_bytes: self.config.store.segment_bytes.bytes(),
            hint_bytes: usize::try_from(self.config.store.index_bytes.bytes())
                .unwrap_or(usize::MAX),
            ..StoreOptions::default()
        };
        let directory = self.store_directory(&record.key);
        let (store, report) = Store::open_on(self.disk.clone(), &directory, options)?;
        for damaged in &report.damaged {
            tracing::error!(peer = %record.site, path = %damaged.path.display(), why = damaged.why, "a point cannot be restored");
        }
        self.scrubs.opened(&record.site, &report);
        Ok(store)
    }

    /// Guests of a site that was paired before go by the new pairing.
    fn rebind_standbys(self: &Arc<Self>, remote: &Arc<Remote>) {
        let mut standbys = self
            .standbys
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let of_site = |s: &Standby| {
            s.remote().record.key == remote.record.key && !Arc::ptr_eq(s.remote(), remote)
        };
        for standby in standbys.values_mut().filter(|standby| of_site(standby)) {
            let bound = standby.bound_to(self, remote.clone());
            if let Err(error) = self.keep_standby(&bound) {
                tracing::error!(guest = %bound.name(), %error, "the catalogue cannot be written");
            }
            *standby = bound;
        }
    }

    pub(super) fn no_peer(&self, name: &str) -> OperateError {
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let known: Vec<_> = remotes.keys().map(String::as_str).collect();
        OperateError::Unknown(match known.as_slice() {
            [] => format!("no site is paired; pair '{name}' first: farhaven pair"),
            known => format!("no site '{name}' is paired; known: {}", known.join(", ")),
        })
    }
}

pub(super) fn peer_view(remote: &Remote) -> PeerView {
    let link = remote.peer.status();
    let asked = remote.begun().map(|outgoing| outgoing.asking.counts());
    let (asked_units, found_units) = asked.unwrap_or_default();
    PeerView {
        site: remote.record.site.clone(),
        key: remote.record.key.to_string(),
        addresses: remote.record.addresses.clone(),
        connected: remote.alive(),
        rtt_ms: link.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
        sent_bytes: link.udp_tx_bytes,
        received_bytes: link.udp_rx_bytes,
        lost_packets: link.lost_packets,
        sent_packets: link.sent_packets,
        resent_bytes: link.data_resent_bytes,
        repeated_bytes: link.data_repeated_bytes,
        queued_bytes: link.queued_bytes,
        last_disconnect: link.why_last_disconnect.unwrap_or_default(),
        trouble: remote.trouble(),
        asked_units,
        found_units,
    }
}
