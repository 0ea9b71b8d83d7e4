//! Evidence as plain files: what an investigator opens without Farhaven.
//!
//! A directory a copy: its definition as JSON, its memory raw, its disks as
//! qcow2 images that stand on nothing, its console, and a manifest with the
//! BLAKE3 sum of each. Nothing of the copy changes, and it stays.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::super::files::{private_directory, sync_directory};
use super::super::hosted::lock;
use super::super::operate::{OperateError, failed};
use super::super::view::bytes;
use super::super::{Site, unix_ns};
use super::evidence::{Piece, key};
use super::view::{EvidenceManifest, ExportedFile};
use crate::guest::Definition;
use crate::guest::embedded::SharedVmm;
use crate::guest::qemu::peer::bytes_free;

/// Copied at a time.
const PIECE: usize = 1 << 20;

/// No manifest takes more names of a directory than that: a copy has a few disks.
const MOST_FILES: usize = 1000;

/// Where one file of a copy comes from.
enum Source {
    /// A file as it is.
    File(PathBuf),
    /// A disk image, in QEMU's name of its format.
    Image(PathBuf, String),
    /// A block of memory of a monitor in this process.
    Memory(SharedVmm, usize, u64),
}

struct Planned {
    file: String,
    what: &'static str,
    source: Source,
    bytes: u64,
}

impl Site {
    /// Writes what is kept of a guest's stopped copies (or of the one named)
    /// into new directories below `directory`.
    ///
    /// # Errors
    /// When there is none, the directory is not usable, or has too little room.
    pub async fn export_evidence(
        self: &Arc<Self>,
        name: &str,
        copy: Option<&str>,
        directory: &Path,
    ) -> Result<Vec<EvidenceManifest>, OperateError> {
        if !directory.is_absolute() || !directory.is_dir() {
            return Err(OperateError::Conflict(format!(
                "{} is no directory on this host, named from its root",
                directory.display()
            )));
        }
        let (site, name, copy) = (self.clone(), name.to_owned(), copy.map(str::to_owned));
        let directory = directory.to_owned();
        let work = move || {
            let pieces = site.pieces_of(&name, copy.as_deref())?;
            let mut manifests = Vec::new();
            for piece in &pieces {
                manifests.push(site.export_piece(piece, &directory)?);
            }
            Ok(manifests)
        };
        crate::work::spawn_blocking(work).await.map_err(failed)?
    }

    fn export_piece(&self, piece: &Piece, below: &Path) -> Result<EvidenceManifest, OperateError> {
        let view = &piece.view;
        let target = below.join(format!("{}-{}", view.guest, view.copy));
        if super::super::exists(&target) {
            return Err(OperateError::Conflict(format!(
                "{} is there already; move it away, or name another directory",
                target.display()
            )));
        }
        let planned = self.plan_export(piece);
        let needed = planned
            .iter()
            .fold(0u64, |sum, file| sum.saturating_add(file.bytes));
        let free = bytes_free(below);
        if needed > free {
            return Err(OperateError::Conflict(format!(
                "the copy '{}' of '{}' takes up to {}, and {} has {} free; nothing was written",
                view.copy,
                view.guest,
                bytes(needed),
                below.display(),
                bytes(free)
            )));
        }
        private_directory(&target).map_err(failed)?;
        let mut manifest = EvidenceManifest {
            guest: view.guest.clone(),
            id: view.id.clone(),
            copy: view.copy.clone(),
            site: self.config.site.name.clone(),
            at: unix_ns(std::time::SystemTime::now()),
            files: Vec::new(),
            missing: Vec::new(),
        };
        if !view.alive {
            manifest
                .missing
                .push("its memory: the machine that held it has ended".to_owned());
        }
        if let Some(record) = &piece.record {
            let text = serde_json::to_vec_pretty(&record.definition).map_err(failed)?;
            let file = "definition.json";
            let path = target.join(file);
            create(&path)
                .and_then(|mut out| out.write_all(&text).and_then(|()| out.sync_all()))
                .map_err(failed)?;
            let listed = listed(
                &path,
                file,
                "definition",
                "this site's catalogue".to_owned(),
            );
            manifest.files.push(listed.map_err(failed)?);
        }
        for file in planned {
            let path = target.join(&file.file);
            let from = match &file.source {
                Source::File(path) | Source::Image(path, _) => path.display().to_string(),
                Source::Memory(..) => "this daemon's memory".to_owned(),
            };
            tracing::info!(
                guest = view.guest,
                copy = view.copy,
                file = file.file,
                "exporting evidence"
            );
            let written = write(&file.source, &path)
                .and_then(|()| listed(&path, &file.file, file.what, from.clone()));
            match written {
                Ok(listed) => manifest.files.push(listed),
                Err(error) => {
                    let _ = fs::remove_file(&path);
                    let why = format!("{} ({from}): {error}", file.file);
                    manifest.missing.push(why);
                }
            }
        }
        let text = serde_json::to_vec_pretty(&manifest).map_err(failed)?;
        create(&target.join("manifest.json"))
            .and_then(|mut out| out.write_all(&text).and_then(|()| out.sync_all()))
            .and_then(|()| sync_directory(&target))
            .map_err(failed)?;
        Ok(manifest)
    }

