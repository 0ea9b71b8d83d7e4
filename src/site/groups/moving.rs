//! The move of a group, as its source decides it: all drivers are asked for
//! their guest's part, and once the last point of the last guest is sealed the
//! other site is asked to take all of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::party::{Party, Place, Verdict, start_of};
use super::{GroupRecord, NamedMember};
use crate::replicate::message::{GroupMessage, Message, Taken};
use crate::site::Site;
use crate::site::breach::plain;
use crate::site::commands::{Command, Convoy, NotMoved};
use crate::site::events::EventKind;
use crate::site::operate::{OperateError, failed};
use crate::site::remote::{AskError, Remote};
use crate::site::view::{MoveOutlook, MoveReport, Phase};

/// The other site takes the terms, and starts guests, in this time beside the
/// time of their health checks; else it is asked guest by guest.
const TAKE_OVER: Duration = Duration::from_secs(60);

/// What the move of a group did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupMove {
    /// The group.
    pub group: String,
    /// Where it runs now.
    pub to: String,
    /// From the first guest's stop to the last one's.
    pub skew_ms: f64,
    /// The longest that one of them ran nowhere.
    pub blackout_ms: f64,
    /// Each guest, in the order in which they start.
    pub members: Vec<MemberMove>,
    /// What is not well, and what to do; empty when all is.
    pub remains: String,
}

/// What came of one guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberMove {
    /// Its name.
    pub guest: String,
    /// Guests of a wave start together, those of wave 0 first.
    pub wave: usize,
    /// Set when it is the other site's now.
    pub report: Option<MoveReport>,
    /// Why not, and where it is; empty when it is.
    pub error: String,
}

/// What the move of a group would take, by the newest point of each guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupOutlook {
    /// The group.
    pub group: String,
    /// Where it would go.
    pub to: String,
    /// Each guest, in the order in which they start: alone, and with all others,
    /// whose last bytes share the link.
    pub members: Vec<MemberOutlook>,
    /// The longest of them.
    pub expected_blackout_ms: f64,
    /// All of them keep within their policy.
    pub within: bool,
}

/// What it would take for one guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberOutlook {
    /// Its name.
    pub guest: String,
    /// Guests of a wave start together, those of wave 0 first.
    pub wave: usize,
    /// As of the guest alone.
    pub alone: MoveOutlook,
    /// How long it would run nowhere with all others: their last bytes, and the start
    /// of the waves before it. The health checks of those, which are waited for too,
    /// are not in the figure.
    pub expected_blackout_ms: f64,
}

/// Whoever decides; gone without a decision, nobody waits for one.
struct Deciding(Arc<Party>);

impl Drop for Deciding {
    fn drop(&mut self) {
        self.0.end("whoever decided about the move is gone");
    }
}

impl Site {
    /// Moves all guests of a group to their peer as one: cut at one instant, and
    /// handed over together, or none of them.
    ///
    /// # Errors
    /// When one of them is not protected at this moment, would stand longer than
    /// its policy allows and that is not accepted, or its last changes cannot be
    /// sealed: all run on here then.
    pub async fn move_group(
        self: &Arc<Self>,
        name: &str,
        accept_pause: bool,
    ) -> Result<GroupMove, OperateError> {
        self.move_group_among(name, accept_pause, None).await
    }

    /// As [`Site::move_group`], as one of many moves.
    pub(in crate::site) async fn move_group_among(
        self: &Arc<Self>,
        name: &str,
        accept_pause: bool,
        convoy: Option<Convoy>,
    ) -> Result<GroupMove, OperateError> {
        let group = self.group(name)?;
        let members = self.may_move(&group)?;
        let remote = self.remote_meant(group.key, &group.peer);
        let remote = remote.ok_or_else(|| self.no_peer(&group.peer))?;
        // Told within seconds anyway; it must know the order in which they start now.
        let known = GroupMessage::Known(group.told());
        let told = remote.ask(Message::Group(Box::new(known))).await;
        told.map_err(|error| {
            failed(format!(
                "group '{name}' was not moved, all of its guests run on here: {error}"
            ))
        })?;
        let party = Party::new(&group, convoy);
        let deciding = Deciding(party.clone());
        let mut answers = Vec::new();
        for member in &members {
            let (reply, answer) = oneshot::channel();
            let place = Place::of(&party, member.guest);
            let order = Command::Move {
                accept_pause,
                convoy: Some(Convoy::of_group(place)),
                reply,
            };
            if let Err(error) = self.command(&member.name, order).await {
                party.give_up(&error.to_string());
            }
            answers.push(answer);
        }
        if let Ok(handed) = party.all_sealed().await {
            let asked = Instant::now();
            let question = GroupMessage::TakeOver {
                group: group.id,
                members: handed,
            };
            let patience = TAKE_OVER + checks_of(&group);
            let answer = ask(&remote, question, patience).await;
            self.tell_verdicts(&party, asked, answer);
        }
        drop(deciding);
        let mut moved = Vec::new();
        for answer in answers {
            let gone = |_| NotMoved::Failed("the daemon is shutting down".to_owned());
            moved.push(answer.await.map_err(gone).and_then(|moved| moved));
        }
        self.moved(&group, &party, members, moved)
    }

