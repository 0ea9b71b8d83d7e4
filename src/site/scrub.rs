//! Scrub in the living daemon: every stored byte is read and verified, at a
//! bounded rate, now and then by itself and whenever an operator asks.
//!
//! One store at a time, on a thread of its own. How far it is outlives a
//! restart, and so does what was found. What that means for points, and how it
//! is healed, is in [`heal`].

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use farhaven_policies::units::RateLimit;
use farhaven_storage_sync::store::{
    OpenReport, ScrubOptions, ScrubProgress, ScrubReport, Store, Suspect,
};
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::events::EventKind;
use super::operate::OperateError;
use super::remote::Remote;
use super::{Site, age, checked, hex, unix_ns};
use heal::Judged;

mod heal;

/// Where that is kept, below a site's directory.
pub(super) const SCRUBS: &str = "scrub";
/// From one look whether a scrub is due, and at what is damaged, to the next.
const LOOK: Duration = Duration::from_secs(5);
/// Bytes after which it is written down how far a scrub is.
const NOTED: u64 = 64 << 20;
/// Most points that are told as damaged by name.
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
    /// What was found damaged and not whole since.
    suspects: Vec<Suspect>,
}

/// What a scrub is doing.
#[derive(Debug, Clone, Copy)]
struct Running {
    progress: ScrubProgress,
    rate: Option<NonZeroU64>,
}

/// What is known of one store.
#[derive(Default)]
struct Known {
    kept: Kept,
    running: Option<Running>,
    judged: Judged,
}

/// The scrubs of a site, by the names of peers.
#[derive(Default)]
pub(super) struct Scrubs {
    known: Mutex<BTreeMap<String, Known>>,
    /// Held by whoever judges what is damaged, until the alert says so: two who judge at
    /// once could leave the one that knew less.
    judging: Mutex<()>,
    /// What was lost when stores were opened, until a scrub comes to its end.
    at_opening: Mutex<BTreeMap<String, String>>,
    look: Arc<Notify>,
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
    /// Pieces of what is stored that are damaged, as far as is known.
    pub damaged: u64,
    /// Points that cannot be restored in full for it.
    pub points: Vec<DamagedPoint>,
    /// Guests whose newest point is among them: their sources are asked to send
    /// what is damaged anew.
    #[serde(default)]
    pub healing: Vec<String>,
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
    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at_opening(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        let at_opening = self.at_opening.lock();
        at_opening.unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a point of a peer's guest cannot be restored, as it was last judged:
    /// for those who list points. Who runs one asks its store.
    pub(super) fn damaged(&self, peer: &str, guest: GuestId, point: u64) -> Option<String> {
        let known = self.known();
        known.get(peer)?.judged.why(guest, point).map(str::to_owned)
    }

    /// The site of this name is another one from now on.
    pub(super) fn forget(&self, peer: &str) {
        self.known().remove(peer);
        self.at_opening().remove(peer);
    }

    /// Opening a store found points that are lost, or bytes that are no batches:
    /// a scrub is due.
    pub(super) fn opened(&self, peer: &str, report: &OpenReport) {
        let first = match (report.damaged.first(), report.log.bad.first()) {
            (Some(point), _) => (&point.path, &point.why),
            (None, Some(bad)) => (&bad.path, &bad.why),
            (None, None) => return,
        };
        let what = format!(
            "{} points and {} stretches of the log could not be read when the store was opened; the first: {} ({})",
            report.damaged.len(),
            report.log.bad.len(),
            first.1,
            first.0.display()
        );
        self.at_opening().insert(peer.to_owned(), what);
    }
}

/// Has stores read when it is their time, and what is damaged healed, until the
/// site is gone.
pub(super) async fn keep_scrubbing(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        let (remotes, look_now) = (strong.all_remotes(), strong.scrubs.look.clone());
        drop(strong);
        for remote in remotes {
            let begun = {
                let site = site.clone();
                let remote = remote.clone();
                // Reads the store: not on a thread that serves others.
                crate::work::spawn_blocking(move || look(&site, &remote)).await
            };
            if let Err(error) = begun {
                tracing::error!(%error, "looking at what is damaged ended early");
            }
            heal::ask(&site, &remote).await;
        }
        let _ = tokio::time::timeout(LOOK, look_now.notified()).await;
    }
}

fn look(site: &Weak<Site>, remote: &Arc<Remote>) {
    let Some(site) = site.upgrade() else { return };
    site.recall(remote);
    if site.is_due(&remote.record.site) {
        site.begin(remote, site.config.store.scrub_rate);
    }
    site.judge_damage(&remote.record.site, &remote.incoming.store);
}

impl Site {
    fn all_remotes(&self) -> Vec<Arc<Remote>> {
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        remotes.values().cloned().collect()
    }

    fn scrub_file(&self, remote: &Remote) -> PathBuf {
        let name = format!("{}.json", hex(remote.record.key.as_bytes()));
        self.config.site.state_dir.join(SCRUBS).join(name)
    }

