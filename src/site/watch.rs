//! Looks at the site every second: what is measured becomes facts, and those
//! may become alerts.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::alert::{
    Facts, Finding, Kind, PeerFacts, Severity, SourceFacts, StandbyFacts, StoreFacts,
};
use farhaven_storage_sync::unit::GuestId;

use super::remote::Remote;
use super::view::{Phase, SourceView};
use super::{Site, age, unix_ns};
use crate::replicate::message::Message;

/// From one look to the next.
const EVERY: Duration = Duration::from_secs(1);
/// From one look at the file system to the next.
const STORE_EVERY: Duration = Duration::from_secs(10);
/// From one comparison of clocks to the next.
const CLOCKS_EVERY: Duration = Duration::from_secs(60);
/// A last cut is over long before: who stands still for so long waits for somebody's word.
const STANDS_STILL: Duration = Duration::from_secs(5);
/// Questions of one comparison: the fastest answer tells best.
const CLOCK_QUESTIONS: usize = 4;

/// How a peer's clock stands against this one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Skew {
    /// By how much it differs.
    pub(super) by: Duration,
    /// It is ahead.
    pub(super) ahead: bool,
    /// How far off this may be: half the round trip.
    pub(super) error: Duration,
}

impl Skew {
    /// From when a question left and its answer came, and what it told: the
    /// peer looked at its clock some time between.
    fn of(left: u64, round_trip: Duration, told: u64) -> Self {
        let error = round_trip / 2;
        let then = i128::from(left) + error.as_nanos() as i128;
        let difference = i128::from(told) - then;
        let by = u64::try_from(difference.unsigned_abs()).unwrap_or(u64::MAX);
        Self {
            by: Duration::from_nanos(by),
            ahead: difference > 0,
            error,
        }
    }
}

/// Since when what is.
#[derive(Default)]
struct Since<K>(BTreeMap<K, Instant>);

impl<K: Ord + Clone> Since<K> {
    /// How long it is so that `key`; `None` while it is not.
    fn holds(&mut self, key: &K, is_so: bool) -> Option<Duration> {
        if !is_so {
            self.0.remove(key);
            return None;
        }
        Some(
            self.0
                .entry(key.clone())
                .or_insert_with(Instant::now)
                .elapsed(),
        )
    }

    /// What is asked for no more is forgotten.
    fn only(&mut self, known: impl Fn(&K) -> bool) {
        self.0.retain(|key, _| known(key));
    }
}

/// What looks remember.
#[derive(Default)]
struct Watch {
    unsealed: Since<String>,
    still: Since<String>,
    nowhere: Since<String>,
    degraded: Since<String>,
    silent: Since<String>,
    troubled: Since<String>,
    store: Option<(Instant, Option<StoreFacts>)>,
    clocks: BTreeMap<String, Instant>,
}

/// Looks until the site is gone.
pub(super) async fn watch(site: Weak<Site>) {
    let mut watch = Watch::default();
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(site) = site.upgrade() else { return };
        watch.look(&site).await;
    }
}

impl Watch {
    async fn look(&mut self, site: &Arc<Site>) {
        let facts = Facts {
            sources: self.sources(site),
            standbys: self.standbys(site),
            peers: self.peers(site),
            store: self.store(site).await,
        };
        site.judge(&facts);
        self.groups(site);
        // Nobody will seal a point of a guest that is gone.
        for subject in site.raised(Kind::CutGivenUp) {
            if !facts.sources.iter().any(|source| source.name == subject) {
                site.clear(Kind::CutGivenUp, &subject);
            }
        }
    }

    fn sources(&mut self, site: &Site) -> Vec<SourceFacts> {
        let records = site.guest_records();
        let views: Vec<SourceView> = records.iter().map(|r| site.source_view(r)).collect();
        let known = |id: &String| views.iter().any(|view| view.id == *id);
        self.unsealed.only(known);
        self.still.only(known);
        let stood = site.raised(Kind::GuestStopped);
        let facts = views.into_iter().map(|view| {
            let sealed_age = view.rpo_ms.map(Duration::from_millis);
            let open = sealed_age.is_none() || view.peer.is_none();
            let stands = view.phase == Phase::Held;
            let still = self.still.holds(&view.id, stands);
            // One that stood before this daemon began stands all the time.
            let still = still.map(|since| match stood.contains(&view.name) {
                true => since.max(STANDS_STILL),
                false => since,
            });
            let told = |phase| (view.phase == phase).then(|| view.trouble.clone());
            SourceFacts {
                paused: view.phase == Phase::Paused,
                rpo: Duration::from_millis(view.rpo_target_ms.unwrap_or_default()),
                sealed_age,
                known_for: self.unsealed.holds(&view.id, open).unwrap_or_default(),
                fenced: told(Phase::Fenced),
                stands,
                held: still.and_then(|since| stands_still(since, &view.trouble)),
                lost: told(Phase::Lost),
                elsewhere: view.phase == Phase::Moved,
                name: view.name,
                peer: view.peer,
                trouble: view.trouble,
            }
        });
        facts.collect()
    }

