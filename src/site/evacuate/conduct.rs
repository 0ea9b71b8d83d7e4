//! Performs an evacuation: one task, which looks at every guest a few times a
//! second, writes down what became of it, and begins what is next.
//!
//! It decides nothing about a single guest: protecting and moving are the
//! drivers', whose word counts also when it comes after a restart. So what is
//! written down may be behind what is, never ahead of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::evacuate::Plan;
use farhaven_storage_sync::unit::GuestId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinSet};

use super::super::Site;
use super::super::commands::Convoy;
use super::super::groups::GroupMove;
use super::super::operate::OperateError;
use super::super::records::GuestRecord;
use super::super::remote::Remote;
use super::super::view::MoveReport;
use super::facts::Basis;
use super::record::{Evacuation, EvacuationState, Evacuee, GuestState, Planned, Records, millis};
use super::select::Selected;
use super::{Handle, Preview};

mod begin;
mod observe;
mod replan;

/// How often guests are looked at.
const TICK: Duration = Duration::from_millis(250);
/// Moves under way at a time: while one guest's last cut has the link, another one
/// comes near to its own.
const MOVES: usize = 2;
/// First copies under way at a time: one reads while the other has the link.
const COPIES: usize = 2;
/// After the first failure the next try waits so long; it doubles each time...
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// ...up to this.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Tries of a guest where no deadline ends them, and of one that would stand too long.
const MOST_TRIES: u32 = 3;
/// A guest that cannot be moved as it is may be mended in this time.
const MENDING: Duration = Duration::from_secs(60);
/// An abort waits so long for moves over a link that is down.
const ABORTING: Duration = Duration::from_secs(60);
/// How often figures are compared with those that the plan was made with.
const LOOK: Duration = Duration::from_secs(5);
/// Words that may wait to be heard.
const WORDS: usize = 16;

/// What people say to an evacuation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Pause,
    Resume,
    Abort,
}

/// What was begun for a guest has ended.
enum Ended {
    Protected(usize, Result<(), OperateError>),
    Moved(usize, Result<Box<MoveReport>, OperateError>),
    /// Guests of a group that were moved as one.
    Together(Vec<usize>, Result<Box<GroupMove>, OperateError>),
}

/// The task.
pub(super) struct Conductor {
    site: Weak<Site>,
    records: Records,
    record: Evacuation,
    words: mpsc::Receiver<(Word, oneshot::Sender<Result<(), String>>)>,
    show: watch::Sender<Evacuation>,
    works: JoinSet<Ended>,
    /// Whose work is whose.
    at_work: BTreeMap<Id, Vec<usize>>,
    convoy: Convoy,
    give_up: watch::Sender<bool>,
    /// What the plan in force was made with; absent after a restart.
    basis: Option<Basis>,
    /// Why it is to be made anew whatever the figures say.
    unplanned: Option<String>,
    /// Guests in the order in which they go.
    order: Vec<usize>,
    /// Guests that a move can be asked of now.
    able: BTreeSet<usize>,
    retry_at: BTreeMap<usize, Instant>,
    /// Tries to protect them.
    copies_tried: BTreeMap<usize, u32>,
    /// Since when they cannot be moved as they are.
    unfit: BTreeMap<usize, Instant>,
    /// Bytes that were counted before, and what the driver's count was then.
    counted: BTreeMap<usize, (u64, u64)>,
    looked: Instant,
    /// The site's guests, read now and then.
    known: BTreeMap<GuestId, GuestRecord>,
    known_at: Option<Instant>,
    aborted: Option<Instant>,
    /// Something is to be written down.
    news: bool,
}

/// A new evacuation, as it is written down first.
pub(super) fn begun(id: u64, preview: &Preview, selected: &Selected) -> Evacuation {
    let mut planned = passages(&preview.plan, &preview.basis);
    let mut guests: Vec<Evacuee> = selected
        .candidates
        .iter()
        .map(|candidate| {
            let name = &candidate.record.name;
            let planned = planned.remove(name);
            Evacuee {
                expected_ms: planned.map(|planned| planned.runs_at_ms),
                planned,
                after: candidate.after.clone(),
                ..evacuee(name, candidate.record.id, GuestState::Waiting)
            }
        })
        .collect();
    let cut_at = |guest: &Evacuee| guest.planned.map_or(u64::MAX, |planned| planned.cut_at_ms);
    guests.sort_by_key(cut_at);
    guests.extend(preview.excluded.iter().map(|excluded| Evacuee {
        why: excluded.why.clone(),
        ..evacuee(&excluded.guest, GuestId([0; 16]), GuestState::Left)
    }));
    Evacuation {
        id,
        order: preview.order.clone(),
        state: EvacuationState::Running,
        begun_at: super::super::unix_ns(SystemTime::now()),
        ended_ms: None,
        promised: preview.plan.verdict,
        promised_finish_ms: millis(preview.plan.finish),
        plan: preview.plan.clone(),
        planned_ms: 0,
        guests,
        changes: Vec::new(),
        trouble: String::new(),
    }
}

