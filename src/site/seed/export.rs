//! A guest's first point to a medium: announce, attach, copy, cut, seal the file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use farhaven_storage_sync::unit::{UNIT, Volume};

use super::{Busy, SeedExported, SeedState, StopWhenDropped};
use crate::guest::{After, Guest, GuestError};
use crate::replicate::message::{
    CommitTerms, Message, Opening, PointContext, SealRequest, SeedAnnouncement,
};
use crate::replicate::outlet::Outlet;
use crate::replicate::seed::{
    SeedAbout, SeedHeader, SeedId, SeedKey, SeedProgress, SeedShipError, SeedShipment, SeedWriter,
};
use crate::site::cut::{self, Made};
use crate::site::operate::{OperateError, failed};
use crate::site::records::GuestRecord;
use crate::site::remote::{AskError, Remote};
use crate::site::view::bytes;
use crate::site::{Site, hex, unix_ns};

/// Batch numbers reserved for a seed: one for so many units, eight times what
/// a first copy of a guest that stands still needs...
const UNITS_A_NUMBER: u64 = 8;
/// ...and so many for what is little.
const NUMBERS_LEAST: u64 = 1 << 16;

/// Written in one piece to the medium before it is told to keep it: a stick
/// that is slow shows in the progress, not at the very end.
const SYNC_EVERY: u64 = 256 << 20;

/// Everything that the writing thread works with.
struct Work {
    site: Arc<Site>,
    record: GuestRecord,
    guest: Box<dyn Guest>,
    remote: Arc<Remote>,
    about: SeedAbout,
    seed: SeedId,
    key: SeedKey,
    term: u64,
    file: PathBuf,
    progress: Arc<SeedProgress>,
    _busy: Busy,
}

impl Site {
    /// Writes a first copy of a guest to `path`, a file that is not there yet
    /// or a directory, for `to` to import. The guest runs on; it is stopped for
    /// an instant at the end, as for any point. Dropped before its end, this
    /// leaves nothing.
    ///
    /// # Errors
    /// When the guest cannot be protected to `to`, or is already; when `to`
    /// cannot be reached, or holds points of it; when the medium fails or is
    /// too small.
    pub async fn export_seed(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        path: &Path,
    ) -> Result<SeedExported, OperateError> {
        let begun = Instant::now();
        let record = self.guest(name)?;
        let remote = self.remote(to).ok_or_else(|| self.no_peer(to))?;
        let elsewhere = self.fence.may_run(record.id, self.key());
        elsewhere.map_err(|error| OperateError::Conflict(error.to_string()))?;
        let (busy, progress) = self.begin_seeding(record.id, name, to, SeedState::Exporting)?;
        let _stop = StopWhenDropped(progress.clone());
        self.unblocked(name, to, self.mode_of(record.id)).await?;
        let seed: SeedId = rand::random();
        let file = target_file(path, &seed)?;

        let (site, asked) = (self.clone(), record.clone());
        let guest = blocking(move || {
            let threads = crate::work::threads();
            site.attach(&asked, site.tracking_key.clone(), threads)
        });
        let guest = guest.await?.map_err(failed)?;
        // From here on, whatever ends this takes our traces out of the guest.
        let mut guest = Detached(Some(guest));
        let volumes = guest
            .0
            .as_ref()
            .map_or_else(Vec::new, |g| g.volumes().to_vec());
        let (about, term) = self.numbers(&record, &remote, volumes).await?;
        let key = SeedKey::random();
        let announcement = SeedAnnouncement {
            guest: record.id,
            name: record.name.clone(),
            seed,
            key: key.clone(),
            point: about.point,
            first: about.first,
            last: about.last,
        };
        match remote
            .ask(Message::SeedAnnounce(Box::new(announcement)))
            .await
        {
            Ok(Message::Done) => {}
            Ok(_) => return Err(failed(AskError::Unfitting(to.to_owned()))),
            Err(error) => return Err(not_begun(&error)),
        }
        let Some(guest) = guest.0.take() else {
            return Err(failed("the guest is not attached"));
        };
        let work = Work {
            site: self.clone(),
            record,
            guest,
            remote,
            about,
            seed,
            key,
            term,
            file,
            progress,
            _busy: busy,
        };
        let mut exported = blocking(move || work.perform()).await??;
        exported.took_ms = begun.elapsed().as_millis() as u64;
        tracing::info!(guest = %exported.guest, to, point = exported.point, bytes = exported.file_bytes, "a seed was written");
        Ok(exported)
    }

