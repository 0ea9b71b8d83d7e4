//! A group goes back as a whole: to the site that it came from, or here, to a
//! whole point of before.
//!
//! To its source: what could refuse is looked for first; then all guests are
//! stopped here, those that started last first, and only when all of them are
//! is the source told to let its copies go on, in the order in which they
//! start. If one cannot be stopped, those that were are let go on here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

use super::all::{GroupDone, MemberDone};
use super::waves::{Start, Waves};
use super::{GroupPointView, GroupRecord, NamedMember};
use crate::activate::fence::Term;
use crate::activate::place::Ready;
use crate::site::Site;
use crate::site::operate::{OperateError, failed};
use crate::site::promote::ActivateError;
use crate::site::records::Activation;
use crate::site::standby::{Standby, State, step};
use crate::site::turn::view::RollbackReport;
use crate::site::turn::{committed, not_here};

/// Where to roll a group back to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupRollBack {
    /// Here, from the whole point of this cut; to the source when absent.
    pub cut: Option<u64>,
    /// What was written since is lost, and so may be what the source's copies lack.
    pub accept_loss: bool,
    /// Here: guests are started without waiting for those before to be healthy.
    pub no_checks: bool,
}

type Row = MemberDone<RollbackReport>;

/// A guest that is to go back. While it waits for its turn, nobody else hands it back.
struct Going {
    standby: Arc<Standby>,
    state: OwnedMutexGuard<State>,
    active: Activation,
    ready: Arc<Ready>,
    begun: Instant,
}

impl Site {
    /// Rolls all guests of a group back that were moved or taken over: see
    /// [`GroupRollBack`]. Done again, it goes on with those that remain.
    ///
    /// # Errors
    /// When there is no such group or point, none of its guests runs here, or one
    /// of them cannot go back: all run on as they did.
    pub async fn rollback_group(
        self: &Arc<Self>,
        name: &str,
        to: GroupRollBack,
    ) -> Result<GroupDone<RollbackReport>, OperateError> {
        let group = self.group(name)?;
        match to.cut {
            Some(cut) => self.group_back_to(&group, cut, to.no_checks).await,
            None => self.group_back(&group, to.accept_loss).await,
        }
    }

    async fn group_back(
        self: &Arc<Self>,
        group: &GroupRecord,
        accept_loss: bool,
    ) -> Result<GroupDone<RollbackReport>, OperateError> {
        let mut rows: BTreeMap<GuestId, Row> = BTreeMap::new();
        let mut here = Vec::new();
        let mut first_error = None;
        let members = self.members_here(group);
        for member in &members {
            match self.standby_named(&member.name) {
                Some(standby) if standby.active().is_some() => here.push((member, standby)),
                // By an earlier try, perhaps.
                Some(standby) => match self.rolled_back_before(&standby).await {
                    Ok(report) => {
                        let back = Ok::<_, OperateError>(report);
                        rows.insert(member.guest, MemberDone::of(member, back));
                    }
                    Err(error) => {
                        rows.insert(member.guest, MemberDone::of(member, Err(&error)));
                        first_error.get_or_insert(error);
                    }
                },
                None => {
                    self.taken_over_named(&member.name)?;
                }
            }
        }
        if here.is_empty()
            && let Some(error) = first_error
        {
            return Err(error);
        }
        let mut going = self.may_all_go_back(&here, accept_loss).await?;
        self.stop_all(group, &mut going).await?;
        let mut waiting: Vec<_> = here.iter().map(|(member, _)| *member).zip(going).collect();
        while let Some(wave) = waiting.iter().map(|(member, _)| member.wave).min() {
            let of_wave = waiting.extract_if(.., |(member, _)| member.wave == wave);
            let works = of_wave.map(|(member, mut one)| {
                let site = self.clone();
                let work = async move {
                    site.hand_back(&one.standby, &mut one.state, one.begun)
                        .await
                };
                (member, tokio::spawn(work))
            });
            for (member, work) in works.collect::<Vec<_>>() {
                let ended = work.await.map_err(failed).and_then(|ended| ended);
                rows.insert(member.guest, MemberDone::of(member, ended));
            }
        }
        let rows = members.iter().filter_map(|m| rows.remove(&m.guest));
        let again = format!("Go on: farhaven rollback {}", group.name);
        Ok(GroupDone::of(&group.name, rows.collect(), &again))
    }

