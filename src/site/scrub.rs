//! Scrub in the living daemon: every stored byte is read and verified, at a
//! bounded rate, now and then by itself and whenever an operator asks.
//!
//! One store at a time, on a thread of its own. How far it is outlives a
//! restart. What is found damaged is an alert; points that need it are told as
//! damaged and are refused, until a scrub to the end finds them whole.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use farhaven_policies::alert::Severity;
use farhaven_policies::units::RateLimit;
use farhaven_storage_sync::store::{Damage, ScrubOptions, ScrubProgress, ScrubReport};
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::alerts::{Alert, Kind};
use super::events::EventKind;
use super::operate::OperateError;
use super::remote::Remote;
use super::{Site, age, hex, unix_ns};

/// From one look whether a scrub is due to the next.
const LOOK: Duration = Duration::from_secs(30);
/// Bytes after which it is written down how far a scrub is.
const NOTED: u64 = 64 << 20;
/// Most damage that is kept by name; the count is exact.
const MOST_NAMED: usize = 1000;
/// Longest file of that which is read.
const LONGEST_FILE: u64 = 64 << 20;

/// What is kept of the scrubs of one store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    /// The batch that an unfinished scrub goes on at.
    next: Option<u64>,
    /// When the last one came to its end, nanoseconds since 1970.
    finished: Option<u64>,
    /// Pieces of damage that the last one found, or the present one so far.
    damaged: u64,
    /// Points that cannot be restored in full for it, and why.
    points: Vec<(GuestId, u64, String)>,
}

/// What a scrub is doing.
#[derive(Debug, Clone, Copy)]
struct Running {
    progress: ScrubProgress,
    rate: Option<NonZeroU64>,
}

/// The scrubs of a site, by the names of peers.
#[derive(Default)]
pub(super) struct Scrubs {
    kept: Mutex<BTreeMap<String, Kept>>,
    running: Mutex<BTreeMap<String, Running>>,
}

/// How the scrub of what a peer sent stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubView {
    /// The peer.
    pub peer: String,
    /// It reads now.
    pub running: bool,
    /// Bytes read by the one that runs.
    #[serde(default)]
    pub bytes: u64,
    /// Bytes of all that is stored.
    #[serde(default)]
    pub bytes_total: u64,
    /// Most bytes that it reads a second; `None`: as fast as it goes.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    /// How long ago the last one came to its end.
    pub finished_ago_ms: Option<u64>,
    /// Pieces of damage found by the last one, or by the one that runs so far.
    pub damaged: u64,
    /// Points that cannot be restored in full for it: guest, number, why.
    pub points: Vec<DamagedPoint>,
}

/// A point that needs what is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPoint {
    /// The guest, by its name where that is known.
    pub guest: String,
    /// The point.
    pub point: u64,
    /// What is wrong.
    pub why: String,
}

impl Scrubs {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a point of a peer's guest cannot be restored, if that was found.
    pub(super) fn damaged(&self, peer: &str, guest: GuestId, point: u64) -> Option<String> {
        let kept = self.kept();
        let points = &kept.get(peer)?.points;
        let found = points
            .iter()
            .find(|(of, number, _)| (*of, *number) == (guest, point));
        found.map(|(_, _, why)| why.clone())
    }
}

