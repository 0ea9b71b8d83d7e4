//! What is left of copies that were stopped for good: listed, and discarded.
//!
//! Of three kinds: the copy of a guest that was moved or taken over and may be
//! rolled back to here; what that became when the guest turned round; and what
//! a takeover left here that was stopped, or replaced by another.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;

use super::super::hosted::lock;
use super::super::operate::{OperateError, failed};
use super::super::records::{EvidenceRecord, GuestRecord, Protection};
use super::super::{Site, guests};
use super::copy::{end_qemu, qemu_lives};
use super::view::{Discarded, EvidenceView};
use crate::guest::Definition;

/// The key of evidence in the catalogue.
pub(super) fn key(guest: GuestId, term: u64) -> String {
    format!("{guest}/t{term}")
}

/// One piece of evidence, with what it takes to work with it.
pub(super) struct Piece {
    pub(super) view: EvidenceView,
    /// Its definition, where it is known.
    pub(super) record: Option<GuestRecord>,
    /// What is of it beside the directory of the view: where a guest came home from a
    /// takeover it has its disks and consoles in the one, and its sockets in the other.
    beside: Option<PathBuf>,
    kind: Kind,
}

impl Piece {
    /// Where its files are.
    pub(super) fn directories(&self) -> impl Iterator<Item = &Path> {
        let beside = self.beside.as_deref();
        std::iter::once(self.view.directory.as_path()).chain(beside)
    }
}

/// The directory of a copy, and what is beside it; by its record, and by where it has its
/// sockets.
fn places_of(record: &GuestRecord, sockets: PathBuf) -> (PathBuf, Option<PathBuf>) {
    match &record.run {
        Some(home) => (home.clone(), Some(sockets)),
        None => (sockets, None),
    }
}

enum Kind {
    /// Still a guest of this site, moved or fenced.
    Copy,
    /// Set aside when the guest turned round.
    Aside(Box<EvidenceRecord>),
    /// Left by a takeover.
    Left,
}

impl Site {
    /// Every copy of a guest that is kept here and does not run any more.
    pub fn evidence(&self) -> Vec<EvidenceView> {
        self.pieces().into_iter().map(|piece| piece.view).collect()
    }

    pub(super) fn pieces(&self) -> Vec<Piece> {
        let mut pieces = self.stopped_copies();
        pieces.extend(self.set_aside());
        let homes = pieces.iter().filter_map(|p| p.record.as_ref()?.run.clone());
        let known: Vec<PathBuf> = homes.collect();
        pieces.extend(self.left_by_takeovers(&known));
        pieces.sort_by(|a, b| (&a.view.guest, &a.view.copy).cmp(&(&b.view.guest, &b.view.copy)));
        pieces
    }

    fn stopped_copies(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for record in self.guest_records() {
            let kept: Option<Protection> = self
                .catalogue
                .find(Table::Protections, &record.id.to_string())
                .unwrap_or_default();
            let Some(kept) = kept.filter(|kept| kept.moved.is_some() || kept.stopped) else {
                continue;
            };
            let unchanged = kept.moved.is_some();
            let alive = guests::copy_runs(self, &record).is_ok_and(|runs| runs.is_some());
            let what = match (unchanged, kept.committed) {
                (true, false) => format!("as it was when it was moved to '{}'", kept.to),
                (true, true) => format!(
                    "as it was when it was moved to '{}', committed there",
                    kept.to
                ),
                (false, _) => format!(
                    "stopped when it was taken over at '{}'; it may hold what is nowhere else",
                    kept.to
                ),
            };
            let (directory, beside) = places_of(&record, self.run_directory(record.id));
            pieces.push(Piece {
                view: EvidenceView {
                    guest: record.name.clone(),
                    id: record.id.to_string(),
                    copy: "source".to_owned(),
                    what,
                    alive,
                    unchanged,
                    needed: !kept.committed,
                    qmp: record.qmp.clone().filter(|_| alive),
                    bytes: size_of(&directory) + beside.as_deref().map_or(0, size_of),
                    directory,
                },
                record: Some(record),
                beside,
                kind: Kind::Copy,
            });
        }
        pieces
    }

