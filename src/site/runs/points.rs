//! Which point each guest of a run goes on from. A guest by itself has points of
//! its own; of a group, all go on from one cut of the whole group, or none does.

use std::collections::BTreeMap;
use std::sync::Arc;

use farhaven_policies::runbook::PointChoice;

use super::perform::AtSite;
use super::targets::Target;
use crate::runbook::perform::{Ended, Failure, Promoted};
use crate::site::Site;
use crate::site::groups::GroupPointView;

/// The targets of each group of the runbook.
pub(super) fn by_group(targets: &[Target]) -> BTreeMap<&str, Vec<&Target>> {
    let mut groups: BTreeMap<&str, Vec<&Target>> = BTreeMap::new();
    for target in targets {
        groups.entry(&target.group).or_default().push(target);
    }
    groups
}

/// The newest whole point of several guests' group, or that of a cut's number.
///
/// # Errors
/// When they are of no group, or there is no such point; the words say what to do.
pub(super) async fn whole_point(
    site: &Arc<Site>,
    group: &str,
    guests: &[&Target],
    cut: Option<u64>,
) -> Result<GroupPointView, String> {
    let names: Vec<&str> = guests.iter().map(|target| target.name.as_str()).collect();
    let names = names.join(", ");
    let mut of = guests.iter().map(|target| target.of.as_deref());
    let first = of.next().flatten();
    let Some(known) = first.filter(|_| of.all(|name| name == first)) else {
        return Err(format!(
            "the guests of '{group}' ({names}) are in no protection group together, so no point holds all of them at one instant; put them into a group of the policy files at their source, or give each a group of its own in the runbook"
        ));
    };
    let points = site.group_points(known).await.map_err(|e| e.to_string())?;
    let has_all = |point: &GroupPointView| {
        let mut all = guests.iter();
        all.all(|target| point.points.contains_key(&target.name))
    };
    let mut whole = points.into_iter().filter(has_all);
    let found = match cut {
        Some(cut) => whole.find(|point| point.cut == cut),
        None => whole.next_back(),
    };
    found.ok_or_else(|| {
        let which = cut.map_or("whole point".to_owned(), |cut| format!("whole point {cut}"));
        format!(
            "there is no {which} of group '{known}' here that has all of {names}; see farhaven points {known}. Its guests can be run one by one, each from its own newest point: farhaven failover GUEST"
        )
    })
}

impl AtSite {
    /// Chooses the point of every guest, once: what was chosen stays when this
    /// is asked again. Written down, all of them at once.
    pub(super) async fn choose(
        &self,
        targets: &[Target],
        choice: PointChoice,
    ) -> Ended<BTreeMap<String, u64>> {
        let mut chosen = BTreeMap::new();
        for (group, guests) in by_group(targets) {
            let known: Vec<_> = guests
                .iter()
                .map(|t| (t.name.clone(), self.facts.of(&t.name)))
                .collect();
            let before = known.iter().map(|(name, known)| {
                let fixed = known.held || choice == PointChoice::Newest;
                known.point.filter(|_| fixed).map(|at| (name.clone(), at))
            });
            if let Some(before) = before.collect::<Option<Vec<_>>>() {
                chosen.extend(before);
                continue;
            }
            match (guests.as_slice(), choice) {
                ([target], PointChoice::Number(number)) => {
                    chosen.insert(target.name.clone(), number);
                }
                ([target], PointChoice::Newest) => {
                    chosen.insert(target.name.clone(), target.newest()?);
                }
                (guests, choice) => {
                    let cut = match choice {
                        PointChoice::Number(cut) => Some(cut),
                        PointChoice::Newest => None,
                    };
                    let point = whole_point(&self.site()?, group, guests, cut).await;
                    let point = point.map_err(Failure::clean)?;
                    let of = guests
                        .iter()
                        .filter_map(|t| Some((t.name.clone(), *point.points.get(&t.name)?)));
                    chosen.extend(of);
                }
            }
        }
        Ok(chosen)
    }

    /// Writes down from which point each guest goes on; what is lost by it at most.
    pub(super) async fn keep_points(
        &self,
        targets: &[Target],
        points: &BTreeMap<String, u64>,
    ) -> Ended<Promoted> {
        let mut kept = Vec::new();
        for target in targets {
            let Some(number) = points.get(&target.name).copied() else {
                continue;
            };
            let all = target.standby.points();
            let Some(header) = all.into_iter().find(|point| point.point == number) else {
                return Err(Failure::clean(format!(
                    "there is no point {number} of '{}' here; see farhaven points {0}",
                    target.name
                )));
            };
            let cut_at = header.cut_at_unix_ns / 1_000_000;
            kept.push((target.name.clone(), target.group.clone(), number, cut_at));
        }
        let (facts, declared) = (self.facts.clone(), self.declared);
        let noted = crate::work::spawn_blocking(move || {
            let mut promoted = Promoted {
                point: 0,
                rpo_ms: 0,
            };
            facts.change(|facts| {
                for (name, group, number, cut_at) in kept {
                    let guest = facts.guests.entry(name).or_default();
                    // Of a guest that was held, nothing is lost.
                    let rpo = match guest.held {
                        true => 0,
                        false => declared.saturating_sub(cut_at),
                    };
                    guest.point = Some(number);
                    guest.cut_at = Some(cut_at);
                    guest.rpo_ms = Some(rpo);
                    guest.group = group;
                    promoted.point = promoted.point.max(number);
                    promoted.rpo_ms = promoted.rpo_ms.max(rpo);
                }
            })?;
            Ok(promoted)
        });
        noted.await.map_err(|e| Failure::fault(e.to_string()))?
    }
}
