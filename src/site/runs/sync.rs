//! The step `final-sync`: guests come to stand still at their source, their last
//! changes are sealed here, and their terms are this site's.
//!
//! The guests of a protection group stop at one instant, or none of them does; so
//! their last points are one point of the group. Others stop one after the other.
//!
//! From before the question until what came of it is written down, a source that
//! asks is told that nothing is decided yet. Whoever is not written down as held
//! then goes on there; where that is some of a group only, the step has all of
//! them go on before it asks anew.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farhaven_storage_sync::unit::GuestId;

use super::facts::{Seen, now_ms};
use super::perform::{AtSite, fault};
use super::planned::{asked, let_these_go_on};
use super::quiesce;
use super::stage::Expecting;
use super::targets::Target;
use crate::activate::fence::Term;
use crate::replicate::message::{HeldGuest, Message, Refusal, RunMessage, ToHold};
use crate::runbook::perform::{Ended, Failure, Scope, Synced};
use crate::site::Site;
use crate::site::remote::AskError;
use crate::site::standby::Standby;

/// Longest that a source is waited for while it converges; the step's own
/// timeout is what counts.
const HOLD: Duration = Duration::from_secs(24 * 3600);

/// How often it is looked whether the source is heard of.
const LOOK: Duration = Duration::from_millis(100);

/// A group of which some were held before, or that its source is about to copy on, is
/// asked for so often.
const TRIES: usize = 8;

/// Guests that were held go on within this time, or are asked for once more.
const GOES_ON: Duration = Duration::from_secs(2);

/// Guests that are held by one question.
struct Batch {
    /// Their group, if they are all of it.
    group: Option<OfGroup>,
    targets: Vec<Target>,
}

#[derive(Clone)]
struct OfGroup {
    id: GuestId,
    name: String,
}

/// What a source told of guests that it holds.
struct Held {
    /// The group whose guests were all stopped at one instant, and from the
    /// first one's stop to the last one's, nanoseconds.
    together: Option<(String, u64)>,
    guests: Vec<(Target, HeldGuest)>,
}

/// Every guest stands still at its source, and its last changes are sealed here.
pub(super) async fn final_sync(run: &AtSite, scope: &Scope) -> Ended<Synced> {
    let site = run.site()?;
    let mut synced = Synced { point: 0, bytes: 0 };
    for batch in batches(&site, run.targets(scope)?) {
        run.goes_on()?;
        if !are_taken(run, &site, &batch.targets).await {
            take(run, &batch).await?;
        }
        for target in &batch.targets {
            let known = run.facts.of(&target.name);
            synced.point = synced.point.max(known.point.unwrap_or(0));
            synced.bytes += known.final_bytes.unwrap_or(0);
        }
    }
    Ok(synced)
}

/// The guests of each group whose guests are all there, and every other by itself.
fn batches(site: &Site, targets: Vec<Target>) -> Vec<Batch> {
    let groups = site.groups();
    let whole = |target: &Target| {
        let (name, from) = (target.of.as_deref()?, &target.standby.remote().record);
        let of_source = groups.iter().filter(|group| group.is_of(from));
        let group = of_source.into_iter().find(|group| group.name == name)?;
        let members: BTreeSet<_> = group.members.values().map(|m| m.guest).collect();
        let there = |guest| targets.iter().any(|t| t.standby.guest == guest);
        let all = members.len() > 1 && members.iter().all(|guest| there(*guest));
        (all && members.contains(&target.standby.guest)).then(|| OfGroup {
            id: group.id,
            name: group.name.clone(),
        })
    };
    let of: Vec<Option<OfGroup>> = targets.iter().map(whole).collect();
    let mut batches: Vec<Batch> = Vec::new();
    for (target, group) in targets.into_iter().zip(of) {
        let id = group.as_ref().map(|group| group.id);
        let same = |batch: &&mut Batch| id.is_some() && batch.group.as_ref().map(|g| g.id) == id;
        match batches.iter_mut().find(same) {
            Some(batch) => batch.targets.push(target),
            None => batches.push(Batch {
                group,
                targets: vec![target],
            }),
        }
    }
    batches
}

/// All of them are held for this run, and may be run here.
async fn are_taken(run: &AtSite, site: &Site, targets: &[Target]) -> bool {
    for target in targets {
        let known = run.facts.of(&target.name);
        let taken = known.held
            && known.point.is_some()
            && known.term == site.fence.current(target.standby.guest)
            && target.standby.is_staged(known.term).await;
        if !taken {
            return false;
        }
    }
    true
}

