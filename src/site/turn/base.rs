//! The site that a guest came from becomes the one that it is protected to:
//! what is here of the guest is made the base that the other site builds upon.
//!
//! The stopped copy is read whole, memory and disks, into the store of that
//! site, as a point that cannot be run. The other site is told digests of it
//! unit by unit and sends what differs, however the two came to differ. Only
//! when that is sealed is the copy taken out of the list of this site's guests.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use farhaven_storage_sync::catalogue::{CatalogueError, Table};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{LocalError, LocalPoint, LocalSeal, Store};
use farhaven_storage_sync::unit::{Digest, GuestId, UNIT, Volume, VolumeIndex, VolumeKind};

use super::super::answer::refused;
use super::super::commands::Command;
use super::super::records::{EvidenceRecord, GuestRecord, Protection};
use super::super::remote::Remote;
use super::super::standby::Standby;
use super::super::view::bytes;
use super::super::{Site, guests, sound, unix_ns};
use super::evidence;
use crate::guest::qemu::peer::bytes_free;
use crate::guest::{Guest, Sink, SinkError};
use crate::replicate::message::{Message, Opening, PointContext, Refusal, TurnMessage};

/// Units that are read at once.
const PIECE: u64 = 256;

/// Bytes stored between two looks at the room left.
const LOOK_EVERY: u64 = 16 << 20;

/// The end of a driver is waited for that long.
const DRIVER_END: Duration = Duration::from_secs(30);

/// A copy that is being read.
#[derive(Default)]
pub(in crate::site) struct Reading {
    done: AtomicU64,
    total: AtomicU64,
    over: AtomicBool,
    failed: Mutex<Option<String>>,
}

impl Site {
    /// The site that runs a guest is about to protect it to here.
    pub(super) async fn turn(self: &Arc<Self>, remote: &Arc<Remote>, opening: Opening) -> Message {
        let guest = opening.guest;
        if let Some(why) = sound::unsound_opening(&opening) {
            return refused(Refusal::Unable, why);
        }
        if let Some(why) = self.not_theirs(remote, guest) {
            remote.complain(&format!("it turns guest {guest} round, and {why}"));
            return refused(Refusal::Unable, why);
        }
        if opening.term.owner != remote.record.key || opening.term.group != guest {
            return refused(Refusal::Fenced, "the term offered is not that site's own");
        }
        if let Err(answer) = self.obey_offered(remote, opening.term).await {
            return answer;
        }
        let mut reading = self
            .turns
            .reading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(work) = reading.get(&guest).cloned() {
            if !work.over.load(Ordering::Acquire) {
                return told(TurnMessage::Turning {
                    done: work.done.load(Ordering::Relaxed),
                    total: work.total.load(Ordering::Relaxed),
                });
            }
            reading.remove(&guest);
            let failed = work.failed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(why) = failed.clone() {
                return refused(Refusal::Unable, why);
            }
        }
        let copy = match self.copy_for(remote, guest) {
            Ok(copy) => copy,
            Err(why) => return refused(Refusal::Unable, why),
        };
        let Some((record, protection)) = copy else {
            // Done before, or nothing was here.
            let standby = self.standby_of(remote, guest);
            let base = standby.map_or(0, |standby| standby.base());
            let store = &remote.incoming.store;
            let mut points = store.points(guest).into_iter();
            let header = points.find(|point| point.point == base);
            return told(TurnMessage::Turned {
                base: header.as_ref().map_or(0, |header| header.point),
                bytes: header.map_or(0, |header| header.stored_bytes),
            });
        };
        let work = Arc::new(Reading::default());
        reading.insert(guest, work.clone());
        drop(reading);
        let (site, remote) = (self.clone(), remote.clone());
        tokio::spawn(async move {
            let name = record.name.clone();
            let turned = site.turn_round(&remote, opening, record, protection, &work);
            if let Err(why) = turned.await {
                tracing::error!(guest = name, why, "its old copy was not made a base");
                *work.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            }
            work.over.store(true, Ordering::Release);
        });
        told(TurnMessage::Turning { done: 0, total: 0 })
    }

    /// The steps, each of which finds out whether it was done before.
    async fn turn_round(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        opening: Opening,
        record: GuestRecord,
        protection: Protection,
        work: &Arc<Reading>,
    ) -> Result<(), String> {
        self.end_driver(record.id).await;
        let standby = self.standby(remote, opening)?;
        let base = match self.base_at(remote, &standby) {
            Some(base) => base,
            None => {
                let (site, remote) = (self.clone(), remote.clone());
                let (record, work) = (record.clone(), work.clone());
                let opening = standby.opening();
                let made = crate::work::spawn_blocking(move || {
                    read(&site, &remote, &record, &opening, &work)
                });
                made.await.map_err(|e| e.to_string())??
            }
        };
        standby.turn(false, base);
        self.keep_standby(&standby).map_err(|e| e.to_string())?;
        // What the copy is may have been found out as it was read.
        let kept = self.copy_for(remote, record.id)?;
        let protection = kept.map_or(protection, |(_, kept)| kept);
        self.set_evidence_aside(&record, &protection)
            .map_err(|e| e.to_string())
    }