fn evacuee(name: &str, id: GuestId, state: GuestState) -> Evacuee {
    Evacuee {
        guest: name.to_owned(),
        id,
        state,
        after: Vec::new(),
        planned: None,
        expected_ms: None,
        tries: 0,
        why: String::new(),
        moved_ms: None,
        bytes: 0,
        report: None,
        phase: None,
        progress: None,
        outlook: None,
    }
}

/// What a plan promises of each guest: of a group's bytes, its part of what is left now.
fn passages(plan: &Plan, basis: &Basis) -> BTreeMap<String, Planned> {
    let left = |guest: &String| {
        let basis = basis.guests.iter().find(|of| of.guest == *guest);
        basis.map_or(0, |of| of.remaining_bytes)
    };
    let waves = plan.waves.iter();
    let passages = waves.flat_map(|wave| wave.groups.iter().map(|passage| (wave.number, passage)));
    passages
        .flat_map(|(wave, passage)| {
            let all: u64 = passage.guests.iter().map(left).sum();
            passage.guests.iter().map(move |guest| {
                let part = match all {
                    0 => 1.0 / passage.guests.len() as f64,
                    all => left(guest) as f64 / all as f64,
                };
                let planned = Planned {
                    wave,
                    cut_at_ms: millis(passage.cut_at),
                    runs_at_ms: millis(passage.healthy_at),
                    bytes: (passage.bytes as f64 * part) as u64,
                    blackout_ms: passage.blackout.as_secs_f64() * 1e3,
                };
                (guest.clone(), planned)
            })
        })
        .collect()
}

impl Conductor {
    /// Starts the task. Without `basis` it goes on with what another process left.
    pub(super) fn start(site: &Arc<Site>, record: Evacuation, basis: Option<Basis>) -> Handle {
        let (say, words) = mpsc::channel(WORDS);
        let (show, seen) = watch::channel(record.clone());
        let (give_up, given_up) = watch::channel(record.state == EvacuationState::Aborting);
        let sent = site.sent_bytes();
        let counted = record.guests.iter().enumerate();
        let counted = counted
            .map(|(index, guest)| {
                (
                    index,
                    (guest.bytes, sent.get(&guest.id).copied().unwrap_or(0)),
                )
            })
            .collect();
        let conductor = Self {
            site: Arc::downgrade(site),
            records: Records::new(&site.config.site.state_dir),
            order: (0..record.guests.len()).collect(),
            aborted: (record.state == EvacuationState::Aborting).then(Instant::now),
            unplanned: match basis {
                Some(_) => None,
                None => Some("the daemon was restarted".to_owned()),
            },
            record,
            words,
            show,
            works: JoinSet::new(),
            at_work: BTreeMap::new(),
            convoy: Convoy::new(given_up),
            give_up,
            basis,
            able: BTreeSet::new(),
            retry_at: BTreeMap::new(),
            copies_tried: BTreeMap::new(),
            unfit: BTreeMap::new(),
            counted,
            looked: Instant::now(),
            known: BTreeMap::new(),
            known_at: None,
            news: false,
        };
        tokio::spawn(conductor.run());
        Handle { words: say, seen }
    }

