//! What this site answers to a peer's questions.

use std::sync::Arc;
use std::time::Duration;

use std::collections::BTreeSet;

use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::store::SealError;
use tokio::task::JoinSet;

use super::breach::MOST_TERMS;
use super::fencing::NotObeyed;
use super::remote::Remote;
use super::runs::hold;
use super::runs::stage::HeldAnswer;
use super::seed::announced;
use super::standby::Standby;
use super::{Site, kept, sound, turn};
use crate::activate::fence::{FenceError, Term};
use crate::replicate::message::{
    MOST_POINTS, Message, Opened, Opening, Refusal, RunMessage, SealRequest,
};
use crate::replicate::receive::SealStep;

/// How long the end of shipments under way is waited for; less than the asker waits.
const FORGET: Duration = Duration::from_secs(240);

/// How long an opening waits for earlier data to reach the disk.
const SETTLE: Duration = Duration::from_secs(20);

/// Answers one question of `remote`.
pub(super) async fn answer(site: &Arc<Site>, remote: &Arc<Remote>, question: Message) -> Message {
    match question {
        Message::Terms { terms } => {
            if terms.len() > MOST_TERMS {
                remote.breach("it tells more terms than two sites can share");
                return refused(Refusal::Unable, "too many terms");
            }
            hear_terms(site, remote, terms).await
        }
        Message::Facts { definition } => {
            let facts = site.peer_facts(&definition).await;
            Message::FactsKnown { facts }
        }
        Message::Open(opening) => open(site, remote, *opening).await,
        Message::Digests { from_seq, key } => {
            let incoming = remote.incoming.clone();
            blocking(move || incoming.digests(from_seq, key)).await
        }
        Message::Find { key, prefixes } => {
            let incoming = remote.incoming.clone();
            blocking(move || incoming.find(key, &prefixes)).await
        }
        Message::Baseline {
            guest,
            point,
            volume,
            unit,
            key,
        } => {
            let incoming = remote.incoming.clone();
            blocking(move || incoming.baseline(guest, point, volume, unit, key)).await
        }
        Message::Seal(request) => seal(site, remote, *request).await,
        Message::Prepare { guest } => match site.standby_of(remote, guest) {
            Some(standby) if !site.is_theirs(remote, &standby) => not_theirs(),
            Some(standby) => match standby.prepare().await {
                Ok(()) => Message::Prepared,
                Err(error) => refused(Refusal::Unable, error),
            },
            None => unknown_guest(),
        },
        Message::GiveUp { guest } => match site.standby_of(remote, guest) {
            Some(standby) => match standby.give_up().await {
                HeldAnswer::Running(times, term) => Message::Running { times, term },
                HeldAnswer::Undecided => Message::Run(RunMessage::Undecided),
                HeldAnswer::GivenUp => Message::GivenUp,
            },
            None => Message::GivenUp,
        },
        Message::Lost(lost) => site.lost_at_peer(remote, *lost),
        Message::Group(told) => site.hear_of_groups(remote, *told).await,
        Message::Close { guest, discard } => {
            match site.standby_of(remote, guest) {
                // It came from there once, and is this site's own by now.
                Some(standby) if standby.is_turned() => not_theirs(),
                // It has ended here, and what is left of it is here only.
                Some(_) if discard && site.is_ours(guest) => not_theirs(),
                Some(standby) => match standby.close(discard).await {
                    Ok(()) => Message::Done,
                    Err(error) => refused(Refusal::Unable, error),
                },
                None => Message::Done,
            }
        }
        Message::Points { guest } => match site.standby_of(remote, guest) {
            Some(standby) => {
                let mut points = site.points_of(&standby);
                points.drain(..points.len().saturating_sub(MOST_POINTS));
                Message::PointList { points }
            }
            None => unknown_guest(),
        },
        Message::Run(asked) => hold::answer(site, remote, asked).await,
        Message::Turn(asked) => turn::answer(site, remote, *asked).await,
        Message::SeedAsk { guest } => announced::asked(site, remote, guest).await,
        Message::SeedAnnounce(seed) => announced::announce(site, remote, *seed).await,
        Message::Retire { seqs } => {
            if let Some(outgoing) = remote.begun() {
                let seqs: BTreeSet<u64> = seqs.into_iter().collect();
                let forgotten = tokio::time::timeout(FORGET, outgoing.retire(&seqs)).await;
                if forgotten.is_err() {
                    return refused(Refusal::Unable, "a long copy is under way; ask again later");
                }
            }
            Message::Done
        }
        Message::KeepPoint { guest, point, name } => {
            kept::answer(site, remote, guest, point, Some(name)).await
        }
        Message::ReleasePoint { guest, point } => {
            kept::answer(site, remote, guest, Some(point), None).await
        }
        Message::Clock => Message::ClockTold {
            at: super::unix_ns(std::time::SystemTime::now()),
        },
        other => {
            let kind = std::mem::discriminant(&other);
            remote.complain(&format!("what it asks is no question: {kind:?}"));
            Message::Refused {
                code: Refusal::Unknown,
                why: "this site does not know that question; do both run the same version?"
                    .to_owned(),
            }
        }
    }
}

