//! Points of whole groups. They are derived: a group point is there exactly
//! where the points of all its guests with one cut number are, each of which
//! tells whose they are. So there is no half one after any crash, and nothing
//! to rebuild.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use farhaven_policies::retain::{self, Point};
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::{GroupRecord, PointGroup};
use crate::site::Site;
use crate::site::operate::OperateError;
use crate::site::standby::Standby;
use crate::site::view::PointView;

/// Of so many newest points of each guest the newest whole one is looked for.
const NEWEST: usize = 32;

/// A recovery point of a whole group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupPointView {
    /// The number of the cut.
    pub cut: u64,
    /// When the guests were stopped.
    pub cut_at: String,
    /// How long ago that was.
    pub age_ms: u64,
    /// From the first guest's stop to the last one's.
    pub skew_ms: f64,
    /// The longest that one of them was stopped.
    pub pause_ms: f64,
    /// Whether the agents of all guests had frozen filesystems, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
    /// Each guest's own point, by its name.
    pub points: BTreeMap<String, u64>,
    /// The name that it was given, if all of those have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Points with one cut number.
struct Together<T> {
    mark: PointGroup,
    of: BTreeMap<GuestId, T>,
}

/// What belongs together, by group and cut, of points that tell of their group.
fn together<T>(
    points: impl IntoIterator<Item = (GuestId, PointGroup, T)>,
) -> BTreeMap<GuestId, BTreeMap<u64, Together<T>>> {
    let mut groups: BTreeMap<GuestId, BTreeMap<u64, Together<T>>> = BTreeMap::new();
    for (guest, mark, point) in points {
        let cuts = groups.entry(mark.id).or_default();
        let cut = cuts.entry(mark.cut).or_insert_with(|| Together {
            mark,
            of: BTreeMap::new(),
        });
        cut.of.insert(guest, point);
    }
    groups
}

impl<T> Together<T> {
    fn is_whole(&self) -> bool {
        self.mark.members.iter().all(|m| self.of.contains_key(m))
    }
}

impl Site {
    /// The whole points of a group, oldest first; of a group whose guests run
    /// here, as their peer tells.
    ///
    /// # Errors
    /// When there is no such group, or the peer cannot be asked.
    pub async fn group_points(&self, name: &str) -> Result<Vec<GroupPointView>, OperateError> {
        let group = self.group(name)?;
        let mut points = Vec::new();
        let mut names = BTreeMap::new();
        for member in self.members_here(&group) {
            for mut point in self.points(&member.name).await? {
                if let Some(mark) = point.group.take() {
                    points.push((member.guest, mark, point));
                }
            }
            names.insert(member.guest, member.name);
        }
        let cuts = together(points).remove(&group.id).unwrap_or_default();
        let whole = cuts.into_iter().filter(|(_, cut)| cut.is_whole());
        Ok(whole.map(|(_, cut)| view(&cut, &names)).collect())
    }

    /// How old the newest whole point of a group is, as far as that is known here.
    pub(super) fn group_age(&self, group: &GroupRecord) -> Option<Duration> {
        let cut = match group.from {
            None => self.policies.cuts.newest_whole(group.id)?,
            Some(_) => self.newest_whole_here(group)?,
        };
        Some(super::super::age(cut.saturating_mul(1_000_000)))
    }

    fn newest_whole_here(&self, group: &GroupRecord) -> Option<u64> {
        let mut points = Vec::new();
        for member in self.members_here(group) {
            let standby = self.standby_named(&member.name)?;
            for (_, mark) in self.newest_marks(&standby, NEWEST) {
                points.push((member.guest, mark, ()));
            }
        }
        let cuts = together(points).remove(&group.id)?;
        let mut whole = cuts.into_iter().filter(|(_, cut)| cut.is_whole());
        whole.next_back().map(|(cut, _)| cut)
    }
}

fn view(cut: &Together<PointView>, names: &BTreeMap<GuestId, String>) -> GroupPointView {
    let points = cut.of.iter().map(|(guest, point)| {
        let name = names.get(guest).cloned();
        (name.unwrap_or_else(|| guest.to_string()), point.point)
    });
    let oldest = cut.of.values().max_by_key(|point| point.age_ms);
    let mut called = cut.of.values().map(|point| point.name.as_ref());
    let first = called.next().flatten();
    let name = first.filter(|_| called.all(|name| name == first));
    GroupPointView {
        cut: cut.mark.cut,
        cut_at: oldest.map(|p| p.cut_at.clone()).unwrap_or_default(),
        age_ms: oldest.map_or(0, |p| p.age_ms),
        skew_ms: cut.mark.skew_ns as f64 / 1e6,
        pause_ms: cut.of.values().map(|p| p.pause_ms).fold(0.0, f64::max),
        quiesced: quiesced(cut.of.values().map(|point| point.quiesced)),
        points: points.collect(),
        name: name.cloned(),
    }
}