    /// Nothing stands against any of them; nothing is done.
    async fn may_all_go_back(
        self: &Arc<Self>,
        here: &[(&NamedMember, Arc<Standby>)],
        accept_loss: bool,
    ) -> Result<Vec<Going>, OperateError> {
        // In one order, whoever takes several of them: nobody waits for each other.
        let mut by_guest: Vec<_> = here.iter().enumerate().collect();
        by_guest.sort_by_key(|(_, (member, _))| member.guest);
        let (mut going, mut running) = (Vec::new(), Vec::new());
        for (place, (_, standby)) in by_guest {
            // Those before run here, and are held by their locks.
            let lock = standby.state.clone().lock_owned();
            let mut state = self.unless_overruled(&running, lock).await?;
            let Some((mut active, ready)) = state.active.clone() else {
                return Err(not_here(standby));
            };
            // Its source gave it back after an earlier try: it is here, as any other.
            if active.returning.is_some() && self.fence.may_run(standby.guest, self.key()).is_ok() {
                self.goes_on_here(standby, &mut state, &ready).await?;
                active.returning = None;
            }
            if active.returning.is_none() {
                running.push(standby.guest);
                let may = self.may_go_back(standby, &active, accept_loss);
                self.unless_overruled(&running, may).await??;
            }
            let one = Going {
                standby: standby.clone(),
                state,
                active,
                ready,
                begun: Instant::now(),
            };
            going.push((place, one));
        }
        going.sort_by_key(|(place, _)| *place);
        Ok(going.into_iter().map(|(_, one)| one).collect())
    }

    /// Stops all of them here, those that started last first, and writes the terms of
    /// their sources down, of all at once; or none.
    async fn stop_all(
        self: &Arc<Self>,
        group: &GroupRecord,
        going: &mut [Going],
    ) -> Result<(), OperateError> {
        let (mut stopped, mut terms) = (Vec::new(), Vec::new());
        let mut refused = None;
        for (place, one) in going.iter_mut().enumerate().rev() {
            one.begun = Instant::now();
            // By an earlier try: it is stopped, and its term is its source's.
            if one.active.returning.is_some() {
                continue;
            }
            let stopping =
                self.stop_to_go_back(&one.standby, &mut one.state, &one.active, &one.ready);
            match stopping.await {
                Ok(term) => {
                    terms.push(term);
                    stopped.push(place);
                }
                Err(error) => {
                    refused = Some(error.to_string());
                    break;
                }
            }
        }
        if refused.is_none() {
            refused = self.give_terms(terms).await.err();
        }
        let Some(mut why) = refused else {
            return Ok(());
        };
        for place in stopped.into_iter().rev() {
            let one = &mut going[place];
            let (standby, state) = (&one.standby, &mut one.state);
            let went_on = self.let_go_on(standby, state, &one.active, &one.ready);
            if let Err(stands) = went_on.await {
                why = format!("{why}; '{}': {stands}", standby.name());
            }
        }
        let mut stand = Vec::new();
        for one in going {
            let ready = one.ready.clone();
            let runs = step(move || ready.runs()).await.and_then(|runs| runs);
            if !matches!(runs, Ok(true)) {
                stand.push(one.standby.name());
            }
        }
        Err(OperateError::Failed(match stand.as_slice() {
            [] => format!(
                "group '{}' was not rolled back, and its guests run on here: {why}",
                group.name
            ),
            stand => format!(
                "group '{}' was not rolled back: {why}. These of its guests do not run here: {}; see farhaven status",
                group.name,
                stand.join(", ")
            ),
        }))
    }

    /// Here, from a whole point.
    async fn group_back_to(
        self: &Arc<Self>,
        group: &GroupRecord,
        cut: u64,
        no_checks: bool,
    ) -> Result<GroupDone<RollbackReport>, OperateError> {
        let name = &group.name;
        let points = self.group_points(name).await?;
        let Some(point) = points.into_iter().find(|point| point.cut == cut) else {
            return Err(OperateError::Unknown(format!(
                "there is no whole point {cut} of group '{name}' here; see farhaven points {name}"
            )));
        };
        let members = self.members_here(group);
        let mut rows: BTreeMap<GuestId, Row> = BTreeMap::new();
        let chosen = self.choose_back(&members, &point, &mut rows)?;
        let again = format!("Go on: farhaven rollback {name} --point {cut}");
        // What can fail is done while they run; and no prune takes what they are to run from.
        let mut stay = Vec::with_capacity(chosen.len());
        for (_, standby, number) in &chosen {
            stay.push(standby.open(*number).map_err(failed)?);
            standby.refuse_missing_networks().await.map_err(failed)?;
        }
        if !chosen.is_empty() {
            let terms = self.terms_of_all(&chosen).await?;
            let lost = end_all(self, &chosen).await?;
            let began = Instant::now();
            let starting = chosen.iter().filter_map(|(member, standby, number)| {
                let term = *terms.get(&member.guest)?;
                let lost_ms = lost.get(&member.guest).copied().unwrap_or(0);
                Some((
                    member.clone(),
                    run_again(self, standby, *number, term, lost_ms, began),
                ))
            });
            let waves = Waves {
                group,
                mode: "rollback",
                isolated: false,
                unchecked: no_checks,
                go_on: format!(
                    "When it is, or without waiting (--no-checks): farhaven rollback {name} --point {cut}"
                ),
            };
            for started in waves.start(self, starting.collect()).await {
                let mut row = MemberDone::of(&started.member, started.ran);
                if let Some(fault) = crate::site::health::fault(&started.checks) {
                    row.note = format!("it runs, and is not healthy: {fault}");
                }
                rows.insert(started.member.guest, row);
            }
        }
        drop(stay);
        let rows = members.iter().filter_map(|m| rows.remove(&m.guest));
        Ok(GroupDone::of(name, rows.collect(), &again))
    }