    fn set_aside(&self) -> Vec<Piece> {
        let listed = self.catalogue.list::<EvidenceRecord>(Table::Evidence);
        let listed = listed.unwrap_or_else(|error| {
            tracing::error!(%error, "the catalogue cannot be read");
            Vec::new()
        });
        let pieces = listed.into_iter().map(|(key, kept)| {
            let alive = match &kept.record.qmp {
                Some(qmp) => qemu_lives(qmp),
                None => self.kept_vmm(&key).is_some(),
            };
            let what = match kept.unchanged {
                true => "moved away, and protected to here since".to_owned(),
                false => "stopped by a failover; it may hold what is nowhere else".to_owned(),
            };
            let (directory, beside) = places_of(&kept.record, kept.directory.clone());
            Piece {
                view: EvidenceView {
                    guest: kept.record.name.clone(),
                    id: kept.record.id.to_string(),
                    copy: format!("t{}", kept.term),
                    what,
                    alive,
                    unchanged: kept.unchanged,
                    needed: false,
                    qmp: kept.record.qmp.clone().filter(|_| alive),
                    bytes: size_of(&directory) + beside.as_deref().map_or(0, size_of),
                    directory,
                },
                record: Some(kept.record.clone()),
                beside,
                kind: Kind::Aside(Box::new(kept)),
            }
        });
        pieces.collect()
    }

