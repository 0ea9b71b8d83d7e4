//! What a lost catalogue is made again from: paired sites from the notes
//! beside their stores, their guests from the points themselves, guests that
//! were taken over from the notes in their directories, and this site's own
//! from theirs ([`own`]).
//!
//! Nothing here is looked at while the catalogue has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farhaven_storage_sync::catalogue::{CatalogueError, Table};
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{PeerRecord, SiteKey};

use super::records::{Activation, StandbyRecord};
use super::remote::Remote;
use super::{Site, checked, files, hex, sound};
use crate::activate::fence::Term;
use crate::replicate::message::{CommitTerms, Opening, PointContext};

pub(super) mod own;

/// No note is longer.
const LONGEST_NOTE: u64 = 1 << 20;

/// In a guest's run directory: how it came to run here.
const ACTIVATION: &str = "activation.json";

impl Site {
    fn peer_note(&self, key: &SiteKey) -> PathBuf {
        self.config
            .store_dir()
            .join(format!("{}.peer", hex(key.as_bytes())))
    }

    /// Notes a paired site beside its store.
    pub(super) fn note_peer(&self, record: &PeerRecord) {
        let path = self.peer_note(&record.key);
        if note::<PeerRecord>(&path).is_none_or(|known| known != *record) {
            keep(&path, record);
        }
    }

    /// Before a pairing is taken out of the catalogue: a note that stays would bring it
    /// back.
    ///
    /// # Errors
    /// When the note may still be there.
    pub(super) fn drop_peer_note(&self, key: &SiteKey) -> std::io::Result<()> {
        match fs::remove_file(self.peer_note(key)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => files::sync_directory(&self.config.store_dir()),
        }
    }

    /// Paired sites that only their notes know of; they are put into the catalogue.
    pub(super) fn rebuild_peers(&self) -> Result<(), CatalogueError> {
        let known = self.catalogue.list::<PeerRecord>(Table::Peers)?;
        for entry in fs::read_dir(self.config.store_dir())
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "peer") {
                continue;
            }
            let Some(record) = note::<PeerRecord>(&path) else {
                tracing::warn!(path = %path.display(), "a paired site's note cannot be read; pair it again: farhaven pair");
                continue;
            };
            let is_known = known
                .iter()
                .any(|(_, k)| k.key == record.key || k.site == record.site);
            if is_known || self.peer_note(&record.key) != path {
                continue;
            }
            tracing::warn!(peer = %record.site, "the catalogue had lost this paired site; found beside its store");
            self.catalogue.put(Table::Peers, &record.site, &record)?;
        }
        self.catalogue.flush()
    }

    /// Guests of a peer that only their points know of; they are put into the catalogue.
    pub(super) fn rebuild_standbys(&self, remote: &Remote) -> Result<(), CatalogueError> {
        let known = self.catalogue.list::<StandbyRecord>(Table::Remote)?;
        let store = &remote.incoming.store;
        for guest in store.guests() {
            let Some(newest) = store.newest(guest) else {
                continue;
            };
            if known.iter().any(|(_, r)| r.opening.guest == guest) {
                continue;
            }
            let replica = store
                .open_point(guest, newest.point)
                .map_err(|e| e.to_string());
            let context = replica.and_then(|replica| PointContext::of(&replica));
            let context = match context {
                Ok(context) => sound::renamed(context, guest, &remote.record.site),
                Err(why) => {
                    tracing::error!(%guest, point = newest.point, why, "the catalogue had lost this guest, and its newest point does not tell of it");
                    continue;
                }
            };
            let taken = known.iter().any(|(_, r)| r.opening.name == context.name);
            let name = match taken {
                true => format!("{}-{}", context.name, &guest.to_string()[..8]),
                false => context.name,
            };
            tracing::warn!(guest = name, peer = %remote.record.site, "the catalogue had lost this guest; found by its points");
            let opening = Opening {
                guest,
                name,
                source: context.source,
                definition: context.definition,
                volumes: newest.volumes,
                term: Term {
                    group: guest,
                    number: context.term,
                    owner: remote.record.key,
                },
                warm: self.config.protect.warm,
                retention: self.config.protect.retention.clone(),
                rpo_ms: None,
                commit: CommitTerms::of(&self.config.protect),
                schedule: None,
            };
            let record = StandbyRecord {
                from: remote.record.site.clone(),
                key: Some(remote.record.key),
                opening,
                base: if context.base { newest.point } else { 0 },
                turned: false,
            };
            self.catalogue
                .put(Table::Remote, &guest.to_string(), &record)?;
        }
        self.catalogue.flush()?;
        self.rebuild_groups(remote)
    }

    /// A guest that runs here, from the note of the newest term.
    pub(super) fn noted_activation(&self, guest: GuestId) -> Option<Activation> {
        let directory = self.config.run_dir().join(guest.to_string());
        let found = fs::read_dir(directory).into_iter().flatten().flatten();
        let found = found.filter_map(|term| note::<Activation>(&term.path().join(ACTIVATION)));
        found
            .filter(|a| a.guest == guest)
            .max_by_key(|a| a.term.number)
    }
}

/// Notes a guest that runs here beside what it runs by.
pub(super) fn note_activation(activation: &Activation) {
    keep(&activation.directory().join(ACTIVATION), activation);
}

/// It does not run here any more.
pub(super) fn drop_activation_notes(site: &Arc<Site>, guest: GuestId) {
    let directory = site.config.run_dir().join(guest.to_string());
    for term in fs::read_dir(directory).into_iter().flatten().flatten() {
        // A note that comes back would tell of a guest that is gone.
        if fs::remove_file(term.path().join(ACTIVATION)).is_ok() {
            let _ = files::sync_directory(&term.path());
        }
    }
}

pub(super) fn keep<T: serde::Serialize>(path: &Path, value: &T) {
    if let Err(error) = checked::write(path, value) {
        // The catalogue has it.
        tracing::warn!(path = %path.display(), %error, "a note for a lost catalogue cannot be written");
    }
}

/// What a note says; `None`: it is not there, or damaged.
pub(super) fn note<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let read = checked::read_if_there(path, LONGEST_NOTE);
    read.unwrap_or_else(|error| {
        tracing::error!(path = %path.display(), %error, "a note for a lost catalogue cannot be read");
        None
    })
}
