//! What guests may take of the link, and who goes first: kept up to date.
//!
//! Limits come from the configuration (`[link]`, `[protect]`), which may be read anew while
//! the daemon runs, and from operators (`farhaven link limit`), whose word wins and is kept
//! over restarts. Windows of time are looked at every second and at the turn of each
//! minute, by the configured time zone. What holds goes to [`Shares`], which every shipment
//! passes, at once: also for batches that wait already.

mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use farhaven_policies::bandwidth::{LinkTerms, limit_at};
use farhaven_policies::site::SiteConfig;
use farhaven_policies::units::RateLimit;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use farhaven_wan::pace::{Flow, Shares};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

pub use view::{GuestLink, LinkView, SetLimit};

use super::operate::{OperateError, failed};
use super::records::{GroupShare, Protection};
use super::{Site, checked};

/// What a QUIC connection may send for each bit of batches within the cap: its headers,
/// and what it sends again.
const OVERHEAD: f64 = 1.06;

/// So many of a flow's weights make one of a priority: parts of it can be told apart.
const WEIGHTS: u32 = 3;
const _: () = assert!(u8::MAX as u32 * WEIGHTS <= farhaven_wan::pace::WEIGHT_LIMIT);

/// Longest file of operators' limits that is read.
const LONGEST_FILE: u64 = 4 << 20;

/// No such time zone.
#[derive(Debug, thiserror::Error)]
#[error(
    "link.time_zone is {name:?}, which this host does not know ({source}); name one like \"Europe/Berlin\", or leave it empty for the host's own"
)]
pub struct ZoneError {
    name: String,
    #[source]
    source: jiff::Error,
}

/// What operators set; kept as JSON in the site's directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Set {
    /// Of all guests together.
    site: Option<RateLimit>,
    /// Of single guests.
    guests: BTreeMap<String, LinkTerms>,
}

/// What the configuration says.
struct Configured {
    site: LinkTerms,
    guests: LinkTerms,
    zone: TimeZone,
}

impl Configured {
    fn of(config: &SiteConfig) -> Result<Self, ZoneError> {
        let name = &config.link.time_zone;
        let zone = match name.as_str() {
            "" => TimeZone::system(),
            name => TimeZone::get(name).map_err(|source| ZoneError {
                name: name.to_owned(),
                source,
            })?,
        };
        Ok(Self {
            site: LinkTerms {
                bandwidth: config.link.rate_limit,
                windows: config.link.windows.clone(),
                priority: 0,
            },
            guests: config.protect.link_terms(),
            zone,
        })
    }
}

/// Limits and shares of a site's links.
pub(super) struct Limits {
    shares: Arc<Shares>,
    /// For the congestion controllers: what is in QUIC's hands already heeds a new cap, too.
    controllers: Arc<AtomicU64>,
    file: PathBuf,
    state: Mutex<State>,
}

struct State {
    configured: Configured,
    set: Set,
    flows: BTreeMap<GuestId, (String, Weak<Flow>)>,
    /// Guests that go before the others while they are moved.
    favoured: BTreeSet<GuestId>,
    /// What the policies of groups say.
    owed: BTreeMap<GuestId, (LinkTerms, Option<GroupShare>)>,
}

impl Limits {
    /// By the configuration, and what operators set before.
    ///
    /// # Errors
    /// When the time zone is not known.
    pub(super) fn open(config: &SiteConfig) -> Result<Self, ZoneError> {
        let file = config.site.state_dir.join("limits.json");
        let set = read(&file).unwrap_or_else(|error| {
            tracing::error!(file = %file.display(), error, "limits that operators set cannot be read; the configuration's hold. Set them again");
            Set::default()
        });
        let limits = Self {
            shares: Shares::new(0),
            controllers: Arc::default(),
            file,
            state: Mutex::new(State {
                configured: Configured::of(config)?,
                set,
                flows: BTreeMap::new(),
                favoured: BTreeSet::new(),
                owed: BTreeMap::new(),
            }),
        };
        limits.apply(Timestamp::now());
        Ok(limits)
    }

    /// The cap that congestion controllers are to heed; 0 is none.
    pub(super) fn controllers(&self) -> Arc<AtomicU64> {
        self.controllers.clone()
    }

    /// A guest's flow to a peer, for as long as somebody holds it; `None` when there are
    /// more than can be told apart.
    pub(super) fn join(&self, guest: GuestId, name: &str, peer: SiteKey) -> Option<Arc<Flow>> {
        let flow = match self.shares.join(peer) {
            Ok(flow) => Arc::new(flow),
            Err(error) => {
                tracing::error!(guest = name, %error, "no limit holds for this guest");
                return None;
            }
        };
        let entry = (name.to_owned(), Arc::downgrade(&flow));
        self.state().flows.insert(guest, entry);
        self.apply(Timestamp::now());
        Some(flow)
    }