    /// Agrees with the peer on point and batch numbers.
    async fn numbers(
        &self,
        record: &GuestRecord,
        remote: &Arc<Remote>,
        volumes: Vec<Volume>,
    ) -> Result<(SeedAbout, u64), OperateError> {
        let site = &remote.record.site;
        let guest = record.id;
        let answer = remote.ask(Message::SeedAsk { guest }).await;
        let (newest, next_point, last_seq) = match answer {
            Ok(Message::SeedMay {
                newest,
                next_point,
                last_seq,
            }) if newest.max(next_point).max(last_seq) < 1 << 55 => (newest, next_point, last_seq),
            Ok(_) => return Err(failed(AskError::Unfitting(site.clone()))),
            Err(error) => return Err(not_begun(&error)),
        };
        if newest > 0 {
            return Err(OperateError::Conflict(format!(
                "'{site}' holds point {newest} of '{0}' already: only what changed since needs to be sent. Run: farhaven protect {0} --to {site}",
                record.name
            )));
        }
        let index = usize::try_from(self.config.store.index_bytes.bytes()).unwrap_or(usize::MAX);
        let outgoing = remote
            .outgoing(last_seq, index, self.tracking_key.clone())
            .await
            .map_err(|error| not_begun(&error))?;
        // An earlier seed that was announced while this process had numbers already.
        outgoing.sequence.raise_to(last_seq + 1);
        let units: u64 = volumes.iter().map(Volume::units).sum();
        let count = (units / UNITS_A_NUMBER).saturating_add(NUMBERS_LEAST);
        let first = outgoing.sequence.reserve(count).ok_or_else(|| {
            failed("batch numbers are used up; start with a new, empty store at the peer")
        })?;
        let term = match self.fence.current(guest) {
            Some(term) => term,
            None => self.fence.raise(guest, self.key()).map_err(failed)?,
        };
        let policy = &self.config.protect;
        let about = SeedAbout {
            source: self.key(),
            target: remote.record.key,
            opening: Opening {
                guest,
                name: record.name.clone(),
                source: self.config.site.name.clone(),
                definition: record.definition.clone(),
                volumes,
                term,
                warm: policy.warm,
                retention: policy.retention.clone(),
                rpo_ms: None,
                commit: CommitTerms::of(policy),
                schedule: None,
            },
            point: next_point.max(1),
            first,
            last: first + count - 1,
        };
        Ok((about, term.number))
    }
}

impl Work {
    fn perform(mut self) -> Result<SeedExported, OperateError> {
        let part = PathBuf::from(format!("{}.part", self.file.display()));
        let written = self.write(&part);
        self.guest.detach();
        let exported = written.and_then(|exported| {
            // Never over a file that came to be there meanwhile.
            fs::hard_link(&part, &self.file)
                .or_else(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => Err(error),
                    // FAT and its like have no links.
                    _ => fs::rename(&part, &self.file),
                })
                .map_err(|error| self.medium(&error))?;
            let directory = self.file.parent().unwrap_or(Path::new("/"));
            File::open(directory)
                .and_then(|directory| directory.sync_all())
                .map_err(|error| self.medium(&error))?;
            Ok(exported)
        });
        let _ = fs::remove_file(&part);
        exported
    }

    fn write(&mut self, part: &Path) -> Result<SeedExported, OperateError> {
        let medium = Medium::create(part).map_err(|error| self.medium(&error))?;
        let header = SeedHeader::new(self.seed, &self.remote.record.key);
        let writer = SeedWriter::begin(medium, &header, &self.key, &self.about)
            .map_err(|error| self.medium(&error))?;
        let index = usize::try_from(self.site.config.store.index_bytes.bytes());
        let mut shipment = SeedShipment::begin(
            writer,
            &self.about,
            self.site.tracking_key.clone(),
            index.unwrap_or(usize::MAX),
            self.progress.clone(),
        );
        let made = self
            .copy(&mut shipment)
            .map_err(|error| match shipment.failure() {
                Some(SeedShipError::Medium(error)) => self.medium(&error),
                Some(why) => OperateError::Failed(format!(
                    "the seed of '{}' was not written, and nothing is left of it: {why}",
                    self.record.name
                )),
                None => failed(error),
            })?;
        let (medium, file_bytes) = shipment
            .finish(&self.seal(&made))
            .map_err(|error| self.medium(&error))?;
        medium
            .file
            .sync_all()
            .map_err(|error| self.medium(&error))?;
        Ok(SeedExported {
            guest: self.record.name.clone(),
            to: self.remote.record.site.clone(),
            file: self.file.clone(),
            file_bytes,
            point: made.point,
            guest_bytes: made.shipped.changed_bytes,
            pause_ms: made.times.pause.as_secs_f64() * 1e3,
            took_ms: 0,
        })
    }

    fn copy(&mut self, shipment: &mut dyn Outlet) -> Result<Made, GuestError> {
        let limit = self.site.config.protect.capture_buffer.bytes();
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        // The first reads everything; the second what changed meanwhile, so
        // that the guest stands for little.
        for _ in 0..2 {
            self.guest.round(shipment)?;
            shipment.flush()?;
        }
        let point = self.about.point;
        let (guest, known) = (&mut *self.guest, &mut Vec::new());
        cut::ship(guest, shipment, known, point, After::Continue, limit, None)
    }

    fn seal(&self, made: &Made) -> SealRequest {
        SealRequest {
            guest: self.record.id,
            point: made.point,
            parent: 0,
            cut_at: unix_ns(made.cut_at),
            volumes: made.volumes.clone(),
            batches: made.shipped.batches,
            chain: made.chain,
            context: PointContext {
                name: self.record.name.clone(),
                source: self.site.config.site.name.clone(),
                term: self.term,
                definition: self.record.definition.clone(),
                pause: made.times.pause,
                ram_scan: made.times.ram_scan,
                ram_scanned_bytes: made.times.ram_scanned_bytes,
                changed_bytes: made.shipped.changed_bytes,
                sent_bytes: made.shipped.sent_bytes,
                base: false,
                group: None,
                quiesced: made.quiesced.told(),
            },
            activate: None,
        }
    }

    /// What the medium did, with what it takes.
    fn medium(&self, error: &io::Error) -> OperateError {
        let at = self.file.display();
        let name = &self.record.name;
        if error.kind() != io::ErrorKind::StorageFull
            && error.kind() != io::ErrorKind::QuotaExceeded
        {
            return OperateError::Failed(format!(
                "the seed of '{name}' cannot be written to {at} ({error}); nothing is left of it. Check the medium, and begin anew"
            ));
        }
        let needed = needed(&self.progress, &self.about.opening.volumes);
        OperateError::Failed(format!(
            "{at} is too small for the seed of '{name}': it needs about {needed}; nothing is left of it. Take a larger medium, and begin anew",
        ))
    }
}

