//! A seed from a medium into the store: find its key, verify, append, seal.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::store::{SealError, StoreError};

use super::announced::Seed;
use super::{Busy, SeedImported, SeedState, StopWhenDropped};
use crate::replicate::message::{PointContext, SealRequest};
use crate::replicate::receive::seal_of;
use crate::replicate::seed::{
    SeedError, SeedHeader, SeedKey, SeedProgress, SeedReader, SeedRecord,
};
use crate::site::operate::{OperateError, failed};
use crate::site::remote::Remote;
use crate::site::{Site, age, sound};

/// Bytes of batches that are made durable at once.
const GROUP_BYTES: usize = 8 << 20;

/// Batches that are made durable at once.
const GROUP_BATCHES: usize = 256;

/// Read from the medium in one piece.
const READ_BYTES: usize = 1 << 20;

/// Everything that the reading thread works with.
struct Work {
    site: Arc<Site>,
    remote: Arc<Remote>,
    seed: Seed,
    reader: SeedReader<BufReader<File>>,
    progress: Arc<SeedProgress>,
    busy: Busy,
}

/// What the reading thread leaves: a point that is sealed.
struct Taken {
    header: PointHeader,
    context: PointContext,
    batches: u64,
    file_bytes: u64,
    _busy: Busy,
}

impl Site {
    /// Takes the seed in `path`: its point is sealed here when this returns,
    /// and its medium of no use any more. Dropped before its end, or failed,
    /// this leaves no point, and the seed can be imported again.
    ///
    /// # Errors
    /// When it is no seed, damaged, not for this site, of no use any more, or
    /// the store cannot take it; each has its own words.
    pub async fn import_seed(self: &Arc<Self>, path: &Path) -> Result<SeedImported, OperateError> {
        let begun = Instant::now();
        if !path.is_absolute() {
            let why = format!("{} is no absolute path", path.display());
            return Err(OperateError::Conflict(why));
        }
        let (opened, at) = (path.to_owned(), path.display());
        let opened = blocking(move || -> Result<_, SeedError> {
            let file = File::open(&opened)?;
            let bytes = file.metadata()?.len();
            let mut file = BufReader::with_capacity(READ_BYTES, file);
            let header = SeedHeader::read(&mut file)?;
            Ok((file, header, bytes))
        });
        let (file, header, bytes) = opened.await?.map_err(|e| told(&at.to_string(), &e))?;
        let (seed, key, remote) = self.known_seed(&header)?;
        let begun_here = self.begin_seeding(
            seed.guest,
            &seed.name,
            &remote.record.site,
            SeedState::Importing,
        );
        let (busy, progress) = begun_here?;
        let _stop = StopWhenDropped(progress.clone());
        progress.total.store(bytes, Ordering::Relaxed);
        let reader = blocking(move || SeedReader::begin(file, &header, &key));
        let reader = reader.await?.map_err(|e| told(&at.to_string(), &e))?;
        self.fits(&seed, &remote, &reader).await?;
        let opening = reader.about().opening.clone();
        let known = self.standby_of(&remote, seed.guest);
        let is_new = known.is_none();
        let standby = match known {
            Some(standby) => standby,
            None => self
                .standby(&remote, opening)
                .map_err(OperateError::Conflict)?,
        };
        let work = Work {
            site: self.clone(),
            remote: remote.clone(),
            seed: seed.clone(),
            reader,
            progress,
            busy,
        };
        let path = at.to_string();
        let taken = blocking(move || work.perform(&path)).await?;
        if taken.is_err() && is_new && standby.points().is_empty() {
            // Nothing is known of the guest here but what a failed seed told.
            self.forget_standby(seed.guest).map_err(failed)?;
        }
        let taken = taken?;
        self.record_point(&taken.header, &taken.context)
            .await
            .map_err(failed)?;
        standby.warm_up(taken.header.point);
        let (site, spent) = (self.clone(), seed.clone());
        if let Err(error) = blocking(move || site.seeds.imported(spent)).await? {
            tracing::warn!(%error, "the key of an imported seed could not be destroyed; destroy its medium");
        }
        let cut_at = taken.header.cut_at_unix_ns;
        tracing::info!(guest = %seed.name, point = taken.header.point, bytes = taken.file_bytes, "a seed was imported");
        Ok(SeedImported {
            guest: seed.name,
            from: remote.record.site.clone(),
            to: self.config.site.name.clone(),
            point: taken.header.point,
            cut_at: jiff::Timestamp::from_nanosecond(i128::from(cut_at))
                .unwrap_or_default()
                .to_string(),
            age_ms: age(cut_at).as_millis() as u64,
            file_bytes: taken.file_bytes,
            batches: taken.batches,
            took_ms: begun.elapsed().as_millis() as u64,
        })
    }