    /// What a guest is owed by the policy of its group; without one the
    /// configuration holds for it.
    pub(super) fn owe(&self, protection: &Protection) {
        let terms = protection.policy.link_terms();
        let mut state = self.state();
        match protection.group {
            Some(_) => state
                .owed
                .insert(protection.guest, (terms, protection.share)),
            None => state.owed.remove(&protection.guest),
        };
        drop(state);
        self.apply(Timestamp::now());
    }

    /// What the configuration says now.
    ///
    /// # Errors
    /// When the time zone is not known; everything stays as it was.
    pub(super) fn configure(&self, config: &SiteConfig) -> Result<(), ZoneError> {
        self.state().configured = Configured::of(config)?;
        self.apply(Timestamp::now());
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in force what holds at this time.
    fn apply(&self, at: Timestamp) {
        let mut state = self.state();
        state.flows.retain(|_, (_, flow)| flow.strong_count() > 0);
        let minute = minute_of_week(at, &state.configured.zone);
        let cap = bits(state.site(minute).0);
        // Not a hard promise of the connection's: the shares keep the rate.
        let with_headers = (cap as f64 * OVERHEAD) as u64;
        self.controllers.store(with_headers, Ordering::Relaxed);
        self.shares.set_cap(cap);
        for (guest, (name, flow)) in &state.flows {
            let Some(flow) = flow.upgrade() else { continue };
            let (limit, _, priority) = state.guest(*guest, minute);
            let weight = state.weight(*guest, priority);
            if let Err(error) = flow.set(weight, bits(limit)) {
                tracing::error!(guest = name, %error, "its limit does not hold");
            }
        }
    }

    /// Has this guest a limit of its own now? Its cuts are held back by it, and
    /// the last cut of a move is not.
    pub(super) fn holds_back(&self, guest: GuestId) -> bool {
        let state = self.state();
        bits(state.guest(guest, state.minute()).0) != 0
    }

    /// The limit of all guests together that holds now, bytes a second: the last
    /// cut of a move heeds it, too.
    pub(super) fn together(&self) -> Option<u64> {
        let state = self.state();
        let bits = bits(state.site(state.minute()).0);
        (bits > 0).then_some(bits / 8)
    }

    /// Lets a guest go before others on the link, or ends that: at once, and for no longer
    /// than this process lives.
    pub(super) fn favour(&self, guest: GuestId, before_others: bool) {
        let mut state = self.state();
        let changed = match before_others {
            true => state.favoured.insert(guest),
            false => state.favoured.remove(&guest),
        };
        drop(state);
        if changed {
            self.apply(Timestamp::now());
        }
    }

    /// What holds now, and by whose word.
    pub(super) fn view(&self) -> LinkView {
        let state = self.state();
        let minute = state.minute();
        let (limit, by) = state.site(minute);
        let guests = state.flows.iter().map(|(guest, (name, _))| {
            let (limit, by, priority) = state.guest(*guest, minute);
            GuestLink {
                name: name.clone(),
                limit,
                by,
                priority,
            }
        });
        LinkView {
            limit,
            by,
            time_zone: state
                .configured
                .zone
                .iana_name()
                .unwrap_or("the host's own")
                .to_owned(),
            guests: guests.collect(),
        }
    }

    /// An operator's word: in force at once, and written down.
    fn set(&self, guest: Option<GuestId>, change: &SetLimit) -> Result<(), OperateError> {
        let mut set = self.state().set.clone();
        match guest {
            None if change.priority.is_some() => {
                return Err(OperateError::Conflict(
                    "a priority is one guest's among others; name the guest".to_owned(),
                ));
            }
            None if change.configured => set.site = None,
            None => set.site = change.limit.or(set.site),
            Some(guest) if change.configured => {
                set.guests.remove(&guest.to_string());
            }
            Some(guest) => {
                let usual = self.state().configured.guests.clone();
                let terms = set.guests.entry(guest.to_string()).or_insert(usual);
                if let Some(limit) = change.limit {
                    terms.bandwidth = limit;
                    terms.windows.clear();
                }
                terms.priority = change.priority.unwrap_or(terms.priority);
            }
        }
        checked::write(&self.file, &set)
            .map_err(|e| failed(format!("{}: {e}", self.file.display())))?;
        self.state().set = set;
        self.apply(Timestamp::now());
        Ok(())
    }
}

impl State {
    fn minute(&self) -> u32 {
        minute_of_week(Timestamp::now(), &self.configured.zone)
    }

    fn site(&self, minute: u32) -> (RateLimit, String) {
        match self.set.site {
            Some(limit) => (limit, "operator".to_owned()),
            None => of(&self.configured.site, minute),
        }
    }

    fn guest(&self, guest: GuestId, minute: u32) -> (RateLimit, String, u8) {
        let (limit, by, priority) = self.usual(guest, minute);
        match self.favoured.contains(&guest) {
            true => (limit, by, u8::MAX),
            false => (limit, by, priority),
        }
    }

    /// What a guest may take by its group's share of the link, as far as it is
    /// said what that carries.
    fn part(&self, share: GroupShare, minute: u32) -> RateLimit {
        if share.percent >= 100 {
            return RateLimit::NONE;
        }
        let link = self.site(minute).0.least(share.link);
        link.percent(share.percent).divided(u64::from(share.among))
    }

