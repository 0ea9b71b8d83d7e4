//! Which points of peers' guests stay, and letting the others go.
//!
//! What is owed is the policy's word ([`judged`]), but for points that
//! somebody gave a name, and those that something runs from: they stay. A prune
//! is a plan first; its source forgets what is about to go, then it goes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use farhaven_policies::retain::{self, Point, Reason, Verdict};
use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::prune::{Keep, PruneReport};
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::events::EventKind;
use super::groups::{self, Fates};
use super::operate::{OperateError, failed};
use super::remote::{AskError, Remote};
use super::standby::Standby;
use super::{Site, age};
use crate::replicate::message::{Message, Opening, RETIRE_BATCHES};

/// How often points are looked through for those past their time.
const PRUNE_EVERY: Duration = Duration::from_secs(30);

/// The source forgets batches at the end of the shipments under way.
const FORGET: Duration = Duration::from_secs(300);

/// What was told to end reads points for moments still.
const LET_GO: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A peer's store is pruned by itself only when this many of its points are past their time.
const WORTH_PRUNING: usize = 4;

/// What a prune would do with a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointFate {
    /// Its number.
    pub point: u64,
    /// How long ago it was cut.
    pub age_ms: u64,
    /// It stays.
    pub keep: bool,
    /// Why it stays or goes.
    pub reason: String,
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// What a prune would do, or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneView {
    /// The guest.
    pub guest: String,
    /// The peer that sends it.
    pub from: String,
    /// By what its points are kept.
    pub retention: String,
    /// Its points, the oldest first.
    pub points: Vec<PointFate>,
    /// Points that go.
    pub dropped: usize,
    /// Bytes that the store is smaller by: what only they need, in segments
    /// that are worth being written anew.
    pub bytes_freed: u64,
}

/// A point with what is to become of it.
struct Judged {
    header: PointHeader,
    keep: bool,
    reason: String,
    name: Option<String>,
}

/// By what the points of an opening's guest are kept.
fn verdicts(opening: &Opening, points: &[Point]) -> Vec<Verdict> {
    let now = SystemTime::now();
    match &opening.schedule {
        Some(schedule) => schedule.retain(points, now),
        None => retain::retain(&opening.retention, points, now),
    }
}

/// The same, for people.
fn retention(opening: &Opening) -> String {
    if let Some(schedule) = &opening.schedule {
        return schedule.to_string();
    }
    let kept = &opening.retention;
    format!(
        "all for {}, every {} for {}, newest {}",
        kept.all, kept.then_every, kept.until, kept.newest
    )
}

/// What is to become of each point, the oldest first.
fn judged(standby: &Standby, fates: &Fates) -> Vec<Judged> {
    // Hydrated or not: a daemon that starts anew finds its guest by the point.
    let in_use = standby.points_in_use();
    let headers = standby.points();
    let kept = standby.remote().incoming.store.kept(standby.guest);
    let newest = headers.last().map(|p| p.point);
    let points: Vec<Point> = headers
        .iter()
        .map(|p| Point {
            number: p.point,
            cut_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(p.cut_at_unix_ns),
            in_use: in_use.contains(&Some(p.point)),
        })
        .collect();
    let verdicts = verdicts(&standby.opening(), &points);
    let judged = headers.into_iter().zip(verdicts).map(|(header, verdict)| {
        let name = kept.get(&header.point).cloned();
        let (keep, reason) = match (&name, newest == Some(header.point)) {
            (Some(name), _) => (true, format!("kept as \"{name}\" until it is released")),
            (None, true) => (true, "the newest".to_owned()),
            (None, false) => match fates.get(&(standby.guest, header.point)) {
                _ if verdict.reason == Reason::InUse => (true, verdict.reason.to_string()),
                Some(true) => (true, "its group's point is kept".to_owned()),
                Some(false) => (
                    false,
                    "its group's point is past its time, or was never whole".to_owned(),
                ),
                None => (verdict.keep, verdict.reason.to_string()),
            },
        };
        Judged {
            header,
            keep,
            reason,
            name,
        }
    });
    judged.collect()
}