    fn tell_verdicts(&self, party: &Party, asked: Instant, answer: Result<Vec<Taken>, AskError>) {
        match answer {
            Ok(taken) => {
                for taken in taken {
                    let verdict = Verdict::There {
                        runs: taken.runs,
                        times: taken.times,
                        note: plain(&taken.note),
                        asked,
                    };
                    party.tell(taken.guest, verdict);
                }
            }
            Err(error) => party.end(&error.to_string()),
        }
    }

    /// All of them run here, protected to one peer, and are so at this moment.
    fn may_move(&self, group: &GroupRecord) -> Result<Vec<NamedMember>, OperateError> {
        let name = &group.name;
        let conflict = |why: String| Err(OperateError::Conflict(why));
        if let Some(from) = &group.from {
            return conflict(format!(
                "'{name}' is a group of site '{from}': run this there, or take it over: farhaven failover {name}"
            ));
        }
        let members = self.members_here(group);
        if members.len() < group.members.len() {
            return conflict(format!(
                "not all guests of group '{name}' are known here; see farhaven group show {name}"
            ));
        }
        for member in &members {
            let record = self.guest(&member.name)?;
            let view = self.source_view(&record);
            if view.peer.as_ref() != Some(&group.peer) {
                return conflict(format!(
                    "'{}' is not protected to '{}', and a group is moved as a whole; see farhaven group show {name}",
                    member.name, group.peer
                ));
            }
            if !matches!(view.phase, Phase::Protected | Phase::Shipping) || view.newest_point == 0 {
                return conflict(format!(
                    "'{}' is {} at this moment, and a group is moved as a whole: all of its guests run on here. See farhaven status",
                    member.name,
                    view.phase.words()
                ));
            }
        }
        Ok(members)
    }

    /// What came of it, from what the drivers say.
    fn moved(
        &self,
        group: &GroupRecord,
        party: &Party,
        members: Vec<NamedMember>,
        moved: Vec<Result<MoveReport, NotMoved>>,
    ) -> Result<GroupMove, OperateError> {
        let name = &group.name;
        if moved.iter().all(Result::is_err) {
            return Err(nobody(name, moved));
        }
        let mut rows = Vec::new();
        let mut bad = Vec::new();
        for (member, moved) in members.into_iter().zip(moved) {
            let (report, error) = match moved {
                Ok(report) if report.runs => {
                    let what = format!(
                        "'{}' was moved to '{}' with its group, nothing was lost",
                        member.name, report.to
                    );
                    self.note(EventKind::Moved, &member.name, &what);
                    (Some(report), String::new())
                }
                Ok(mut report) => {
                    let why = std::mem::take(&mut report.note);
                    let what = format!(
                        "'{}' was handed over to '{}' with its group, and DOES NOT RUN there: {why}",
                        member.name, report.to
                    );
                    self.note(EventKind::Moved, &member.name, &what);
                    bad.push(member.name.clone());
                    (Some(report), why)
                }
                Err(NotMoved::TooLong(why) | NotMoved::GivenUp(why) | NotMoved::Failed(why)) => {
                    bad.push(member.name.clone());
                    (None, why)
                }
            };
            rows.push(MemberMove {
                guest: member.name,
                wave: member.wave,
                report,
                error,
            });
        }
        let remains = match bad.as_slice() {
            [] => String::new(),
            bad => format!(
                "what became of {} is told of each; see farhaven status at both sites",
                bad.join(", ")
            ),
        };
        let blackouts = rows.iter().filter_map(|m| m.report.as_ref());
        let skew = party.cut.mark().map_or(0, |mark| mark.skew_ns);
        Ok(GroupMove {
            group: name.clone(),
            to: group.peer.clone(),
            skew_ms: skew as f64 / 1e6,
            blackout_ms: blackouts.map(|r| r.blackout_ms).fold(0.0, f64::max),
            members: rows,
            remains,
        })
    }