    /// Its weight beside others. The priority of a group is that of its guests
    /// together: ten of them get no more than one.
    fn weight(&self, guest: GuestId, priority: u8) -> u32 {
        let by_group =
            !self.favoured.contains(&guest) && !self.set.guests.contains_key(&guest.to_string());
        let share = self.owed.get(&guest).and_then(|(_, share)| *share);
        let among = share
            .filter(|_| by_group)
            .map_or(1, |share| share.among.max(1));
        let weight = u32::from(priority) * WEIGHTS;
        // Only a priority of 0 gets what the others leave.
        (weight / u32::from(among)).max(u32::from(priority > 0))
    }

    fn usual(&self, guest: GuestId, minute: u32) -> (RateLimit, String, u8) {
        match self.set.guests.get(&guest.to_string()) {
            Some(terms) => (
                terms.limit_at(minute),
                "operator".to_owned(),
                terms.priority,
            ),
            None => {
                let owed = self.owed.get(&guest);
                let terms = owed.map_or(&self.configured.guests, |(terms, _)| terms);
                let (limit, by) = of(terms, minute);
                let by = match (owed, by.as_str()) {
                    (Some(_), "configuration") => "policy".to_owned(),
                    _ => by,
                };
                let share = owed.and_then(|(_, share)| *share);
                let part = share.map_or(RateLimit::NONE, |share| self.part(share, minute));
                match limit.least(part) {
                    least if least == limit => (limit, by, terms.priority),
                    least => (least, "share".to_owned(), terms.priority),
                }
            }
        }
    }
}

/// A limit of the configuration, and which part of that says so.
fn of(terms: &LinkTerms, minute: u32) -> (RateLimit, String) {
    let window = terms.windows.iter().find(|(name, window)| {
        let only = BTreeMap::from([((*name).clone(), (*window).clone())]);
        // Neither limit may pass for the other.
        let outside = RateLimit::at(farhaven_policies::units::Rate::from_bits(0));
        limit_at(outside, &only, minute) != outside
    });
    match window {
        Some((name, window)) => (window.bandwidth, format!("window {name}")),
        None => (terms.bandwidth, "configuration".to_owned()),
    }
}

fn bits(limit: RateLimit) -> u64 {
    limit.rate().map_or(0, |rate| rate.bits_per_second())
}

/// By the clocks on the wall in this zone; the week begins on Monday.
fn minute_of_week(at: Timestamp, zone: &TimeZone) -> u32 {
    let local = at.to_zoned(zone.clone());
    let day = i32::from(local.weekday().to_monday_zero_offset());
    let minute = (day * 24 + i32::from(local.hour())) * 60 + i32::from(local.minute());
    u32::try_from(minute).unwrap_or(0)
}

fn read(file: &Path) -> Result<Set, String> {
    let read = checked::read_if_there(file, LONGEST_FILE);
    Ok(read.map_err(|error| error.to_string())?.unwrap_or_default())
}

/// Windows begin and end.
pub(super) async fn keep(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        let now = Timestamp::now();
        strong.limits.apply(now);
        drop(strong);
        let into_minute = now.as_millisecond().rem_euclid(60_000) as u64;
        let left = Duration::from_millis(60_000 - into_minute);
        tokio::time::sleep(left.min(Duration::from_secs(1))).await;
    }
}

impl Site {
    /// What guests may take of the link now.
    #[must_use]
    pub fn link(&self) -> LinkView {
        self.limits.view()
    }

    /// Sets a limit or a share, at once and until it is set otherwise.
    ///
    /// # Errors
    /// When there is no such guest, or it cannot be written down.
    pub fn set_limit(&self, change: &SetLimit) -> Result<LinkView, OperateError> {
        if change.configured == (change.limit.is_some() || change.priority.is_some()) {
            return Err(OperateError::Conflict(
                "give a limit or a priority, or go back to what the configuration says".to_owned(),
            ));
        }
        let guest = match &change.guest {
            Some(name) => Some(self.guest(name)?.id),
            None => None,
        };
        self.limits.set(guest, change)?;
        let view = self.limits.view();
        tracing::info!(guest = ?change.guest, limit = %view.limit, ?change, "an operator set what the link carries");
        Ok(view)
    }

    /// Takes over what may change while the daemon runs: limits, windows, shares and their
    /// time zone. True when other keys differ, which hold after a restart only.
    ///
    /// # Errors
    /// When the time zone is not known; everything stays as it was.
    pub fn reload(&self, config: &SiteConfig) -> Result<bool, ZoneError> {
        self.limits.configure(config)?;
        let mut rest = config.clone();
        let before = &self.config;
        self.policies.look_again();
        rest.link.rate_limit = before.link.rate_limit;
        rest.link.windows = before.link.windows.clone();
        rest.link.time_zone = before.link.time_zone.clone();
        rest.protect.bandwidth = before.protect.bandwidth;
        rest.protect.windows = before.protect.windows.clone();
        rest.protect.priority = before.protect.priority;
        Ok(rest != *before)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
