//! Who is to go: of what was asked for, what can be moved, what cannot, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::super::Site;
use super::super::groups::GroupRecord;
use super::super::operate::OperateError;
use super::super::records::GuestRecord;
use super::super::view::{Phase, SourceView};
use super::facts::Candidate;
use super::record::Order;

/// Most guests of one evacuation.
const MOST_GUESTS: usize = 10_000;

/// A guest that stays, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    /// Its name.
    pub guest: String,
    /// Why, and what to do about it.
    pub why: String,
}

/// Who goes, who runs at a peer by now, who cannot go.
#[derive(Debug, Default)]
pub(super) struct Selected {
    pub(super) candidates: Vec<Candidate>,
    pub(super) moved: BTreeSet<String>,
    pub(super) excluded: Vec<Excluded>,
}

/// Looks at every guest of the site, or at those that were named.
///
/// # Errors
/// When a name is not known, or a guest that was named cannot be moved.
pub(super) fn select(site: &Arc<Site>, order: &Order) -> Result<Selected, OperateError> {
    let conflict = |why: String| Err(OperateError::Conflict(why));
    let named = named(site, order)?;
    let records = site.guest_records();
    let own = |group: &GroupRecord| group.from.is_none();
    let groups: Vec<GroupRecord> = site.groups().into_iter().filter(own).collect();
    let mut selected = Selected::default();
    for record in records {
        let view = site.source_view(&record);
        let wanted = named.is_empty() || named.contains(&record.name);
        match unfit(&record, &view, order) {
            _ if view.phase == Phase::Moved => {
                if !named.is_empty() && wanted {
                    return conflict(format!(
                        "'{}' runs at '{}' already; leave it out",
                        record.name,
                        view.peer.as_deref().unwrap_or("its peer")
                    ));
                }
                selected.moved.insert(record.name);
            }
            _ if !wanted => {}
            Some(why) if !named.is_empty() => {
                return conflict(format!("'{}' cannot be moved: {why}", record.name));
            }
            Some(why) => selected.excluded.push(Excluded {
                guest: record.name,
                why,
            }),
            None => {
                let mut members = groups.iter().flat_map(|group| group.members.values());
                let member = members.find(|member| member.guest == record.id);
                selected.candidates.push(Candidate {
                    after: member.map_or(Vec::new(), |member| member.terms.after.clone()),
                    record,
                });
            }
        }
    }
    if named.is_empty() {
        selected.excluded.extend(taken_over(site));
    }
    keep_order(site, &mut selected, !named.is_empty())?;
    if selected.candidates.len() > MOST_GUESTS {
        return conflict(format!(
            "{} guests are more than the {MOST_GUESTS} of one evacuation; name groups with --group",
            selected.candidates.len()
        ));
    }
    if selected.candidates.is_empty() {
        let stay: Vec<_> = selected
            .excluded
            .iter()
            .map(|e| format!("  {}: {}", e.guest, e.why))
            .collect();
        return conflict(match stay.is_empty() {
            true => "no guest runs here that could be moved".to_owned(),
            false => format!("no guest here can be moved:\n{}", stay.join("\n")),
        });
    }
    Ok(selected)
}

/// Names of those that were asked for; empty for all.
fn named(site: &Site, order: &Order) -> Result<BTreeSet<String>, OperateError> {
    let mut named = BTreeSet::new();
    for guest in &order.guests {
        named.insert(site.guest(guest)?.name);
    }
    for group in &order.groups {
        let group = site.group(group)?;
        if let Some(from) = &group.from {
            return Err(OperateError::Conflict(format!(
                "group '{}' is one of site '{from}'; evacuate it there",
                group.name
            )));
        }
        for member in group.members.into_keys() {
            named.insert(site.guest(&member)?.name);
        }
    }
    Ok(named)
}

/// Why a guest cannot be moved to the peer of the order.
fn unfit(record: &GuestRecord, view: &SourceView, order: &Order) -> Option<String> {
    let name = &record.name;
    if let Some(peer) = view.peer.as_ref().filter(|peer| **peer != order.to) {
        return Some(format!(
            "it is protected to '{peer}': evacuate it there (--to {peer} --guest {name}), or end that first: farhaven unprotect {name}"
        ));
    }
    match view.phase {
        Phase::Fenced => Some("another site owns it by now; its copy here is stopped".to_owned()),
        Phase::Lost => Some(format!("it is LOST: {}", view.trouble)),
        Phase::Held => Some(format!(
            "it is HELD for a move whose end is not known: {}",
            view.trouble
        )),
        Phase::Moving => Some("it is being moved already".to_owned()),
        Phase::Exporting => Some("its seed is being written; wait for that, or stop it".to_owned()),
        Phase::AwaitingSeed => Some(format!(
            "its first copy comes by a seed that is not imported there: farhaven seed import; or protect it anew without: farhaven unprotect {name}"
        )),
        _ => None,
    }
}

/// Guests of peers that were taken over and run here: their way back is another one.
fn taken_over(site: &Site) -> Vec<Excluded> {
    let active = site.standby_views().into_iter();
    let active = active.filter(|standby| standby.active.is_some());
    active
        .map(|standby| Excluded {
            why: format!(
                "it was taken over from '{}' and is not protected from here",
                standby.from
            ),
            guest: standby.name,
        })
        .collect()
}

/// What a guest starts after goes with it, is there already, or is unknown to this site.
fn keep_order(site: &Site, selected: &mut Selected, named: bool) -> Result<(), OperateError> {
    let here: BTreeSet<String> = site.guest_records().into_iter().map(|r| r.name).collect();
    loop {
        let going: BTreeSet<String> = selected
            .candidates
            .iter()
            .map(|candidate| candidate.record.name.clone())
            .collect();
        let stays: BTreeMap<String, String> = selected
            .excluded
            .iter()
            .map(|excluded| (excluded.guest.clone(), excluded.why.clone()))
            .collect();
        let mut stuck = None;
        for candidate in &mut selected.candidates {
            let name = &candidate.record.name;
            // Neither here nor going: it runs elsewhere, where nobody waits for it.
            candidate
                .after
                .retain(|after| here.contains(after) && !selected.moved.contains(after));
            if let Some(after) = candidate.after.iter().find(|after| !going.contains(*after)) {
                let why = match stays.get(after) {
                    Some(why) => format!("it starts after '{after}', which cannot be moved: {why}"),
                    None => format!(
                        "it starts after '{after}', which runs here and was not named; add --guest {after}"
                    ),
                };
                if named {
                    return Err(OperateError::Conflict(format!(
                        "'{name}' cannot be moved: {why}"
                    )));
                }
                stuck = Some(Excluded {
                    guest: name.clone(),
                    why,
                });
                break;
            }
        }
        let Some(stuck) = stuck else { return Ok(()) };
        selected
            .candidates
            .retain(|candidate| candidate.record.name != stuck.guest);
        selected.excluded.push(stuck);
    }
}