    /// Reads what is kept of a store's scrubs, once, and again what was damaged.
    fn recall(&self, remote: &Remote) {
        let peer = &remote.record.site;
        if self.scrubs.known().contains_key(peer) {
            return;
        }
        let kept = read(&self.scrub_file(remote));
        // Before the entry is there: who finds it finds these judged.
        remote.incoming.store.suspect(&kept.suspects);
        let known = Known {
            kept,
            ..Known::default()
        };
        self.scrubs.known().entry(peer.clone()).or_insert(known);
    }

    fn is_due(&self, peer: &str) -> bool {
        let every = self.config.store.scrub_every.duration();
        let known = self.scrubs.known();
        let Some(known) = known.get(peer).filter(|known| known.running.is_none()) else {
            return false;
        };
        if self.scrubs.at_opening().contains_key(peer) {
            return true;
        }
        let kept = &known.kept;
        !every.is_zero() && (kept.next.is_some() || kept.finished.is_none_or(|at| age(at) >= every))
    }

    /// Begins to read a store, or goes on, unless that is under way.
    fn begin(self: &Arc<Self>, remote: &Arc<Remote>, rate: RateLimit) {
        let peer = remote.record.site.clone();
        let rate = rate
            .rate()
            .and_then(|rate| NonZeroU64::new(rate.bits_per_second() / 8));
        let from = {
            let mut known = self.scrubs.known();
            let known = known.entry(peer.clone()).or_default();
            if known.running.is_some() {
                return;
            }
            known.running = Some(Running {
                progress: ScrubProgress::default(),
                rate,
            });
            *known.kept.next.get_or_insert(0)
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
        let spawned = crate::work::spawn_beside("scrub", move || {
            let mut noted = 0;
            let report = store.scrub(options, &mut |progress| scrub.goes_on(progress, &mut noted));
            scrub.ended(&report, &store);
        });
        if let Err(error) = spawned {
            tracing::error!(peer, %error, "no thread to scrub with; it is tried again");
            if let Some(known) = self.scrubs.known().get_mut(&peer) {
                known.running = None;
            }
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
            let peer = remote.record.site.clone();
            let known = self.scrubs.known();
            let nothing = Known::default();
            let known = known.get(&peer).unwrap_or(&nothing);
            let progress = known.running.map(|r| r.progress).unwrap_or_default();
            let named = |guest| self.standby_name(guest);
            let points = known.judged.points().take(MOST_NAMED);
            let points = points.map(|(guest, point, why)| DamagedPoint {
                guest: named(guest),
                point,
                why: why.to_owned(),
            });
            ScrubView {
                running: known.running.is_some(),
                bytes: progress.bytes,
                bytes_total: remote.incoming.store.bytes(),
                bytes_per_second: known.running.and_then(|r| r.rate).map(NonZeroU64::get),
                finished_ago_ms: known.kept.finished.map(|at| age(at).as_millis() as u64),
                damaged: (known.judged.pieces() as u64).max(progress.damage),
                points: points.collect(),
                healing: known.judged.healing().map(named).collect(),
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

/// What is kept in a file; one that is lost or damaged costs a scrub.
fn read(path: &Path) -> Kept {
    checked::read(path, LONGEST_FILE).unwrap_or_default()
}

/// Writes down what is kept of the scrubs of one store. Never waits.
fn keep(site: &Site, file: &Path, kept: &Kept) {
    if let Ok(text) = checked::text(kept) {
        let events = &site.alerts.events;
        events.replace(file.to_owned(), text.into_bytes());
    }
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
        let mut known = site.scrubs.known();
        let Some(known) = known.get_mut(&self.peer) else {
            return ControlFlow::Break(());
        };
        let Some(running) = &mut known.running else {
            return ControlFlow::Break(());
        };
        if running.progress.damage < progress.damage {
            // Judged at once: a point that needs it may be wanted any time.
            site.scrubs.look.notify_one();
        }
        running.progress = *progress;
        if progress.bytes >= *noted + NOTED {
            *noted = progress.bytes;
            known.kept.next = Some(progress.next);
            keep(&site, &self.file, &known.kept);
        }
        ControlFlow::Continue(())
    }

    fn ended(&self, report: &ScrubReport, store: &Store) {
        let Some(site) = self.site.upgrade() else {
            return;
        };
        if report.next.is_none() && self.from == 0 {
            site.scrubs.at_opening().remove(&self.peer);
        }
        site.judge_damage(&self.peer, store);
        {
            let mut known = site.scrubs.known();
            let known = known.entry(self.peer.clone()).or_default();
            known.kept.next = report.next;
            if report.next.is_none() {
                known.kept.finished = Some(unix_ns(SystemTime::now()));
            }
            known.running = None;
            keep(&site, &self.file, &known.kept);
        }
        site.scrubs.look.notify_one();
        if report.next.is_none() {
            let (peer, bytes) = (&self.peer, super::view::bytes(report.bytes));
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