/// What the file would have come to, by what was written of it.
fn needed(progress: &SeedProgress, volumes: &[Volume]) -> String {
    let (done, total, file) = (
        progress.done.load(Ordering::Relaxed),
        progress.total.load(Ordering::Relaxed),
        progress.file_bytes.load(Ordering::Relaxed),
    );
    let most: u64 = volumes.iter().map(|v| v.units() * UNIT as u64).sum();
    match done {
        0 => format!("{} at most", bytes(most)),
        done => {
            let whole = u128::from(file) * u128::from(total.max(done)) / u128::from(done);
            let whole = u64::try_from(whole).unwrap_or(u64::MAX);
            format!(
                "{} by what was copied, {} at most",
                bytes(whole),
                bytes(most)
            )
        }
    }
}

/// The file being written.
struct Medium {
    file: File,
    unsynced: u64,
}

impl Medium {
    fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        Ok(Self {
            file: options.open(path)?,
            unsynced: 0,
        })
    }
}

impl Write for Medium {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.unsynced += written as u64;
        if self.unsynced >= SYNC_EVERY {
            self.unsynced = 0;
            self.file.sync_data()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A guest that is let go of on every way out.
struct Detached(Option<Box<dyn Guest>>);

impl Drop for Detached {
    fn drop(&mut self) {
        if let Some(mut guest) = self.0.take() {
            // It talks to QEMU, and this may be an async thread.
            std::thread::spawn(move || guest.detach());
        }
    }
}

/// Where it goes: into a directory under a name that tells nothing of the guest.
fn target_file(path: &Path, seed: &SeedId) -> Result<PathBuf, OperateError> {
    let conflict = |why: String| Err(OperateError::Conflict(why));
    if !path.is_absolute() {
        return conflict(format!("{} is no absolute path", path.display()));
    }
    let file = match path.is_dir() {
        true => path.join(format!("farhaven-{}.seed", hex(&seed[..4]))),
        false => path.to_owned(),
    };
    if crate::site::exists(&file) {
        return conflict(format!(
            "{} is there already; name a file that is not, or remove it",
            file.display()
        ));
    }
    let directory = file.parent().unwrap_or(Path::new("/"));
    if !directory.is_dir() {
        return conflict(format!(
            "there is no directory {} on this host; is the medium mounted?",
            directory.display()
        ));
    }
    Ok(file)
}

fn not_begun(error: &AskError) -> OperateError {
    OperateError::Failed(format!(
        "the export was not begun: {error}. A seed's key and numbers are agreed upon over the link first, which may be as slow as it likes"
    ))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, OperateError> {
    crate::work::spawn_blocking(work)
        .await
        .map_err(|e| OperateError::Failed(format!("a step ended early: {e}")))
}