    /// What its moved copy wrote since is nowhere else: it is kept until somebody discards it.
    fn copy_wrote(&self, guest: GuestId) -> Result<(), CatalogueError> {
        let key = guest.to_string();
        let kept = self
            .catalogue
            .find::<Protection>(Table::Protections, &key)?;
        let Some(mut kept) = kept else { return Ok(()) };
        if let Some(moved) = kept.moved.take() {
            (kept.stopped, kept.stopped_by) = (true, Some(moved));
            self.keep_protection(&kept)?;
        }
        Ok(())
    }

    /// Nobody is attached to the copy any more. Its protection stays written
    /// down until the end: it says what the copy is.
    pub(super) async fn end_driver(&self, guest: GuestId) {
        let driver = {
            let mut drivers = self.drivers.write().unwrap_or_else(PoisonError::into_inner);
            drivers.remove(&guest)
        };
        if let Some(driver) = driver {
            let _ = driver.commands.send(Command::End).await;
            let _ = tokio::time::timeout(DRIVER_END, driver.commands.closed()).await;
        }
    }

    /// The base that was sealed by an earlier attempt, when this daemon was
    /// killed before it was written down.
    fn base_at(&self, remote: &Remote, standby: &Standby) -> Option<u64> {
        let newest = remote.incoming.store.newest(standby.guest)?;
        let replica = remote
            .incoming
            .store
            .open_in_part(standby.guest, newest.point);
        let context = PointContext::of(&replica.ok()?).ok()?;
        (context.base && context.term == standby.opening().term.number).then_some(newest.point)
    }

    pub(in crate::site) fn keep_standby(&self, standby: &Standby) -> Result<(), CatalogueError> {
        let key = standby.guest.to_string();
        self.catalogue.put(Table::Remote, &key, &standby.record())?;
        self.catalogue.flush()
    }

    /// The copy is no guest of this site any more: it is evidence.
    fn set_evidence_aside(
        &self,
        record: &GuestRecord,
        protection: &Protection,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let guest = record.id;
        let term = self.fence.current(guest).map_or(0, |term| term.number);
        let key = evidence::key(guest, term);
        let directory = self
            .config
            .run_dir()
            .join(guest.to_string())
            .join(format!("evidence-t{term}"));
        let source = self.run_directory(guest);
        if super::super::exists(&source) && !super::super::exists(&directory) {
            std::fs::rename(&source, &directory)?;
        }
        // Before a record names it; whoever renamed it may have ended right then.
        if let Some(parent) = directory.parent().filter(|parent| parent.is_dir()) {
            crate::site::files::sync_directory(parent)?;
        }
        let mut record = record.clone();
        record.console = super::super::view::ConsolePaths::beside(&directory).or(record.console);
        let kept = EvidenceRecord {
            record,
            term,
            unchanged: protection.moved.is_some(),
            directory,
            at: unix_ns(SystemTime::now()),
        };
        if let Some(vmm) = self.hosted(guest) {
            let mut all = self
                .turns
                .kept
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            all.insert(key.clone(), vmm);
        }
        self.catalogue.put(Table::Evidence, &key, &kept)?;
        self.catalogue.flush()?;
        self.drop_guest_notes(guest);
        let id = guest.to_string();
        self.catalogue.remove(Table::Guests, &id)?;
        self.catalogue.remove(Table::Protections, &id)?;
        self.catalogue.flush()?;
        self.sealed.forget(guest);
        self.forget_hosted(guest);
        Ok(())
    }
}

fn told(message: TurnMessage) -> Message {
    Message::Turn(Box::new(message))
}

/// Reads the stopped copy into the store; the point that it became, 0 when
/// there is nothing to read.
fn read(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    record: &GuestRecord,
    opening: &Opening,
    work: &Reading,
) -> Result<u64, String> {
    match guests::copy_runs(site, record).map_err(|e| e.to_string())? {
        Some(false) => {}
        None => return Ok(0),
        Some(true) => {
            // Fenced or moved, and somebody let it go on by hand.
            site.copy_wrote(record.id).map_err(|e| e.to_string())?;
            guests::stop_guest(site, record).map_err(|e| e.to_string())?;
        }
    }
    let mut guest = site
        .attach_copy(record)
        .map_err(|e| format!("the stopped copy of '{}' cannot be read: {e}", record.name))?;
    let volumes = guest.volumes().to_vec();
    let most: u64 = volumes.iter().map(|v| v.units() * UNIT as u64).sum();
    work.total.store(most, Ordering::Relaxed);
    let store = remote.incoming.store.clone();
    let id = record.id;
    let number = store.next_point(id);
    let parent = parent(&store, id, &site.tracking_key, &mut *guest, &volumes)?;
    let mut sink = BaseSink {
        local: store.local_point(id, number),
        room: Room {
            directory: site.store_directory(&remote.record.key),
            least: site.config.store.min_free.bytes(),
            most,
            looked: 0,
        },
        work,
        failed: None,
    };
    let copied = guest.round(&mut sink);
    // Not detached: what keeps it stopped stays in its directory.
    drop(guest);
    if let Some(why) = sink.failed {
        return Err(why);
    }
    copied.map_err(|e| format!("the stopped copy of '{}' cannot be read: {e}", record.name))?;
    let context = PointContext {
        name: record.name.clone(),
        source: opening.source.clone(),
        term: opening.term.number,
        definition: opening.definition.clone(),
        pause: Duration::ZERO,
        ram_scan: Duration::ZERO,
        ram_scanned_bytes: 0,
        changed_bytes: 0,
        sent_bytes: 0,
        group: None,
        quiesced: None,
        base: true,
    };
    let mut written = Vec::new();
    ciborium::into_writer(&context, &mut written).map_err(|e| e.to_string())?;
    let sealed = sink.local.seal(LocalSeal {
        parent,
        cut_at_unix_ns: unix_ns(SystemTime::now()),
        volumes,
        context: written,
    });
    let header = sealed.map_err(|e| e.to_string())?;
    tracing::info!(guest = %record.name, point = number, bytes = header.stored_bytes,
        "its old copy here is what it is protected upon");
    Ok(header.point)
}