    /// Whose seed it is, with its key.
    fn known_seed(
        &self,
        header: &SeedHeader,
    ) -> Result<(Seed, SeedKey, Arc<Remote>), OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        if !header.is_for(&self.key()) {
            return conflict(
                "this seed is for another site; import it there (farhaven seed export told which)"
                    .to_owned(),
            );
        }
        let Some(seed) = self.seeds.find(&header.seed) else {
            return conflict(
                "this seed is void: the guest was exported again since, or its key was lost with this site's state. Import the newer one, or export it again".to_owned(),
            );
        };
        let remotes = self
            .remotes
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let remote = remotes
            .values()
            .find(|r| r.record.key == seed.from)
            .cloned();
        drop(remotes);
        let Some(remote) = remote else {
            return conflict("the site that wrote this seed is not paired here any more; pair it again, and export the guest again".to_owned());
        };
        match seed.key.clone() {
            Some(key) => Ok((seed, key, remote)),
            None => conflict(format!(
                "this seed of '{}' was imported already, as point {}; its key was destroyed then. Nothing is left to be done",
                seed.name, seed.point
            )),
        }
    }

    /// Does what it says of itself fit what was announced, and what is here?
    async fn fits(
        self: &Arc<Self>,
        seed: &Seed,
        remote: &Arc<Remote>,
        reader: &SeedReader<BufReader<File>>,
    ) -> Result<(), OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        let about = reader.about();
        let opening = &about.opening;
        let as_announced = about.source == seed.from
            && about.target == self.key()
            && opening.guest == seed.guest
            && opening.name == seed.name
            && (about.point, about.first, about.last) == (seed.point, seed.first, seed.last)
            && (opening.term.group, opening.term.owner) == (seed.guest, seed.from);
        if !as_announced {
            return conflict("the seed is not what its site announced; export it again".to_owned());
        }
        if let Some(why) = sound::unsound_opening(opening) {
            return conflict(format!("the seed cannot be used: {why}"));
        }
        if let Some(newest) = remote.incoming.store.newest(seed.guest)
            && newest.point != seed.point
        {
            return conflict(format!(
                "'{}' is protected to here beyond this seed already: point {} is sealed. Nothing of the seed is needed",
                seed.name, newest.point
            ));
        }
        if let Some(why) = self.not_theirs(remote, seed.guest) {
            return conflict(format!("the seed cannot be used: {why}"));
        }
        self.obey(opening.term).await.map_err(failed)?;
        match self.fence.current(seed.guest) {
            Some(term) if term.owner != seed.from => conflict(format!(
                "'{}' belongs to {} by now (term {}): a copy of its earlier life is of no use",
                seed.name,
                self.name_of(&term.owner),
                term.number
            )),
            _ => Ok(()),
        }
    }
}

impl Work {
    fn perform(mut self, path: &str) -> Result<Taken, OperateError> {
        let store = self.remote.incoming.store.clone();
        match self.take(path) {
            Ok((header, context, batches)) => Ok(Taken {
                header,
                context,
                batches,
                file_bytes: self.reader.read(),
                _busy: self.busy,
            }),
            Err(error) => {
                store.abandon_point(self.seed.guest, self.seed.point);
                Err(error)
            }
        }
    }

    fn take(&mut self, path: &str) -> Result<(PointHeader, PointContext, u64), OperateError> {
        let mut group: Vec<Bytes> = Vec::new();
        let mut group_bytes = 0;
        loop {
            if self.progress.is_stopped() {
                return Err(OperateError::Failed(format!(
                    "the import of '{}' was stopped; nothing of it is sealed. Import it again",
                    self.seed.name
                )));
            }
            let record = self.reader.next_record().map_err(|e| told(path, &e))?;
            let read = self.reader.read();
            self.progress.done.store(read, Ordering::Relaxed);
            self.progress.file_bytes.store(read, Ordering::Relaxed);
            match record {
                SeedRecord::Batch(batch) => {
                    group_bytes += batch.len();
                    group.push(batch);
                    if group_bytes >= GROUP_BYTES || group.len() >= GROUP_BATCHES {
                        self.append(&group)?;
                        group.clear();
                        group_bytes = 0;
                    }
                }
                SeedRecord::Seal(request) => {
                    self.append(&group)?;
                    let batches = request.batches;
                    let header = self.seal(&request)?;
                    return Ok((header, request.context, batches));
                }
            }
        }
    }

    fn append(&self, group: &[Bytes]) -> Result<(), OperateError> {
        let directory = self.site.store_directory(&self.seed.from);
        let (free, least) = (
            crate::guest::qemu::peer::bytes_free(&directory),
            self.site.config.store.min_free.bytes(),
        );
        if free < least {
            return Err(OperateError::Failed(format!(
                "{} has {free} bytes free, and store.min_free is {least}; make room there, and import it again",
                directory.display()
            )));
        }
        let appended = self.remote.incoming.store.append(group);
        appended.map(drop).map_err(|error| match error {
            StoreError::Batch(error) => OperateError::Conflict(format!(
                "the seed has a batch that does not verify ({error}); do both sites run the same version?"
            )),
            other => OperateError::Failed(format!("{other}. Nothing is sealed; import it again")),
        })
    }

    fn seal(&self, request: &SealRequest) -> Result<PointHeader, OperateError> {
        if let Some(why) = sound::unsound_seal(request) {
            return Err(OperateError::Conflict(format!(
                "the seed cannot be used: {why}"
            )));
        }
        let seal = seal_of(request).map_err(failed)?;
        let sealed = self.remote.incoming.store.seal(seal);
        sealed.map_err(|error| match error {
            SealError::MissingBatches { .. } | SealError::Number { .. } => {
                OperateError::Conflict(format!(
                    "'{}' began to be protected over the link while its seed was imported; that goes on, and the seed is not needed",
                    self.seed.name
                ))
            }
            SealError::ChainMismatch { .. } | SealError::Dangling { .. } => {
                OperateError::Conflict(format!(
                    "the seed does not come out as its site wrote it ({error}); export it again"
                ))
            }
            other => failed(other),
        })
    }
}

fn told(path: &str, error: &SeedError) -> OperateError {
    let why = format!("{path}: {error}");
    match error {
        SeedError::Io(error) if error.kind() == io::ErrorKind::NotFound => {
            OperateError::Conflict(format!(
                "{path} is not there; name the file that `farhaven seed export` wrote, where this site's daemon sees it"
            ))
        }
        SeedError::Io(_) => OperateError::Failed(why),
        _ => OperateError::Conflict(why),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, OperateError> {
    crate::work::spawn_blocking(work)
        .await
        .map_err(|e| OperateError::Failed(format!("a step ended early: {e}")))
}