/// A peer tells terms. One guest that does not stop keeps none of the others running.
async fn hear_terms(site: &Arc<Site>, remote: &Arc<Remote>, terms: Vec<Term>) -> Message {
    let mut heard = JoinSet::new();
    for term in terms {
        // Each may be a look into the catalogue.
        tokio::task::consume_budget().await;
        let (site, remote) = (site.clone(), remote.clone());
        heard.spawn(async move { hear_term(&site, &remote, term).await });
    }
    let mut answer = Message::Done;
    while let Some(one) = heard.join_next().await {
        match one {
            Ok(Ok(())) => {}
            Ok(Err(refusal)) => answer = refusal,
            Err(error) => {
                answer = refused(Refusal::Unable, format!("a step ended early: {error}"));
            }
        }
    }
    answer
}

/// A peer tells a term. It counts only for groups that this site shares with
/// that peer, and only with one of the two as owner.
///
/// # Errors
/// The answer to give, when something of the group runs on here against a newer
/// term, or a newer one than the peer's is in force here.
async fn hear_term(site: &Arc<Site>, remote: &Arc<Remote>, term: Term) -> Result<(), Message> {
    let unable = |why: String| refused(Refusal::Unable, why);
    let own = site.key();
    let concerns = site.shares(remote, term.group) || site.was_shared(term.group);
    if (term.owner != own && term.owner != remote.record.key) || !concerns {
        return Ok(());
    }
    let before = site.fence.current(term.group);
    match site.obey(term).await {
        Ok(()) => {
            if let Some(now) = site.fence.current(term.group).filter(|now| *now != term) {
                // It has not heard of that one, and may run the guest under its own: it is
                // told, though the guest may be protected to it no more.
                remote.tell(Message::Terms { terms: vec![now] }).await;
                return Err(refused(
                    Refusal::Fenced,
                    format!("term {} of this guest is known here", now.number),
                ));
            }
            if term.owner == own && before.is_none_or(|b| b.number < term.number) {
                site.look_again(term.group);
            }
            Ok(())
        }
        Err(NotObeyed::Runs(why)) => Err(unable(why)),
        Err(NotObeyed::Kept(error @ FenceError::Absurd(_))) => {
            remote.breach(&error.to_string());
            Err(unable(error.to_string()))
        }
        Err(NotObeyed::Kept(error)) => {
            // Not durable, but heard: obey it all the same, and for as long as this
            // process knows of it.
            tracing::error!(%error, "a newer term cannot be kept");
            site.obey_unkept(term).await.map_err(unable)
        }
    }
}

async fn open(site: &Arc<Site>, remote: &Arc<Remote>, opening: Opening) -> Message {
    let guest = opening.guest;
    if opening.term.owner != remote.record.key || opening.term.group != guest {
        return refused(Refusal::Fenced, "the term offered is not the source's own");
    }
    // Its word on the term counts only once it may speak of this guest at all.
    if let Some(why) = sound::unsound_opening(&opening) {
        return refused(Refusal::Unable, why);
    }
    if let Some(why) = site.not_theirs(remote, guest) {
        remote.complain(&format!("it opens guest {guest}, and {why}"));
        return refused(Refusal::Unable, why);
    }
    if let Err(answer) = site.obey_offered(remote, opening.term).await {
        return answer;
    }
    let standby = match site.standby(remote, opening) {
        Ok(standby) => standby,
        Err(error) => return refused(Refusal::Unable, error),
    };
    standby.stand_down().await;
    site.clear(super::alerts::Kind::FenceRaised, &standby.name());
    // What an earlier process of the source sent may still wait for the disk:
    // its batch and point numbers must be known before new ones are given out.
    if !remote.incoming.settled(SETTLE).await {
        let trouble = remote.incoming.trouble().borrow().clone();
        return refused(
            Refusal::Unable,
            format!("earlier data still waits for the disk here; {trouble}"),
        );
    }
    let store = remote.incoming.store.clone();
    // What was announced of seeds is used, too.
    let of = &remote.record.key;
    let (used_point, used_seq) = (site.seeds.next_point(of, guest), site.seeds.last_seq(of));
    blocking(move || {
        // What an earlier attempt sent without sealing it is no part of any point.
        store.abandon(guest);
        let newest = store.newest(guest);
        Message::Opened(Opened {
            newest: newest.as_ref().map_or(0, |p| p.point),
            newest_cut_at: newest.as_ref().map_or(0, |p| p.cut_at_unix_ns),
            next_point: store.next_point(guest).max(used_point),
            last_seq: store.last_seq().max(used_seq),
            volumes: newest.map_or_else(Vec::new, |p| p.volumes),
        })
    })
    .await
}

