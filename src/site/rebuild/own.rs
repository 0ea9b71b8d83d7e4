//! Notes of this site's own guests, and of how they are protected: one file
//! each beside the catalogue, which is what counts while it has them.
//!
//! A site that forgot a guest of its own could be told to run it once more, from
//! old points of another site, or not stop it when it runs elsewhere. So a note is
//! written before the catalogue and goes before it: with the catalogue lost, a
//! note is as new as anything that was acted upon.

use std::fs;
use std::path::PathBuf;

use farhaven_storage_sync::catalogue::{CatalogueError, Table};
use farhaven_storage_sync::unit::GuestId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::records::{GuestRecord, Protection};
use super::super::{Site, checked, files};
use super::{LONGEST_NOTE, note};

/// Where they are, below a site's directory.
pub(in crate::site) const OWN_NOTES: &str = "guests";

/// How the notes end.
const GUEST: &str = "guest";
const PROTECTION: &str = "protection";

impl Site {
    fn own_notes(&self) -> PathBuf {
        self.config.site.state_dir.join(OWN_NOTES)
    }

    fn own_note(&self, guest: GuestId, kind: &str) -> PathBuf {
        self.own_notes().join(format!("{guest}.{kind}"))
    }

    /// Writes a note, unless it is there as it is. One that cannot be written is
    /// removed: a stale one would be worse than none.
    fn keep_own_note<T: Serialize>(&self, guest: GuestId, kind: &str, value: &T) {
        let path = self.own_note(guest, kind);
        let written = checked::text(value).and_then(|text| {
            let same = fs::metadata(&path).is_ok_and(|m| m.len() <= LONGEST_NOTE)
                && fs::read(&path).is_ok_and(|known| known == text.as_bytes());
            match same {
                true => Ok(()),
                false => files::replace(&path, text.as_bytes()),
            }
        });
        if let Err(error) = written {
            // The catalogue has it.
            tracing::warn!(path = %path.display(), %error, "a note for a lost catalogue cannot be written");
            let _ = fs::remove_file(&path);
        }
    }

    /// Before a guest of this site is written into the catalogue.
    pub(in crate::site) fn note_guest(&self, record: &GuestRecord) {
        self.keep_own_note(record.id, GUEST, record);
    }

    /// Before a protection is written into the catalogue.
    pub(in crate::site) fn note_protection(&self, protection: &Protection) {
        self.keep_own_note(protection.guest, PROTECTION, protection);
    }

    /// Before a protection is taken out of the catalogue.
    pub(in crate::site) fn drop_protection_note(&self, guest: GuestId) {
        self.drop_own_note(guest, PROTECTION);
    }

    /// Before a guest and its protection are taken out of the catalogue.
    pub(in crate::site) fn drop_guest_notes(&self, guest: GuestId) {
        // A protection without its guest says nothing.
        self.drop_own_note(guest, GUEST);
        self.drop_own_note(guest, PROTECTION);
    }

    fn drop_own_note(&self, guest: GuestId, kind: &str) {
        let path = self.own_note(guest, kind);
        let gone = match fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            gone => gone.and_then(|()| files::sync_directory(&self.own_notes())),
        };
        if let Err(error) = gone {
            tracing::error!(path = %path.display(), %error, "a note of a guest that is none of this site's any more stays; remove it by hand, or a lost catalogue brings it back");
        }
    }

    /// Guests of this site that only their notes know of go into the catalogue;
    /// those of the catalogue that have no note get one.
    pub(in crate::site) fn rebuild_own(&self) -> Result<(), CatalogueError> {
        let mut guests = self.catalogue.list::<GuestRecord>(Table::Guests)?;
        let protections = self.catalogue.list::<Protection>(Table::Protections)?;
        guests
            .iter()
            .for_each(|(_, record)| self.note_guest(record));
        protections
            .iter()
            .for_each(|(_, protection)| self.note_protection(protection));
        for id in self.noted(GUEST) {
            if guests.iter().any(|(_, known)| known.id == id) {
                continue;
            }
            let Some(mut record) = self.read_own::<GuestRecord>(id, GUEST) else {
                continue;
            };
            if guests.iter().any(|(_, known)| known.name == record.name) {
                record.name = format!("{}-{}", record.name, &id.to_string()[..8]);
            }
            tracing::warn!(
                guest = record.name,
                "the catalogue had lost this guest; found by its note"
            );
            self.catalogue
                .put(Table::Guests, &id.to_string(), &record)?;
            guests.push((id.to_string(), record));
        }
        for id in self.noted(PROTECTION) {
            let known = protections.iter().any(|(_, known)| known.guest == id);
            if known || !guests.iter().any(|(_, record)| record.id == id) {
                continue;
            }
            if let Some(protection) = self.read_own::<Protection>(id, PROTECTION) {
                self.catalogue
                    .put(Table::Protections, &id.to_string(), &protection)?;
            }
        }
        self.catalogue.flush()
    }

    /// Guests that have a note of this kind.
    fn noted(&self, kind: &str) -> Vec<GuestId> {
        let entries = fs::read_dir(self.own_notes()).into_iter().flatten();
        let named = entries.flatten().filter_map(|entry| {
            let name = entry.file_name();
            let id = name.to_str()?.strip_suffix(kind)?.strip_suffix('.')?;
            id.parse().ok()
        });
        named.collect()
    }

    fn read_own<T: DeserializeOwned + Of>(&self, guest: GuestId, kind: &str) -> Option<T> {
        let path = self.own_note(guest, kind);
        let read = note::<T>(&path).filter(|read| read.of() == guest);
        if read.is_none() {
            tracing::error!(path = %path.display(), "the catalogue had lost this guest, and its note cannot be read: it may run here, unprotected. Look for it, and add it again: farhaven guest add");
        }
        read
    }
}

/// What is of one guest.
trait Of {
    fn of(&self) -> GuestId;
}

impl Of for GuestRecord {
    fn of(&self) -> GuestId {
        self.id
    }
}

impl Of for Protection {
    fn of(&self) -> GuestId {
        self.guest
    }
}