    /// Those that are to run from that point, each with its own number; of the
    /// others there is a row already.
    #[allow(
        clippy::type_complexity,
        reason = "a list of three things that belong together"
    )]
    fn choose_back(
        self: &Arc<Self>,
        members: &[NamedMember],
        point: &GroupPointView,
        rows: &mut BTreeMap<GuestId, Row>,
    ) -> Result<Vec<(NamedMember, Arc<Standby>, u64)>, OperateError> {
        let mut chosen = Vec::new();
        for member in members {
            let Some(standby) = self.standby_named(&member.name) else {
                // A guest of this site, and no more a taken-over one.
                self.taken_over_named(&member.name)?;
                continue;
            };
            let Some(number) = point.points.get(&member.name).copied() else {
                let note = "it joined the group after that cut, and runs on as it is";
                rows.insert(member.guest, MemberDone::left(member, note));
                continue;
            };
            match standby.active() {
                Some(active) if active.committed_at.is_some() => return Err(committed(&standby)),
                Some(active) if active.returning.is_some() => {
                    return Err(OperateError::Conflict(format!(
                        "'{}' is being rolled back to '{}'; see farhaven status",
                        member.name,
                        standby.from()
                    )));
                }
                Some(active) if active.point == number => {
                    let note = format!("it runs from that point (its own {number}) already");
                    rows.insert(member.guest, MemberDone::left(member, note));
                    continue;
                }
                Some(_) => {}
                // Ended by an earlier try, and not started again.
                None if self.is_ours(member.guest) => {}
                None => return Err(not_here(&standby)),
            }
            chosen.push((member.clone(), standby, number));
        }
        Ok(chosen)
    }

    /// The next terms of all of them, durably, or of none; a living source has
    /// confirmed them.
    pub(super) async fn terms_of_all(
        self: &Arc<Self>,
        chosen: &[(NamedMember, Arc<Standby>, u64)],
    ) -> Result<BTreeMap<GuestId, Term>, OperateError> {
        if chosen.is_empty() {
            return Ok(BTreeMap::new());
        }
        let guests: Vec<GuestId> = chosen.iter().map(|(m, _, _)| m.guest).collect();
        let site = self.clone();
        let terms = step(move || site.fence.overrule_all(&guests, site.key()));
        let terms = terms.await.map_err(failed)?.map_err(failed)?;
        if let Some((_, standby, _)) = chosen.first() {
            let told = self.announce_terms(standby.remote(), terms.clone()).await;
            let name = standby.name();
            told.map_err(|why| failed(ActivateError::SourceRuns(name, why)))?;
        }
        Ok(terms.into_iter().map(|term| (term.group, term)).collect())
    }
}

/// Ends what runs of them, those that started last first; since when each ran,
/// in milliseconds.
async fn end_all(
    site: &Arc<Site>,
    chosen: &[(NamedMember, Arc<Standby>, u64)],
) -> Result<BTreeMap<GuestId, u64>, OperateError> {
    let mut lost = BTreeMap::new();
    for (member, standby, _) in chosen.iter().rev() {
        let mut state = standby.state.lock().await;
        let Some((active, ready)) = state.active.take() else {
            continue;
        };
        let ran = crate::site::age(active.at).as_millis() as u64;
        lost.insert(member.guest, ran);
        standby.see(|s| {
            s.active = None;
            s.hydration = None;
        });
        // Its disks stay, as evidence, until somebody discards them.
        step(move || ready.end()).await.map_err(failed)?;
        standby.leave_evidence(&mut state, site);
    }
    Ok(lost)
}

fn run_again(
    site: &Arc<Site>,
    standby: &Arc<Standby>,
    point: u64,
    term: Term,
    lost_ms: u64,
    began: Instant,
) -> Start<RollbackReport> {
    let (standby, at) = (standby.clone(), site.config.site.name.clone());
    Box::pin(async move {
        let guest = standby.name();
        let took = std::time::Duration::ZERO;
        let ran = standby.run_under(point, term, began, took).await;
        let active = ran.map_err(|error| {
            format!("'{guest}' runs nowhere now: point {point} could not be run ({error})")
        })?;
        Ok(RollbackReport {
            guest,
            at,
            point: Some(point),
            term: term.number,
            lost_ms,
            blackout_ms: active.times.total.as_secs_f64() * 1e3,
            note: String::new(),
        })
    })
}