/// An older point of the guest from that site, which the copy differs little
/// from: told to the copy, and its number; 0 when there is none that fits.
fn parent(
    store: &Store,
    id: GuestId,
    key: &DigestKey,
    guest: &mut dyn Guest,
    volumes: &[Volume],
) -> Result<u64, String> {
    let Some(newest) = store.newest(id) else {
        return Ok(0);
    };
    let content = |volume: &&Volume| volume.kind != VolumeKind::DeviceState;
    let before: Vec<_> = newest.volumes.iter().filter(content).collect();
    let now: Vec<_> = volumes.iter().filter(content).collect();
    if before != now {
        return Ok(0);
    }
    let replica = store
        .open_in_part(id, newest.point)
        .map_err(|e| e.to_string())?;
    for (index, volume) in (0..).zip(volumes).filter(|(_, volume)| content(volume)) {
        let units = usize::try_from(volume.units()).map_err(|e| e.to_string())?;
        let mut digests = vec![Digest::ZERO_UNIT; units];
        let (mut bytes, mut piece) = (Vec::new(), Vec::new());
        for (first, count) in replica.nonzero_runs(index) {
            let end = first + count;
            let mut at = first;
            while at < end {
                let count = (end - at).min(PIECE);
                bytes.resize(count as usize * UNIT, 0);
                piece.clear();
                match replica.read(index, at, count, &mut bytes) {
                    Ok(()) => key.digests(&bytes, &mut piece),
                    // Damaged here: the copy has it.
                    Err(_) => piece.resize(count as usize, Digest::UNKNOWN),
                }
                for (slot, digest) in digests.iter_mut().skip(at as usize).zip(&piece) {
                    *slot = *digest;
                }
                at += count;
            }
        }
        guest
            .baseline(newest.point, index, digests)
            .map_err(|e| e.to_string())?;
    }
    Ok(newest.point)
}

/// Room on the store's disk, looked at now and then.
struct Room {
    directory: PathBuf,
    least: u64,
    most: u64,
    looked: u64,
}

impl Room {
    fn check(&mut self, stored: u64) -> Result<(), String> {
        if self.looked > 0 && stored.saturating_sub(self.looked) < LOOK_EVERY {
            return Ok(());
        }
        self.looked = stored.max(1);
        let free = bytes_free(&self.directory);
        if free >= self.least {
            return Ok(());
        }
        Err(format!(
            "{} has {} free, and store.min_free is {}: what is here of the guest does not fit ({} so far, {} at most). Make room there, and run this again",
            self.directory.display(),
            bytes(free),
            bytes(self.least),
            bytes(stored),
            bytes(self.most)
        ))
    }
}

/// Takes the copy's units into the store.
struct BaseSink<'a> {
    local: LocalPoint,
    room: Room,
    work: &'a Reading,
    failed: Option<String>,
}

impl BaseSink<'_> {
    fn took(&mut self, taken: Result<(), LocalError>) -> Result<(), SinkError> {
        let taken = taken.map_err(|e| e.to_string());
        let stored = self.local.stored_bytes();
        taken.and_then(|()| self.room.check(stored)).map_err(|why| {
            self.failed.get_or_insert(why);
            SinkError::Closed
        })
    }
}

impl Sink for BaseSink<'_> {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        for (at, (bytes, digest)) in (unit..).zip(bytes.chunks_exact(UNIT).zip(digests)) {
            let taken = self.local.unit(volume, at, bytes, *digest);
            self.took(taken)?;
        }
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        let taken = self.local.zeros(volume, unit, count);
        self.took(taken)
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.work.done.store(done, Ordering::Relaxed);
        self.work.total.store(total, Ordering::Relaxed);
    }
}

impl Standby {
    /// The first point that can be run is sealed: a copy that holds nothing
    /// beyond that is not needed any more, and its memory is freed.
    pub(in crate::site) fn base_was_built_upon(self: &Arc<Self>) {
        let standby = self.clone();
        tokio::spawn(async move {
            let Some(site) = standby.site.upgrade() else {
                return;
            };
            site.end_unchanged_copies(standby.guest).await;
        });
    }
}