/// The points to keep. What a guest that turned round is protected upon is none
/// of those that are judged: it stays until something was built upon it.
fn keep_of(standby: &Standby, judged: &[Judged]) -> BTreeSet<u64> {
    let kept = judged.iter().filter(|point| point.keep);
    let kept = kept.map(|point| point.header.point);
    let needed = standby.base() != 0 && standby.newest() == 0;
    kept.chain(needed.then(|| standby.base())).collect()
}

/// Is what it is protected upon still there, though nothing needs it?
fn base_is_left(standby: &Standby) -> bool {
    let base = standby.base();
    let store = &standby.remote().incoming.store;
    base != 0
        && standby.newest() != 0
        && store.points(standby.guest).iter().any(|p| p.point == base)
}

/// Drops points past their time, and frees what nothing refers to any more.
pub(super) async fn prune(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        let pause = strong.prune_pause();
        drop(strong);
        tokio::time::sleep(pause).await;
        let Some(site) = site.upgrade() else { return };
        let mut by_peer: BTreeMap<SiteKey, Vec<Arc<Standby>>> = BTreeMap::new();
        for standby in site.all_standbys() {
            let peer = standby.remote().record.key;
            by_peer.entry(peer).or_default().push(standby);
        }
        for (peer, standbys) in by_peer {
            if let Some(remote) = site.remote_of_key(&peer)
                && let Err(error) = prune_store(&site, &remote, &standbys).await
            {
                tracing::warn!(peer = %remote.record.site, error, "old points were not pruned");
            }
        }
    }
}

/// Drops the points past their time that a peer sent.
async fn prune_store(
    site: &Site,
    remote: &Remote,
    standbys: &[Arc<Standby>],
) -> Result<(), String> {
    let mut keep = Keep::new();
    let mut past = 0;
    let fates = groups::fates(site, standbys);
    for standby in standbys {
        let judged = judged(standby, &fates);
        past += judged.iter().filter(|point| !point.keep).count();
        // One is enough: it is large.
        if base_is_left(standby) {
            past += WORTH_PRUNING;
        }
        keep.insert(standby.guest, keep_of(standby, &judged));
    }
    if past < WORTH_PRUNING {
        return Ok(());
    }
    let report = perform(remote, keep, standbys).await?;
    if report.points > 0 {
        let what = told(&report);
        site.note(EventKind::Pruned, &remote.record.site, &what);
    }
    Ok(())
}

fn told(report: &PruneReport) -> String {
    let freed = super::view::bytes(report.bytes_freed);
    format!(
        "{} points past their time were dropped, {freed} are free",
        report.points
    )
}

/// Plans, has the source forget what goes, and lets it go.
async fn perform(
    remote: &Remote,
    keep: Keep,
    standbys: &[Arc<Standby>],
) -> Result<PruneReport, String> {
    let store = remote.incoming.store.clone();
    let planned = {
        let store = store.clone();
        crate::work::spawn_blocking(move || store.plan_prune(&keep)).await
    };
    let plan = planned
        .map_err(|e| e.to_string())?
        .map_err(|e| e.to_string())?;
    if plan.is_empty() {
        return Ok(PruneReport::default());
    }
    for seqs in plan.retire.chunks(RETIRE_BATCHES) {
        let retire = Message::Retire {
            seqs: seqs.to_vec(),
        };
        let told = match remote.ask_within(retire, FORGET).await {
            Ok(Message::Done) => Ok(()),
            Ok(_) => Err(AskError::Unfitting(remote.record.site.clone())),
            Err(error) => Err(error),
        };
        if let Err(error) = told {
            store.give_up_prune(&plan);
            return Err(error.to_string());
        }
    }
    // The peer was given minutes to answer: a test may have begun meanwhile.
    let begun = |(guest, point): &(GuestId, u64)| {
        let mut all = standbys.iter();
        all.any(|s| s.guest == *guest && s.tested() == Some(*point))
    };
    if plan.dropped.iter().any(begun) {
        store.give_up_prune(&plan);
        return Ok(PruneReport::default());
    }
    let done = crate::work::spawn_blocking(move || store.perform_prune(&plan)).await;
    let report = done
        .map_err(|e| e.to_string())?
        .map_err(|e| e.to_string())?;
    tracing::info!(
        peer = %remote.record.site,
        points = report.points,
        freed_bytes = report.bytes_freed,
        "old points were pruned"
    );
    Ok(report)
}