    /// What there is to write, with the most that each takes.
    fn plan_export(&self, piece: &Piece) -> Vec<Planned> {
        let mut planned = Vec::new();
        match piece.record.as_ref().map(|record| &record.definition) {
            Some(Definition::Qemu(qemu)) => {
                for (index, block) in qemu.ram.iter().enumerate().filter(|_| piece.view.alive) {
                    planned.extend(block.path.clone().map(|path| Planned {
                        file: format!("memory{index}.raw"),
                        what: "memory",
                        source: Source::File(path),
                        bytes: block.bytes,
                    }));
                }
                for (index, disk) in qemu.disks.iter().enumerate() {
                    planned.extend(disk.path.clone().map(|path| Planned {
                        file: format!("disk{index}.qcow2"),
                        what: "disk",
                        source: Source::Image(path, disk.format.clone()),
                        bytes: disk.bytes,
                    }));
                }
            }
            Some(Definition::Embedded(definition)) => {
                let id = piece.record.as_ref().map(|record| record.id);
                let vmm = id.and_then(|id| self.vmm_of(id, &piece.view.copy));
                if let Some(vmm) = vmm {
                    for (index, (_, bytes)) in definition.ram.iter().enumerate() {
                        planned.push(Planned {
                            file: format!("memory{index}.raw"),
                            what: "memory",
                            source: Source::Memory(vmm.clone(), index, *bytes),
                            bytes: *bytes,
                        });
                    }
                }
            }
            None => {}
        }
        let own = piece.directories().filter_map(|at| fs::read_dir(at).ok());
        for entry in own.flatten().flatten().take(MOST_FILES) {
            let (path, name) = (
                entry.path(),
                entry.file_name().to_string_lossy().into_owned(),
            );
            let Ok(facts) = entry.metadata() else {
                continue;
            };
            if !facts.is_file() || planned.iter().any(|p| p.source.is(&path)) {
                continue;
            }
            let (what, source) = match path.extension().and_then(|e| e.to_str()) {
                Some("img") => ("disk", Source::Image(path, "raw".to_owned())),
                Some("qcow2") => ("disk", Source::Image(path, "qcow2".to_owned())),
                Some("log") => ("console", Source::File(path)),
                _ => continue,
            };
            let is_image = matches!(source, Source::Image(..));
            let file = match is_image {
                true => format!(
                    "{}.qcow2",
                    name.trim_end_matches(".img").trim_end_matches(".qcow2")
                ),
                false => name,
            };
            planned.push(Planned {
                file,
                what,
                source,
                bytes: facts.blocks() * 512,
            });
        }
        planned
    }

    fn vmm_of(&self, guest: farhaven_storage_sync::unit::GuestId, copy: &str) -> Option<SharedVmm> {
        match copy.strip_prefix('t').and_then(|term| term.parse().ok()) {
            Some(term) => self.kept_vmm(&key(guest, term)),
            None => self.hosted(guest),
        }
    }
}

impl Source {
    fn is(&self, path: &Path) -> bool {
        match self {
            Source::File(own) | Source::Image(own, _) => own == path,
            Source::Memory(..) => false,
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn write(source: &Source, target: &Path) -> io::Result<()> {
    match source {
        Source::File(path) => {
            let from = File::open(path)?;
            let size = from.metadata()?.len();
            copy(target, size, |at, piece| from.read_exact_at(piece, at))
        }
        Source::Memory(vmm, block, size) => copy(target, *size, |at, piece| {
            let read = lock(vmm).read_ram(*block, at, piece);
            read.map_err(|e| io::Error::other(e.to_string()))
        }),
        Source::Image(path, format) => convert(path, format, target),
    }
}

/// Copies what is not zero; the rest is a hole.
fn copy(
    target: &Path,
    size: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let out = create(target)?;
    out.set_len(size)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let count = usize::try_from(size - at).map_or(PIECE, |left| left.min(PIECE));
        let piece = piece.get_mut(..count).unwrap_or_default();
        read(at, piece)?;
        if piece.iter().any(|byte| *byte != 0) {
            out.write_all_at(piece, at)?;
        }
        at += count as u64;
    }
    out.sync_all()
}

/// By qemu-img, which knows formats and what a disk stands on. A stopped QEMU
/// holds its images locked and has written everything: it is read beside that.
fn convert(path: &Path, format: &str, target: &Path) -> io::Result<()> {
    let ran = Command::new("qemu-img")
        .args(["convert", "-U", "-f", format, "-O", "qcow2"])
        .arg(path)
        .arg(target)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| io::Error::other(format!("qemu-img: {e}; apt-get install -y qemu-utils")))?;
    if !ran.status.success() {
        let words = String::from_utf8_lossy(&ran.stderr);
        let words: String = words.trim().chars().take(500).collect();
        return Err(io::Error::other(format!("qemu-img: {words}")));
    }
    File::open(target)?.sync_all()
}

fn listed(path: &Path, file: &str, what: &str, from: String) -> io::Result<ExportedFile> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(ExportedFile {
        file: file.to_owned(),
        what: what.to_owned(),
        from,
        bytes: hasher.count(),
        blake3: hasher.finalize().to_hex().to_string(),
    })
}