    /// What the move of a group now would take, by what the newest point of each
    /// guest showed: nothing is done.
    ///
    /// # Errors
    /// When it cannot be moved now, or nothing was measured of a guest yet.
    pub fn group_outlook(&self, name: &str) -> Result<GroupOutlook, OperateError> {
        let group = self.group(name)?;
        let mut outlooks = Vec::new();
        for member in self.may_move(&group)? {
            let outlook = self.move_outlook(&member.name)?;
            outlooks.push((member, outlook));
        }
        let all: u64 = outlooks.iter().map(|(_, o)| o.remaining_bytes).sum();
        let members: Vec<MemberOutlook> = outlooks
            .into_iter()
            .map(|(member, alone)| {
                let others = all.saturating_sub(alone.remaining_bytes) as f64;
                let link = alone.link_bytes_per_s.max(1) as f64;
                let waits = start_of(member.wave).as_secs_f64();
                MemberOutlook {
                    guest: member.name,
                    wave: member.wave,
                    expected_blackout_ms: alone.expected_blackout_ms
                        + (others / link + waits) * 1e3,
                    alone,
                }
            })
            .collect();
        let longest = members.iter().map(|m| m.expected_blackout_ms);
        Ok(GroupOutlook {
            group: name.to_owned(),
            to: group.peer,
            expected_blackout_ms: longest.fold(0.0, f64::max),
            within: members
                .iter()
                .all(|m| m.expected_blackout_ms <= m.alone.max_blackout_ms),
            members,
        })
    }
}

async fn ask(
    remote: &Remote,
    question: GroupMessage,
    patience: Duration,
) -> Result<Vec<Taken>, AskError> {
    let question = Message::Group(Box::new(question));
    let answer = remote.ask_within(question, patience).await?;
    if let Message::Group(told) = answer
        && let GroupMessage::TakenOver { members } = *told
    {
        return Ok(members);
    }
    Err(AskError::Unfitting(remote.record.site.clone()))
}

/// The time that the health checks of a group's guests may take, one wave after
/// the other.
fn checks_of(group: &GroupRecord) -> Duration {
    let mut waves: BTreeMap<usize, Duration> = BTreeMap::new();
    for (wave, members) in group.waves().into_iter().enumerate() {
        for (_, member) in members {
            let checks = member.terms.health.values();
            let longest: Duration = checks.map(|check| check.timeout.duration()).sum();
            let of_wave = waves.entry(wave).or_default();
            *of_wave = longest.max(*of_wave);
        }
    }
    waves.values().sum()
}

/// Nobody was moved: why, by the guest that could not be.
fn nobody(group: &str, moved: Vec<Result<MoveReport, NotMoved>>) -> OperateError {
    let (mut too_long, mut given_up, mut fault) = (None, None, Vec::new());
    for moved in moved {
        match moved {
            Err(NotMoved::TooLong(why)) => {
                // What it says of a move of that guest alone is none of it.
                let why = why.split(". To move it all").next().map(str::to_owned);
                too_long = too_long.or(why);
            }
            Err(NotMoved::GivenUp(why)) => given_up = given_up.or(Some(why)),
            Err(NotMoved::Failed(why)) => fault.push(why),
            Ok(_) => {}
        }
    }
    match (too_long, fault.as_slice(), given_up) {
        (Some(why), ..) => OperateError::TooLong(format!(
            "no guest of group '{group}' was moved. {why}. To move all of them all the same: farhaven move {group} --accept-pause"
        )),
        (None, [], Some(why)) => OperateError::Conflict(why),
        (None, [], None) => failed(format!("group '{group}' was not moved; see the log")),
        (None, fault, _) => failed(format!(
            "group '{group}' was not moved: {}",
            fault.join("; ")
        )),
    }
}