    /// Tells of groups that are not protected as a whole, or are again. The last cut of
    /// a move is no news.
    fn groups(&mut self, site: &Site) {
        let views = site.group_views().into_iter();
        let degraded: BTreeMap<String, String> = views
            .filter(|group| group.from.is_none() && group.trouble.starts_with("degraded"))
            .map(|group| (group.name, group.trouble))
            .collect();
        self.degraded.only(|group| degraded.contains_key(group));
        for (group, what) in &degraded {
            let since = self.degraded.holds(group, true).unwrap_or_default();
            if since >= STANDS_STILL {
                let advice = format!("see: farhaven group show {group}");
                let (kind, severity) = (Kind::GroupDegraded, Severity::Warning);
                site.raise(Finding::new(kind, group.clone(), severity, what, advice));
            }
        }
        for group in site.raised(Kind::GroupDegraded) {
            if !degraded.contains_key(&group) {
                site.clear(Kind::GroupDegraded, &group);
            }
        }
    }

    fn standbys(&mut self, site: &Site) -> Vec<StandbyFacts> {
        let drivers = site.drivers.read().unwrap_or_else(PoisonError::into_inner);
        let protected: Vec<GuestId> = drivers.keys().copied().collect();
        drop(drivers);
        let standbys = site.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let standbys: Vec<_> = standbys.values().cloned().collect();
        let known = |id: &String| standbys.iter().any(|s| s.guest.to_string() == *id);
        self.nowhere.only(known);
        let facts = standbys.iter().map(|standby| {
            let guest = standby.guest;
            let name = standby.name();
            let active = standby.active();
            let ours = site.fence.current(guest);
            let ours = ours.is_some_and(|term| term.owner == site.key());
            let nowhere = ours
                && active.is_none()
                && !protected.contains(&guest)
                && !standby.is_turned()
                && site.runs.of_guest(&name).is_none();
            let nowhere = self.nowhere.holds(&guest.to_string(), nowhere);
            let active = active.filter(|_| !protected.contains(&guest));
            let (tested, untested_for) = match standby.newest() {
                0 => (false, None),
                _ => site.alerts.untested(guest),
            };
            StandbyFacts {
                name,
                from: standby.from(),
                runs_nowhere_for: nowhere,
                trouble: standby.seen().trouble,
                unprotected_for: active.map(|active| age(active.at)),
                untested_for,
                tested,
            }
        });
        facts.collect()
    }

    fn peers(&mut self, site: &Arc<Site>) -> Vec<PeerFacts> {
        let remotes = site.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let remotes: Vec<Arc<Remote>> = remotes.values().cloned().collect();
        let known = |name: &String| remotes.iter().any(|r| r.record.site == *name);
        self.silent.only(known);
        self.troubled.only(known);
        self.clocks.retain(|name, _| known(name));
        let mut skews = site.alerts.skews();
        skews.retain(|name, _| known(name));
        let facts = remotes.iter().map(|remote| {
            let name = &remote.record.site;
            let alive = remote.alive();
            let compared = self.clocks.get(name);
            if alive && compared.is_none_or(|at| at.elapsed() >= CLOCKS_EVERY) {
                self.clocks.insert(name.clone(), Instant::now());
                tokio::spawn(compare_clocks(Arc::downgrade(site), remote.clone()));
            }
            let trouble = remote.trouble();
            let since = self.troubled.holds(name, !trouble.is_empty());
            let skew = skews.get(name);
            PeerFacts {
                site: name.clone(),
                silent_for: self.silent.holds(name, !alive),
                skew: skew.map(|skew| (skew.by, skew.error)),
                ahead: skew.is_some_and(|skew| skew.ahead),
                trouble: since.map(|since| (trouble, since)),
            }
        });
        facts.collect()
    }

    async fn store(&mut self, site: &Site) -> Option<StoreFacts> {
        if let Some((at, facts)) = &self.store
            && at.elapsed() < STORE_EVERY
        {
            return facts.clone();
        }
        let (directory, reserve) = (site.config.store_dir(), site.config.store.min_free.bytes());
        // A disk that hangs must not keep other alerts.
        let looked = crate::work::spawn_blocking(move || {
            let room = rustix::fs::statvfs(&directory).ok()?;
            Some(StoreFacts {
                path: directory.display().to_string(),
                total: room.f_blocks.saturating_mul(room.f_frsize),
                free: room.f_bavail.saturating_mul(room.f_frsize),
                reserve,
            })
        });
        let looked = tokio::time::timeout(EVERY, looked).await;
        let facts = looked.ok().and_then(Result::ok).flatten();
        self.store = Some((Instant::now(), facts.clone()));
        facts
    }
}

/// What to tell of a guest that is held for its move or a run, once that takes longer
/// than a last cut does.
fn stands_still(since: Duration, trouble: &str) -> Option<String> {
    (since >= STANDS_STILL).then(|| match trouble {
        "" => "its last cut is on its way to the peer".to_owned(),
        trouble => trouble.to_owned(),
    })
}

/// Asks a peer for the time, some times over.
async fn compare_clocks(site: Weak<Site>, remote: Arc<Remote>) {
    let mut best: Option<Skew> = None;
    for _ in 0..CLOCK_QUESTIONS {
        let (left, asked) = (unix_ns(SystemTime::now()), Instant::now());
        // A peer of before does not know the question: nothing is known of its clock then.
        let Ok(Message::ClockTold { at }) = remote.ask(Message::Clock).await else {
            break;
        };
        let skew = Skew::of(left, asked.elapsed(), at);
        if best.is_none_or(|best| skew.error < best.error) {
            best = Some(skew);
        }
    }
    if let (Some(site), Some(skew)) = (site.upgrade(), best) {
        site.alerts.skews().insert(remote.record.site.clone(), skew);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