    /// Directories of takeovers that nothing runs from.
    fn left_by_takeovers(&self, known: &[PathBuf]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let homes: Vec<PathBuf> = self
            .guest_records()
            .into_iter()
            .filter_map(|r| r.run)
            .collect();
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        for standby in standbys.values() {
            let id = standby.guest.to_string();
            let active = standby.active();
            let running = active.as_ref().map(|active| active.directory().to_owned());
            let all = std::fs::read_dir(self.config.run_dir().join(&id));
            for entry in all.into_iter().flatten().flatten() {
                let directory = entry.path();
                let name = entry.file_name().to_string_lossy().into_owned();
                let number = name.strip_prefix('t');
                let taken_over =
                    number.is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()));
                let used = running.as_ref() == Some(&directory)
                    || homes.contains(&directory)
                    || known.contains(&directory);
                if !taken_over || used || standby.is_ready_in(&directory) {
                    continue;
                }
                let qmp = directory.join("qmp.sock");
                let alive = qemu_lives(&qmp);
                pieces.push(Piece {
                    view: EvidenceView {
                        guest: standby.name(),
                        id: id.clone(),
                        copy: name,
                        what: "left of a takeover here that was stopped or replaced".to_owned(),
                        alive,
                        unchanged: false,
                        needed: false,
                        qmp: alive.then_some(qmp),
                        bytes: size_of(&directory),
                        directory,
                    },
                    record: None,
                    beside: None,
                    kind: Kind::Left,
                });
            }
        }
        pieces
    }

    pub(super) fn kept_vmm(&self, key: &str) -> Option<crate::guest::embedded::SharedVmm> {
        let kept = self
            .turns
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        kept.get(key).cloned()
    }

    /// The pieces of a guest, or the one of them that `copy` names.
    pub(super) fn pieces_of(
        &self,
        name: &str,
        copy: Option<&str>,
    ) -> Result<Vec<Piece>, OperateError> {
        let mut pieces = self.pieces();
        pieces.retain(|p| p.view.guest == name && copy.is_none_or(|copy| p.view.copy == copy));
        match pieces.is_empty() {
            true => Err(OperateError::Unknown(format!(
                "no evidence of '{name}' is kept here; see: farhaven evidence list"
            ))),
            false => Ok(pieces),
        }
    }

    /// Ends the stopped copies of a guest that are kept here (or the one named),
    /// and removes what this site has of them. Files of the operator's own, like
    /// the disk images of a QEMU that was not started here, stay.
    ///
    /// # Errors
    /// When there is none, or a copy is needed for a rollback and `force` is not set.
    pub async fn discard_evidence(
        self: &Arc<Self>,
        name: &str,
        copy: Option<&str>,
        force: bool,
    ) -> Result<Discarded, OperateError> {
        let (site, asked, copy) = (self.clone(), name.to_owned(), copy.map(str::to_owned));
        let pieces = crate::work::spawn_blocking(move || site.pieces_of(&asked, copy.as_deref()));
        let pieces = pieces.await.map_err(failed)??;
        if let Some(needed) = pieces.iter().find(|p| p.view.needed).filter(|_| !force) {
            return Err(OperateError::Conflict(format!(
                "this copy of '{name}' ({}) is what a rollback returns to until it is committed where it runs (there: farhaven commit {name}). To discard it all the same: --force",
                needed.view.what
            )));
        }
        let mut discarded = Discarded {
            guest: name.to_owned(),
            removed: Vec::new(),
            left: Vec::new(),
        };
        for piece in pieces {
            self.discard_piece(piece, &mut discarded).await?;
        }
        Ok(discarded)
    }

    async fn discard_piece(
        self: &Arc<Self>,
        piece: Piece,
        discarded: &mut Discarded,
    ) -> Result<(), OperateError> {
        let Piece {
            view,
            record,
            beside,
            kind,
        } = piece;
        if let Some(Definition::Qemu(qemu)) = record.as_ref().map(|r| &r.definition) {
            let ours = self.config.run_dir();
            let disks = qemu.disks.iter().filter_map(|disk| disk.path.clone());
            discarded
                .left
                .extend(disks.filter(|path| !path.starts_with(&ours)));
        }
        match kind {
            Kind::Copy => {
                let Some(record) = record else { return Ok(()) };
                self.end_driver(record.id).await;
                let (site, ending) = (self.clone(), record.clone());
                let ended = crate::work::spawn_blocking(move || {
                    site.end_copy(&ending)?;
                    site.clear_home(&ending)?;
                    site.clear_hosted(&ending);
                    Ok::<_, String>(())
                });
                ended.await.map_err(failed)?.map_err(failed)?;
                self.drop_guest_notes(record.id);
                let id = record.id.to_string();
                self.catalogue
                    .remove(Table::Protections, &id)
                    .map_err(failed)?;
                self.catalogue.remove(Table::Guests, &id).map_err(failed)?;
                self.catalogue.flush().map_err(failed)?;
                self.sealed.forget(record.id);
            }
            Kind::Aside(kept) => self.end_aside(&kept).await.map_err(failed)?,
            Kind::Left => {
                self.end_left_in_process(&view).await;
                if let Some(qmp) = &view.qmp {
                    let qmp = qmp.clone();
                    let ended = crate::work::spawn_blocking(move || end_qemu(&qmp));
                    ended.await.map_err(failed)?.map_err(failed)?;
                }
            }
        }
        for directory in [Some(view.directory), beside].into_iter().flatten() {
            remove(&directory).map_err(failed)?;
        }
        discarded
            .removed
            .push(format!("{}: {}", view.copy, view.what));
        tracing::warn!(
            guest = view.guest,
            copy = view.copy,
            "evidence was discarded"
        );
        Ok(())
    }

    /// A copy inside of this process that was stopped for good has its disks there.
    async fn end_left_in_process(self: &Arc<Self>, view: &EvidenceView) {
        let standby = {
            let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
            let mut all = standbys.values();
            all.find(|s| s.guest.to_string() == view.id).cloned()
        };
        if let Some(standby) = standby {
            let mut state = standby.state.lock().await;
            standby.end_evidence(&mut state).await;
        }
    }

    /// What a takeover here had made for a guest that turned round since, and
    /// was then moved on: its disks, and its memory's files.
    fn clear_home(&self, record: &GuestRecord) -> Result<(), String> {
        let Some(home) = &record.run else {
            return Ok(());
        };
        remove(home).map_err(|e| e.to_string())?;
        let term = home.file_name().unwrap_or_default().to_string_lossy();
        let ram = self.config.ram_dir().join(format!("{}-{term}", record.id));
        remove(&ram).map_err(|e| e.to_string())
    }

    fn end_copy(&self, record: &GuestRecord) -> Result<(), String> {
        match &record.qmp {
            Some(qmp) => end_qemu(qmp),
            None => {
                self.end_hosted(record.id);
                Ok(())
            }
        }
    }

    async fn end_aside(self: &Arc<Self>, kept: &EvidenceRecord) -> Result<(), String> {
        let key = key(kept.record.id, kept.term);
        let vmm = {
            let mut all = self
                .turns
                .kept
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            all.remove(&key)
        };
        let qmp = kept.record.qmp.clone();
        let directory = kept.directory.clone();
        let (site, record) = (self.clone(), kept.record.clone());
        let ended = crate::work::spawn_blocking(move || {
            if let Some(vmm) = vmm {
                lock(&vmm).end();
            }
            if let Some(qmp) = qmp {
                end_qemu(&qmp)?;
            }
            site.clear_home(&record)?;
            remove(&directory).map_err(|e| e.to_string())
        });
        ended.await.map_err(|e| e.to_string())??;
        self.catalogue
            .remove(Table::Evidence, &key)
            .and_then(|_| self.catalogue.flush())
            .map_err(|e| e.to_string())
    }

    /// The guest's first point the other way round is sealed here: copies that
    /// hold nothing beyond it free their memory and room.
    pub(super) async fn end_unchanged_copies(self: &Arc<Self>, guest: GuestId) {
        let kept = self.catalogue.list::<EvidenceRecord>(Table::Evidence);
        for (_, kept) in kept.unwrap_or_default() {
            if kept.record.id == guest && kept.unchanged {
                match self.end_aside(&kept).await {
                    Ok(()) => {
                        tracing::info!(guest = kept.record.name, "its old copy here was ended");
                    }
                    Err(error) => {
                        tracing::warn!(
                            guest = kept.record.name,
                            error,
                            "its old copy here is kept"
                        );
                    }
                }
            }
        }
    }
}

fn remove(directory: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes on disk of the files in a directory, not of those below it.
fn size_of(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok());
    files.map(|file| file.blocks() * 512).sum()
}