/// Ends when the source is not heard of any more: a connection that died is
/// closed much later.
async fn falls_silent(standby: &Standby) {
    while standby.remote().alive() {
        tokio::time::sleep(LOOK).await;
    }
}

async fn take(run: &AtSite, batch: &Batch) -> Ended<()> {
    for target in &batch.targets {
        let group = target.group.clone();
        run.note(&target.name, move |guest| guest.group = group)
            .await?;
        if !target.standby.remote().alive() {
            return Err(Failure::source_lost(format!(
                "site '{}' cannot be reached now",
                target.standby.from()
            )));
        }
    }
    if let Some(group) = &batch.group
        && take_together(run, group, &batch.targets).await?
    {
        return Ok(());
    }
    for target in &batch.targets {
        take_one(run, target).await?;
    }
    Ok(())
}

async fn take_one(run: &AtSite, target: &Target) -> Ended<()> {
    let one = std::slice::from_ref(target);
    let mut tries = TRIES;
    loop {
        tries -= 1;
        get_ready(run, one).await?;
        let expecting = expect(one);
        match ask_for_one(run, target).await {
            Ok(held) => return write_down(run, held, expecting).await,
            Err(AskError::Refused {
                code: Refusal::OutOfStep,
                ..
            }) if tries > 0 => {
                drop(expecting);
                tokio::time::sleep(GOES_ON).await;
            }
            Err(error) => return Err(asked(error)),
        }
    }
}

/// All guests of a group. False when its site is of a version that cannot.
async fn take_together(run: &AtSite, group: &OfGroup, targets: &[Target]) -> Ended<bool> {
    let mut tries = TRIES;
    loop {
        tries -= 1;
        // Those of an earlier instant than the others' would be.
        let stale = targets.iter().filter(|t| run.facts.of(&t.name).held);
        let stale: Vec<Target> = stale.cloned().collect();
        let_these_go_on(run, &stale).await?;
        get_ready(run, targets).await?;
        let expecting = expect(targets);
        match ask_for_group(run, group, targets).await {
            Ok(held) => {
                write_down(run, held, expecting).await?;
                return Ok(true);
            }
            Err(AskError::Refused {
                code: Refusal::Unknown,
                ..
            }) => {
                tracing::warn!(
                    group = group.name,
                    "its site runs a version that holds guests one after the other only"
                );
                return Ok(false);
            }
            Err(AskError::Refused {
                code: Refusal::OutOfStep,
                why,
                ..
            }) if tries > 0 => {
                tracing::warn!(group = group.name, why, "its guests are asked for anew");
                drop(expecting);
                for target in targets {
                    let guest = target.standby.guest;
                    let released = Message::Run(RunMessage::Release { guest });
                    let remote = target.standby.remote();
                    remote.ask(released).await.map_err(asked)?;
                }
                tokio::time::sleep(GOES_ON).await;
            }
            Err(error) => return Err(asked(error)),
        }
    }
}

/// What can fail here is done while the guests still run there.
async fn get_ready(run: &AtSite, targets: &[Target]) -> Ended<()> {
    for target in targets.iter().cloned() {
        run.whole(move |run| async move {
            let (standby, known) = (&target.standby, run.facts.of(&target.name));
            let number = standby.next_term(true).map_err(fault)?;
            let newest = target.newest()?;
            let made = standby.make_ready(newest, number, &known.networks, false);
            made.await.map_err(fault)
        })
        .await?;
    }
    Ok(())
}

/// From here on, a source that asks is not told that its guest is given up.
fn expect(targets: &[Target]) -> Vec<Expecting> {
    targets.iter().map(|t| t.standby.expect()).collect()
}

async fn ask_for_one(run: &AtSite, target: &Target) -> Result<Held, AskError> {
    let standby = &target.standby;
    let question = RunMessage::Hold {
        guest: standby.guest,
        quiesce: run.facts.of(&target.name).quiesce,
    };
    match ask(standby, question).await? {
        RunMessage::Held(held) => Ok(Held {
            together: None,
            guests: vec![(target.clone(), held)],
        }),
        _ => Err(AskError::Unfitting(standby.from())),
    }
}