    async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                word = self.words.recv() => match word {
                    Some((word, reply)) => {
                        let heard = self.hear(word);
                        self.keep().await;
                        // Whoever asked may have gone.
                        let _ = reply.send(heard);
                    }
                    // The daemon stops; the next one goes on.
                    None => return,
                },
                Some(ended) = self.works.join_next_with_id() => self.take_in(ended),
                () = tokio::time::sleep(TICK) => {}
            }
            let Some(site) = self.site.upgrade() else {
                return;
            };
            self.step(&site).await;
            self.keep().await;
            if self.record.state.is_over() {
                tracing::warn!(
                    evacuation = self.record.id,
                    state = self.record.state.words(),
                    moved = self.record.count(GuestState::Moved),
                    guests = self.record.guests.len(),
                    "the evacuation is over"
                );
                return;
            }
        }
    }

    /// Looks, plans, begins what is next, or ends.
    async fn step(&mut self, site: &Arc<Site>) {
        self.observe(site).await;
        let Some(remote) = site.remote(&self.record.order.to) else {
            self.hinder(format!(
                "site '{}' is not paired any more",
                self.record.order.to
            ));
            return;
        };
        self.hinder(hindrance(&remote));
        if self.record.state == EvacuationState::Running {
            self.plan_anew(site, &remote).await;
            self.pass_deadline();
            self.protect_next(site);
            if remote.alive() {
                self.move_next(site);
            }
        }
        self.end(&remote);
    }

    fn hear(&mut self, word: Word) -> Result<(), String> {
        use EvacuationState::{Aborting, Paused, Running};
        let next = match (word, self.record.state) {
            (Word::Pause, Running) => Paused,
            (Word::Resume, Paused) => Running,
            (Word::Abort, Running | Paused) => Aborting,
            (_, state) => {
                return Err(format!(
                    "the evacuation is {} already",
                    state.words().to_lowercase()
                ));
            }
        };
        if next == Aborting {
            self.give_up.send_replace(true);
            self.aborted = Some(Instant::now());
        }
        self.record.state = next;
        self.note(format!(
            "an operator said: {}",
            match word {
                Word::Pause => "pause",
                Word::Resume => "go on",
                Word::Abort => "abort",
            }
        ));
        Ok(())
    }

    fn note(&mut self, what: String) {
        tracing::warn!(evacuation = self.record.id, "{what}");
        self.record.note(what, None);
        self.news = true;
    }

    fn hinder(&mut self, trouble: String) {
        if self.record.trouble == trouble {
            return;
        }
        if !trouble.is_empty() {
            self.note(trouble.clone());
        }
        self.record.trouble = trouble;
        self.news = true;
    }

    fn settle(&mut self, index: usize, state: GuestState, why: String) {
        let guest = &mut self.record.guests[index];
        if guest.state == state && guest.why == why {
            return;
        }
        if guest.state != state {
            tracing::info!(
                guest = guest.guest,
                state = state.words(),
                why,
                "evacuation"
            );
        }
        if matches!(state, GuestState::Failed | GuestState::Left) && !guest.state.is_over() {
            self.unplanned = Some(format!("'{}' stays: {why}", guest.guest));
        }
        (guest.state, guest.why) = (state, why);
        self.news = true;
    }

    fn busy(&self, index: usize) -> bool {
        self.at_work.values().any(|busy| busy.contains(&index))
    }

    /// Is it over?
    fn end(&mut self, remote: &Remote) {
        let aborting = self.record.state == EvacuationState::Aborting;
        let patience = self.aborted.is_some_and(|since| since.elapsed() > ABORTING);
        if aborting && (self.at_work.is_empty() || (patience && !remote.alive())) {
            for index in 0..self.record.guests.len() {
                if !self.record.guests[index].state.is_over() {
                    self.settle(index, GuestState::Left, self.stays(index));
                }
            }
            self.over(EvacuationState::Aborted);
        } else if !aborting
            && self.at_work.is_empty()
            && self.record.guests.iter().all(|guest| guest.state.is_over())
        {
            let all = self.record.count(GuestState::Moved) == self.record.guests.len();
            self.over(match all {
                true => EvacuationState::Done,
                false => EvacuationState::PartlyDone,
            });
        }
    }

    /// What is to be said of a guest that an abort leaves.
    fn stays(&self, index: usize) -> String {
        let guest = &self.record.guests[index];
        match guest.state {
            GuestState::Moving => {
                "aborted while it was being moved over a link that is down; see farhaven status where it is".to_owned()
            }
            GuestState::Waiting => "aborted; it runs on here and is not protected".to_owned(),
            GuestState::Copying => {
                "aborted; it runs on here, and its first copy goes on: it is protected once that is sealed".to_owned()
            }
            _ => "aborted; it runs on here, protected".to_owned(),
        }
    }

    fn over(&mut self, state: EvacuationState) {
        self.record.state = state;
        self.record.ended_ms = Some(millis(self.record.elapsed()));
        self.record.trouble.clear();
        self.news = true;
    }

    /// Shows how it stands, and writes down what is new.
    async fn keep(&mut self) {
        self.show.send_replace(self.record.clone());
        if !std::mem::take(&mut self.news) {
            return;
        }
        let (records, record) = (self.records.clone(), self.record.clone());
        let kept = crate::work::spawn_blocking(move || records.keep(&record)).await;
        if let Ok(Err(error)) = kept {
            // Moving on matters more; what the next step writes has this in it, too.
            tracing::error!(evacuation = self.record.id, %error, "the evacuation's record cannot be written; it goes on, and a restart would know less of it");
        }
    }
}

/// What keeps the peer from taking guests in.
fn hindrance(remote: &Remote) -> String {
    let site = &remote.record.site;
    let trouble = remote.trouble();
    match (remote.alive(), trouble.is_empty()) {
        (false, _) => format!("the link to '{site}' is down; moves go on when it is back"),
        (true, false) => format!("site '{site}' says: {trouble}"),
        (true, true) => String::new(),
    }
}