/// Drops every point of a guest that is given up, and frees what only they needed. Fails
/// while any is left: who forgot the guest then would leave it to nobody.
pub(super) async fn discard_points(remote: &Remote, guest: GuestId) -> Result<(), String> {
    let until = Instant::now() + LET_GO;
    let left = loop {
        let keep = Keep::from([(guest, BTreeSet::new())]);
        perform(remote, keep, &[]).await?;
        let store = &remote.incoming.store;
        let left = store.points(guest);
        // A name stays.
        if left.is_empty() || !store.kept(guest).is_empty() || Instant::now() >= until {
            break left;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    let Some(first) = left.first() else {
        return Ok(());
    };
    Err(format!(
        "{} of its points stay, the first is {}: they are in use, were given a name, or came meanwhile; end what reads them, release them (farhaven point release), then ask for this again",
        left.len(),
        first.point
    ))
}

impl Site {
    fn all_standbys(&self) -> Vec<Arc<Standby>> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        standbys.values().cloned().collect()
    }

    /// Points that are kept for seconds are looked at every few seconds.
    fn prune_pause(&self) -> Duration {
        let standbys = self.all_standbys();
        let shortest = standbys
            .iter()
            .map(|s| s.opening().retention.all.duration())
            .min();
        let shortest = shortest.unwrap_or(PRUNE_EVERY);
        (shortest / 2).clamp(Duration::from_secs(2), PRUNE_EVERY)
    }

    /// What a prune of a guest of a peer would do now.
    ///
    /// # Errors
    /// When there is no such guest here, or its points cannot be read.
    pub async fn plan_prune(&self, name: &str) -> Result<PruneView, OperateError> {
        let standby = self.standby_here(name)?;
        let judged = judged(&standby, &groups::fates_of(self, &standby));
        let keep = Keep::from([(standby.guest, keep_of(&standby, &judged))]);
        let store = standby.remote().incoming.store.clone();
        let planned = crate::work::spawn_blocking(move || {
            let plan = store.plan_prune(&keep)?;
            store.give_up_prune(&plan);
            Ok::<_, farhaven_storage_sync::prune::PruneError>(plan)
        });
        let plan = planned.await.map_err(failed)?.map_err(failed)?;
        Ok(view(
            &standby,
            &judged,
            plan.dropped.len(),
            plan.bytes_freed(),
            &plan.pinned,
        ))
    }

    /// Drops the points of a guest of a peer that are past their time, now.
    ///
    /// # Errors
    /// When there is no such guest here, its source cannot be told what it has
    /// to forget, or the store refuses.
    pub async fn run_prune(&self, name: &str) -> Result<PruneView, OperateError> {
        let standby = self.standby_here(name)?;
        let judged = judged(&standby, &groups::fates_of(self, &standby));
        let keep = Keep::from([(standby.guest, keep_of(&standby, &judged))]);
        let remote = standby.remote().clone();
        let these = [standby.clone()];
        let report = perform(&remote, keep, &these)
            .await
            .map_err(|why| OperateError::Failed(format!("nothing was pruned: {why}")))?;
        self.note(EventKind::Pruned, name, &told(&report));
        Ok(view(
            &standby,
            &judged,
            report.points,
            report.bytes_freed,
            &[],
        ))
    }
}

fn view(
    standby: &Standby,
    judged: &[Judged],
    dropped: usize,
    bytes_freed: u64,
    pinned: &[(GuestId, u64)],
) -> PruneView {
    let opening = standby.opening();
    let fates = judged.iter().map(|judged| {
        let point = judged.header.point;
        let open = pinned.contains(&(standby.guest, point));
        PointFate {
            point,
            age_ms: age(judged.header.cut_at_unix_ns).as_millis() as u64,
            keep: judged.keep || open,
            reason: match open {
                true => "in use".to_owned(),
                false => judged.reason.clone(),
            },
            name: judged.name.clone(),
        }
    });
    PruneView {
        from: standby.from(),
        retention: retention(&opening),
        points: fates.collect(),
        guest: opening.name,
        dropped,
        bytes_freed,
    }
}