/// Has stores read when it is their time, until the site is gone.
pub(super) async fn keep_scrubbing(site: Weak<Site>) {
    loop {
        {
            let Some(site) = site.upgrade() else { return };
            for remote in site.all_remotes() {
                site.recall(&remote);
                if site.is_due(&remote.record.site) {
                    let rate = site.config.store.scrub_rate;
                    site.begin(&remote, rate);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl Site {
    fn all_remotes(&self) -> Vec<Arc<Remote>> {
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        remotes.values().cloned().collect()
    }

    fn scrub_file(&self, remote: &Remote) -> PathBuf {
        let name = format!("{}.json", hex(remote.record.key.as_bytes()));
        self.config.site.state_dir.join("scrub").join(name)
    }

    /// Reads what is kept of a store's scrubs, once.
    fn recall(&self, remote: &Remote) {
        let mut kept = self.scrubs.kept();
        kept.entry(remote.record.site.clone())
            .or_insert_with(|| read(&self.scrub_file(remote)));
    }

    fn is_due(&self, peer: &str) -> bool {
        let every = self.config.store.scrub_every.duration();
        let kept = self.scrubs.kept();
        let Some(kept) = kept.get(peer).filter(|_| !every.is_zero()) else {
            return false;
        };
        kept.next.is_some() || kept.finished.is_none_or(|at| age(at) >= every)
    }

    /// Begins to read a store, or goes on, unless that is under way.
    fn begin(self: &Arc<Self>, remote: &Arc<Remote>, rate: RateLimit) {
        let peer = remote.record.site.clone();
        let rate = rate
            .rate()
            .and_then(|rate| NonZeroU64::new(rate.bits_per_second() / 8));
        let running = Running {
            progress: ScrubProgress::default(),
            rate,
        };
        let mut all = self.scrubs.running();
        if all.contains_key(&peer) {
            return;
        }
        all.insert(peer.clone(), running);
        drop(all);
        let from = {
            let mut kept = self.scrubs.kept();
            let kept = kept.entry(peer.clone()).or_default();
            if kept.next.is_none() {
                // What was damaged is told until this one has come to its end.
                kept.next = Some(0);
            }
            kept.next.unwrap_or_default()
        };
        let scrub = Scrub {
            site: Arc::downgrade(self),
            peer: peer.clone(),
            file: self.scrub_file(remote),
            from,
        };
        let store = remote.incoming.store.clone();
        let options = ScrubOptions {
            bytes_per_second: rate,
            from,
        };
        let thread = std::thread::Builder::new().name("scrub".to_owned());
        let spawned = thread.spawn(move || {
            let mut noted = 0;
            let report = store.scrub(options, &mut |progress| scrub.goes_on(progress, &mut noted));
            // The store is let go of before the site may be started anew.
            drop(store);
            scrub.ended(&report);
        });
        if let Err(error) = spawned {
            tracing::error!(peer, %error, "no thread to scrub with; it is tried again");
            self.scrubs.running().remove(&peer);
        }
    }

    /// Begins to read what a peer sent (all peers if none is named), or goes on.
    ///
    /// # Errors
    /// When there is no such peer, or none at all.
    pub fn scrub(
        self: &Arc<Self>,
        peer: Option<&str>,
        rate: Option<RateLimit>,
    ) -> Result<Vec<ScrubView>, OperateError> {
        let remotes = match peer {
            Some(name) => vec![self.remote(name).ok_or_else(|| self.no_peer(name))?],
            None => self.all_remotes(),
        };
        if remotes.is_empty() {
            return Err(OperateError::Conflict(
                "no site is paired, so nothing is stored here; pair one: farhaven pair".to_owned(),
            ));
        }
        for remote in &remotes {
            self.recall(remote);
            self.begin(remote, rate.unwrap_or(self.config.store.scrub_rate));
        }
        Ok(self.scrubs())
    }

    /// How the scrubs of all stores stand.
    pub fn scrubs(&self) -> Vec<ScrubView> {
        let remotes = self.all_remotes();
        let views = remotes.iter().map(|remote| {
            self.recall(remote);
            let peer = remote.record.site.clone();
            let kept = self.scrubs.kept().get(&peer).cloned().unwrap_or_default();
            let running = self.scrubs.running().get(&peer).copied();
            let progress = running.map(|r| r.progress).unwrap_or_default();
            let points = kept
                .points
                .into_iter()
                .map(|(guest, point, why)| DamagedPoint {
                    guest: self.standby_name(guest),
                    point,
                    why,
                });
            ScrubView {
                running: running.is_some(),
                bytes: progress.bytes,
                bytes_total: remote.incoming.store.bytes(),
                bytes_per_second: running.and_then(|r| r.rate).map(NonZeroU64::get),
                finished_ago_ms: kept.finished.map(|at| age(at).as_millis() as u64),
                damaged: kept.damaged.max(progress.damage),
                points: points.collect(),
                peer,
            }
        });
        views.collect()
    }

    fn standby_name(&self, guest: GuestId) -> String {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        standbys
            .get(&guest)
            .map_or_else(|| guest.to_string(), |standby| standby.name())
    }
}

fn read(path: &Path) -> Kept {
    use std::io::Read;
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|f| f.take(LONGEST_FILE).read_to_end(&mut bytes));
    // One that is lost or damaged costs a scrub.
    read.ok()
        .and_then(|_| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// One scrub that runs.
struct Scrub {
    site: Weak<Site>,
    peer: String,
    file: PathBuf,
    from: u64,
}

impl Scrub {
    fn goes_on(&self, progress: &ScrubProgress, noted: &mut u64) -> ControlFlow<()> {
        let Some(site) = self.site.upgrade() else {
            return ControlFlow::Break(());
        };
        if let Some(running) = site.scrubs.running().get_mut(&self.peer) {
            running.progress = *progress;
        } else {
            return ControlFlow::Break(());
        }
        // With damage in what was read, a killed daemon reads it again.
        if progress.damage == 0 && progress.bytes >= *noted + NOTED {
            *noted = progress.bytes;
            let mut kept = site.scrubs.kept();
            if let Some(kept) = kept.get_mut(&self.peer) {
                kept.next = Some(progress.next);
                self.keep(&site, kept);
            }
        }
        ControlFlow::Continue(())
    }

    fn keep(&self, site: &Site, kept: &Kept) {
        if let Some(directory) = self.file.parent()
            && let Err(error) = super::files::private_directory(directory)
        {
            tracing::error!(path = %directory.display(), %error, "how far a scrub is cannot be kept");
            return;
        }
        if let Ok(bytes) = serde_json::to_vec(kept) {
            site.alerts.events.replace(self.file.clone(), bytes);
        }
    }

    fn ended(&self, report: &ScrubReport) {
        let Some(site) = self.site.upgrade() else {
            return;
        };
        {
            let mut all = site.scrubs.kept();
            let kept = all.entry(self.peer.clone()).or_default();
            let points = points_of(&report.damage);
            match report.next {
                // Told to stop: the next one goes on there, and what this one
                // found is added to what is known.
                Some(next) => {
                    kept.next = Some(next);
                    kept.damaged = kept.damaged.max(report.damage.len() as u64);
                    for point in points {
                        if !kept.points.contains(&point) {
                            kept.points.push(point);
                        }
                    }
                }
                None if self.from == 0 || report.damage.is_empty() && kept.damaged == 0 => {
                    *kept = Kept {
                        next: None,
                        finished: Some(unix_ns(SystemTime::now())),
                        damaged: report.damage.len() as u64,
                        points,
                    };
                }
                // It began in the middle, and something is damaged: only one
                // from the beginning knows all of it.
                None => {
                    kept.next = Some(0);
                    kept.damaged = kept.damaged.max(report.damage.len() as u64);
                }
            }
            self.keep(&site, kept);
        }
        site.scrubs.running().remove(&self.peer);
        self.tell(&site, report);
    }

    fn tell(&self, site: &Site, report: &ScrubReport) {
        let peer = &self.peer;
        if let Some(first) = report.damage.first() {
            let points: usize = points_of(&report.damage).len();
            site.raise(Alert::new(
                Kind::StoreDamaged,
                peer,
                Severity::Critical,
                format!(
                    "{} pieces of what '{peer}' sent are damaged on disk, {points} points need them; the first: {} ({})",
                    report.damage.len(),
                    first.why,
                    first.path.display()
                ),
                "check the disk under the store (smartctl, dmesg); run what must run from a point that is whole: farhaven scrub shows which are not. Where the newest is not, begin anew at its source: farhaven unprotect GUEST --discard, farhaven protect GUEST; what is whole here is not sent again",
            ));
        } else if report.next.is_none() && self.from == 0 {
            site.clear(Kind::StoreDamaged, peer);
        }
        if report.next.is_none() {
            let bytes = super::view::bytes(report.bytes);
            let what = match report.damage.len() {
                0 => format!("{bytes} of what '{peer}' sent were read, all of it is whole"),
                damage => {
                    format!("{bytes} of what '{peer}' sent were read, {damage} pieces are damaged")
                }
            };
            site.note(EventKind::Scrubbed, peer, &what);
        }
    }
}

fn points_of(damage: &[Damage]) -> Vec<(GuestId, u64, String)> {
    let mut points: BTreeMap<(GuestId, u64), String> = BTreeMap::new();
    for damage in damage {
        for point in &damage.points {
            if points.len() < MOST_NAMED {
                points.entry(*point).or_insert_with(|| damage.why.clone());
            }
        }
    }
    let points = points.into_iter();
    points
        .map(|((guest, point), why)| (guest, point, why))
        .collect()
}