async fn seal(site: &Arc<Site>, remote: &Arc<Remote>, request: SealRequest) -> Message {
    let Some(standby) = site.standby_of(remote, request.guest) else {
        return unknown_guest();
    };
    match site.fence.current(request.guest) {
        Some(term) if term.owner == remote.record.key && term.number == request.context.term => {}
        // The answer to an earlier attempt at the same hand-over was lost: nothing is begun.
        Some(term) if Some(term) == request.activate => {
            return match standby.active() {
                Some(active) if active.term == term && active.point == request.point => {
                    let times = active.times;
                    Message::Running { times, term }
                }
                _ => not_theirs(),
            };
        }
        _ => return refused(Refusal::Fenced, "a newer term of this guest is known here"),
    }
    // A hand-over is of this guest, to this site: no other term is its to give.
    let given = |term: Term| term.group == request.guest && term.owner == site.key();
    if request.activate.is_some_and(|term| !given(term)) {
        remote.breach("it hands over what is not its own");
        return refused(
            Refusal::Fenced,
            "that is no term of a hand-over to this site",
        );
    }
    if let Some(why) = sound::unsound_seal(&request) {
        return refused(Refusal::Unable, why);
    }
    let mut attempt = standby.attempt();
    let sealed = tokio::select! {
        sealed = async {
            let _one = standby.sealing.lock().await;
            remote.incoming.seal(&request).await
        } => sealed,
        _ = attempt.changed() => {
            return refused(Refusal::OutOfStep, "the source began anew before this point was whole");
        }
    };
    let header = match sealed {
        Ok(header) => header,
        Err(
            error @ SealStep::Seal(
                SealError::ChainMismatch { .. }
                | SealError::ParentMismatch { .. }
                | SealError::MissingBatches { .. },
            ),
        ) => return refused(Refusal::OutOfStep, error),
        Err(SealStep::Seal(SealError::Dangling { missing, .. })) => {
            return Message::Dangling { missing };
        }
        Err(error) => return refused(Refusal::Unable, error),
    };
    if let Err(error) = site.record_point(&header, &request.context).await {
        return refused(Refusal::Unable, error);
    }
    let Some(term) = request.activate else {
        standby.sealed(&header);
        return Message::Sealed {
            point: header.point,
        };
    };
    match standby.take_over(&header, term).await {
        Ok(times) => Message::Running { times, term },
        Err(error) => refused(Refusal::Unable, error),
    }
}

pub(super) fn refused(code: Refusal, why: impl ToString) -> Message {
    Message::Refused {
        code,
        why: why.to_string(),
    }
}

/// For a guest whose term is not the peer's.
pub(super) fn not_theirs() -> Message {
    refused(
        Refusal::Fenced,
        "this guest's term is not that site's: nothing of it is prepared, run or ended here by its word",
    )
}

pub(super) fn unknown_guest() -> Message {
    refused(Refusal::OutOfStep, "this guest has not been opened here")
}

async fn blocking(work: impl FnOnce() -> Message + Send + 'static) -> Message {
    crate::work::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| refused(Refusal::Unable, format!("the work ended early: {e}")))
}

impl Standby {
    /// For [`answer`]: begins to keep the RAM of a newly sealed point warm.
    fn sealed(self: &Arc<Self>, header: &PointHeader) {
        if header.parent == self.base() && header.parent != 0 {
            self.base_was_built_upon();
        }
        self.warm_up(header.point);
    }
}