/// Of all: only if each is; `None` where it was asked of none.
fn quiesced(each: impl Iterator<Item = Option<bool>> + Clone) -> Option<bool> {
    let asked = each.clone().any(|one| one.is_some());
    asked.then(|| each.clone().all(|one| one == Some(true)))
}

/// What becomes of points by the cut that they are of: they stay (`true`), or go.
pub(in crate::site) type Fates = BTreeMap<(GuestId, u64), bool>;

/// Retention keeps or drops points of a group as one. What is no part of a
/// whole one goes once a newer whole one is there.
pub(in crate::site) fn fates(site: &Site, standbys: &[Arc<Standby>]) -> Fates {
    let mut points = Vec::new();
    let mut needed = BTreeSet::new();
    let mut owed = BTreeMap::new();
    for standby in standbys {
        let in_use = standby.points_in_use();
        let named = standby.remote().incoming.store.kept(standby.guest);
        let stay = in_use.into_iter().flatten().chain(named.into_keys());
        needed.extend(stay.map(|point| (standby.guest, point)));
        for (header, mark) in site.newest_marks(standby, usize::MAX) {
            points.push((standby.guest, mark, (header.point, header.cut_at_unix_ns)));
        }
        owed.insert(standby.guest, standby.opening());
    }
    let mut fates = Fates::new();
    for cuts in together(points).into_values() {
        let whole: Vec<_> = cuts.values().filter(|cut| cut.is_whole()).collect();
        let judged: Vec<Point> = (0..)
            .zip(&whole)
            .map(|(number, cut)| Point {
                number,
                cut_at: SystemTime::UNIX_EPOCH
                    + Duration::from_nanos(cut.of.values().map(|p| p.1).min().unwrap_or(0)),
                in_use: cut.of.iter().any(|(g, p)| needed.contains(&(*g, p.0))),
            })
            .collect();
        let owner = whole.last().and_then(|cut| cut.of.keys().next());
        let Some(opening) = owner.and_then(|guest| owed.get(guest)) else {
            continue;
        };
        let now = SystemTime::now();
        let verdicts = match &opening.schedule {
            Some(schedule) => schedule.retain(&judged, now),
            None => retain::retain(&opening.retention, &judged, now),
        };
        let mut set = |cut: &Together<(u64, u64)>, stays: bool| {
            let of = cut.of.iter();
            fates.extend(of.map(|(guest, (point, _))| ((*guest, *point), stays)));
        };
        for (cut, verdict) in whole.iter().zip(&verdicts) {
            set(cut, verdict.keep);
        }
        let newest = whole.last().map_or(0, |cut| cut.mark.cut);
        for cut in cuts
            .values()
            .filter(|c| c.mark.cut < newest && !c.is_whole())
        {
            set(cut, false);
        }
    }
    fates
}

/// As [`fates`], of one guest's group.
pub(in crate::site) fn fates_of(site: &Site, standby: &Arc<Standby>) -> Fates {
    let Some(group) = site.group_of(standby.guest) else {
        return Fates::new();
    };
    let standbys = site.standbys.read();
    let standbys = standbys.unwrap_or_else(std::sync::PoisonError::into_inner);
    let members = group.members.values();
    let of_group: Vec<_> = members
        .filter_map(|m| standbys.get(&m.guest).cloned())
        .collect();
    drop(standbys);
    fates(site, &of_group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_point_is_whole_only_with_all_of_its_guests() {
        let ids: Vec<GuestId> = (0..3).map(|_| GuestId::random()).collect();
        let group = GuestId::random();
        let mark = |cut| PointGroup {
            id: group,
            name: "bank".to_owned(),
            cut,
            skew_ns: 1000,
            members: ids.iter().copied().collect(),
        };
        let mut points = Vec::new();
        for (n, guest) in ids.iter().enumerate() {
            points.push((*guest, mark(1), ()));
            if n > 0 {
                points.push((*guest, mark(2), ()));
            }
        }
        let cuts = together(points).remove(&group).unwrap_or_default();
        let whole: Vec<_> = cuts.iter().map(|(cut, of)| (*cut, of.is_whole())).collect();
        assert_eq!(whole, [(1, true), (2, false)]);
    }
}