async fn ask_for_group(
    run: &AtSite,
    group: &OfGroup,
    targets: &[Target],
) -> Result<Held, AskError> {
    let [first, ..] = targets else {
        return Err(AskError::Unfitting(String::new()));
    };
    let standby = &first.standby;
    let to_hold = |target: &Target| ToHold {
        guest: target.standby.guest,
        quiesce: run.facts.of(&target.name).quiesce,
    };
    let question = RunMessage::HoldGroup {
        group: group.id,
        guests: targets.iter().map(to_hold).collect(),
    };
    let unfitting = || AskError::Unfitting(standby.from());
    let RunMessage::GroupHeld { skew_ns, guests } = ask(standby, question).await? else {
        return Err(unfitting());
    };
    let told: BTreeMap<_, _> = guests.into_iter().collect();
    let held = targets.iter().map(|target| {
        let held = told.get(&target.standby.guest)?;
        Some((target.clone(), *held))
    });
    Ok(Held {
        together: Some((group.name.clone(), skew_ns)),
        guests: held.collect::<Option<_>>().ok_or_else(unfitting)?,
    })
}

async fn ask(standby: &Standby, question: RunMessage) -> Result<RunMessage, AskError> {
    let question = Message::Run(question);
    let answer = tokio::select! {
        answer = standby.remote().ask_within(question, HOLD) => answer?,
        () = falls_silent(standby) => return Err(AskError::Unreachable(standby.from())),
    };
    match answer {
        Message::Run(told) => Ok(told),
        _ => Err(AskError::Unfitting(standby.from())),
    }
}

/// To its end: what is held is written down, or the source goes on.
async fn write_down(run: &AtSite, held: Held, expecting: Vec<Expecting>) -> Ended<()> {
    run.whole(move |run| async move {
        let _expecting = expecting;
        for (target, told) in &held.guests {
            quiesce::tell(&run, target, told.quiesced).await?;
        }
        handed_over(&run, &held.guests).await?;
        match held.together {
            Some((group, skew_ns)) => tell_instant(&run, group, held.guests.len(), skew_ns).await,
            None => Ok(()),
        }
    })
    .await
}

/// For the report.
async fn tell_instant(run: &AtSite, group: String, guests: usize, skew_ns: u64) -> Ended<()> {
    let skew = skew_ns as f64 / 1e6;
    run.saw(Seen {
        at: now_ms(),
        step: "final-sync".to_owned(),
        guest: group,
        what: "one instant".to_owned(),
        good: true,
        seen: format!("its {guests} guests were stopped within {skew:.1} ms"),
    })
    .await
}

async fn handed_over(run: &AtSite, held: &[(Target, HeldGuest)]) -> Ended<()> {
    let site = run.site()?;
    for (target, HeldGuest { term, .. }) in held {
        let guest = target.standby.guest;
        let known = site.fence.current(guest).map_or(0, |t| t.number);
        let sound = term.group == guest && term.owner == site.key();
        if !sound || term.number > known.saturating_add(1 << 16) {
            return Err(Failure::fault(format!(
                "site '{}' hands '{}' over under a term that is none of this site's; do both run the same version?",
                target.standby.from(),
                target.name
            )));
        }
    }
    // In this order: see `State::staged`.
    for (target, HeldGuest { term, .. }) in held {
        target.standby.stage(Some(*term)).await;
    }
    let told: Vec<(String, HeldGuest)> = held
        .iter()
        .map(|(target, told)| (target.name.clone(), *told))
        .collect();
    let facts = run.facts.clone();
    let noted = crate::work::spawn_blocking(move || {
        facts.change(|facts| {
            for (name, held) in told {
                let guest = facts.guests.entry(name).or_default();
                guest.held = true;
                guest.term = Some(held.term);
                guest.final_bytes = Some(held.bytes);
                guest.stopped_at = Some(held.stopped_at / 1_000_000);
                guest.source_stopped = true;
            }
        })
    });
    let noted = noted.await.map_err(fault).unwrap_or_else(Err);
    if let Err(error) = noted {
        // Else its source would be told for ever that this run decides.
        for (target, _) in held {
            target.standby.stage(None).await;
        }
        return Err(error);
    }
    let targets: Vec<Target> = held.iter().map(|(target, _)| target.clone()).collect();
    let points = held
        .iter()
        .map(|(target, told)| (target.name.clone(), told.point))
        .collect();
    run.keep_points(&targets, &points).await?;
    // Before a daemon that died here they may have been in force.
    let terms = held.iter().map(|(_, told)| told.term);
    let terms: Vec<Term> = terms
        .filter(|term| site.fence.current(term.group) != Some(*term))
        .collect();
    if terms.is_empty() {
        return Ok(());
    }
    let adopted = crate::work::spawn_blocking(move || site.fence.adopt_all(&terms)).await;
    adopted.map_err(fault)?.map_err(fault)
}
