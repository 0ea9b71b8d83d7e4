//! Units that wait until it is known whether the peer holds them.
//!
//! They leave in the order in which they came: a later content of a unit is
//! never overtaken by an earlier one. While the oldest wait for their answer
//! the next questions are on their way; a question is full, or the room for
//! waiting units is used up, or the point ends. Where nothing is asked,
//! nothing is copied and nothing waits.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use farhaven_storage_sync::unit::{Digest, GuestId, Place, UNIT, VolumeIndex};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::asking::{ASKED_BYTES, QUESTION};
use super::outgoing::{LinkNow, Outgoing};

/// Units that wait together.
const PIECE: usize = 64;

/// What waits.
pub(super) enum What {
    /// Units and their digests.
    Units(Vec<u8>, Vec<Digest>),
    /// So many units of zeros.
    Zeros(u64),
}

/// A run of units that waits.
pub(super) struct Piece {
    pub(super) volume: VolumeIndex,
    pub(super) unit: u64,
    pub(super) what: What,
    /// The question that it waits for.
    question: Option<u64>,
}

/// What can be done with the oldest.
pub(super) enum Next {
    /// Nothing waits, or it may go on waiting.
    Nothing,
    /// It can be encoded.
    Piece(Piece),
    /// Its answer must be waited for.
    Wait(watch::Receiver<Option<Found>>),
}

/// What was found of a question: kept until its units are encoded, since a
/// small index may have forgotten it by then.
pub(super) type Found = HashMap<Digest, Place>;

/// A question on its way. While anybody has it, what the peer retires is noted.
struct Asked {
    outgoing: Arc<Outgoing>,
    id: u64,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.outgoing.asking.answers().end(self.id);
    }
}

struct Open {
    number: u64,
    asked: Arc<Asked>,
    answered: watch::Receiver<Option<Found>>,
}

/// Units of one shipment that wait.
pub(super) struct Ahead {
    outgoing: Arc<Outgoing>,
    guest: GuestId,
    runtime: Handle,
    pieces: VecDeque<Piece>,
    /// The question that is being filled: its number, and what it asks for.
    filling: u64,
    asked: Vec<Digest>,
    asked_already: HashSet<Digest>,
    /// Of the last unit that was asked for.
    volume: VolumeIndex,
    /// Questions on their way, or whose units still wait, the oldest first.
    open: VecDeque<Open>,
    /// No answer is worth waiting for any more.
    impatient: bool,
}

impl Ahead {
    pub(super) fn new(outgoing: &Arc<Outgoing>, guest: GuestId, runtime: Handle) -> Self {
        Self {
            outgoing: outgoing.clone(),
            guest,
            runtime,
            pieces: VecDeque::new(),
            filling: 0,
            asked: Vec::new(),
            asked_already: HashSet::new(),
            volume: 0,
            open: VecDeque::new(),
            impatient: false,
        }
    }

    /// How many units, from the front of these, are taken or passed together.
    pub(super) fn piece(&self, units: usize) -> usize {
        match self.pieces.is_empty() && !self.outgoing.asking.may_find() {
            true => units,
            false => units.min(PIECE),
        }
    }

    /// Takes units that must wait; false: they need not, encode them now.
    pub(super) fn takes(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> bool {
        let asks = self.asks(volume, digests);
        if !asks && self.pieces.is_empty() {
            return false;
        }
        if asks && self.asked.len() >= QUESTION {
            // The piece belongs to the question that has just become full.
            self.push(volume, unit, bytes, digests, Some(self.filling));
            self.send();
        } else {
            let question = asks.then_some(self.filling);
            self.push(volume, unit, bytes, digests, question);
        }
        true
    }

    fn push(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
        question: Option<u64>,
    ) {
        self.outgoing.asking.hold(bytes.len());
        self.pieces.push_back(Piece {
            volume,
            unit,
            what: What::Units(bytes.to_vec(), digests.to_vec()),
            question,
        });
    }

    /// Takes zeros behind units that wait; false: nothing waits.
    pub(super) fn takes_zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> bool {
        if self.pieces.is_empty() {
            return false;
        }
        self.outgoing.asking.hold(UNIT);
        self.pieces.push_back(Piece {
            volume,
            unit,
            what: What::Zeros(count),
            question: None,
        });
        true
    }

    /// Adds to the open question what of these should be asked for.
    fn asks(&mut self, volume: VolumeIndex, digests: &[Digest]) -> bool {
        let asking = &self.outgoing.asking;
        let may_find = asking.may_find() && asking.questions().is_some();
        if !may_find
            || self.pieces.is_empty() && asking.is_full()
            || asking.distrusts(digests.len() as u64)
        {
            return false;
        }
        let before = self.asked.len();
        asking.worth(self.guest, volume, |worth| {
            let index = self.outgoing.index();
            for digest in digests {
                let nothing = matches!(*digest, Digest::UNKNOWN | Digest::ZERO_UNIT);
                let ask = !nothing
                    && asking.is_sampled(digest)
                    && index.get_for(self.guest, *digest).is_none()
                    && worth.asks()
                    && self.asked_already.insert(*digest);
                if ask {
                    self.asked.push(*digest);
                }
            }
        });
        self.volume = volume;
        self.asked.len() > before
    }

    /// Sends the question that is being filled.
    fn send(&mut self) {
        let asked = std::mem::take(&mut self.asked);
        if self.asked_already.len() > 16 * QUESTION {
            self.asked_already.clear();
        }
        let number = self.filling;
        self.filling += 1;
        let Some(questions) = self.outgoing.asking.questions() else {
            return;
        };
        let front = |digest: &Digest| digest.0.into_iter().take(ASKED_BYTES);
        let prefixes: Bytes = asked.iter().flat_map(front).collect();
        let (done, answered) = watch::channel(None);
        let question = Arc::new(Asked {
            outgoing: self.outgoing.clone(),
            id: self.outgoing.asking.answers().begin(),
        });
        self.open.push_back(Open {
            number,
            asked: question.clone(),
            answered,
        });
        let outgoing = self.outgoing.clone();
        let whose = (self.guest, self.volume);
        self.runtime.spawn(async move {
            let answer = questions.find(prefixes).await;
            let found = outgoing.take_answer(question.id, whose, &asked, answer);
            done.send_replace(Some(found));
        });
    }

    /// The oldest piece, if it can go. `all`: the shipment ends a point, and
    /// everything must go; else it may wait while there is room.
    pub(super) fn next(&mut self, all: bool) -> Next {
        let Some(front) = self.pieces.front() else {
            self.impatient = false;
            self.open.clear();
            self.asked.clear();
            self.asked_already.clear();
            return Next::Nothing;
        };
        let Some(question) = front.question.filter(|_| !self.impatient) else {
            return self.pop();
        };
        let must_go = all || self.outgoing.asking.is_full();
        if question == self.filling {
            if !must_go {
                return Next::Nothing;
            }
            if all && !self.is_worth_it() {
                return self.pop();
            }
            self.send();
        }
        self.close_before(question);
        let open = self.open.front().filter(|open| open.number == question);
        match open {
            Some(open)
                if open.answered.borrow().is_none() && open.answered.has_changed().is_ok() =>
            {
                if !must_go {
                    return Next::Nothing;
                }
                if all && !self.is_worth_it() {
                    self.impatient = true;
                    return self.pop();
                }
                Next::Wait(open.answered.clone())
            }
            _ => self.pop(),
        }
    }

    fn close_before(&mut self, question: u64) {
        while self.open.front().is_some_and(|open| open.number < question) {
            self.open.pop_front();
        }
    }

    /// What was found of these goes into the index again, for now they are encoded.
    fn remember(&mut self, question: u64, digests: &[Digest]) {
        self.close_before(question);
        let Some(open) = self.open.front().filter(|open| open.number == question) else {
            return;
        };
        let found = open.answered.borrow();
        let Some(found) = found.as_ref().filter(|found| !found.is_empty()) else {
            return;
        };
        let answers = self.outgoing.asking.answers();
        let mut index = self.outgoing.index();
        for digest in digests {
            if let Some(place) = found.get(digest)
                && index.get_for(self.guest, *digest).is_none()
                && answers.may_name(open.asked.id, place.seq())
            {
                index.insert(*digest, *place);
            }
        }
    }

    fn pop(&mut self) -> Next {
        match self.pieces.pop_front() {
            Some(piece) => {
                self.outgoing.asking.release(piece.bytes());
                if let (Some(question), What::Units(_, digests)) = (piece.question, &piece.what) {
                    self.remember(question, digests);
                }
                Next::Piece(piece)
            }
            None => Next::Nothing,
        }
    }

    /// Would the answers that are still to come save more than the link stands
    /// idle for them? What waits for the link already is sent meanwhile.
    fn is_worth_it(&self) -> bool {
        let units = self.open.len() * QUESTION + self.asked.len();
        let link = self.outgoing.link();
        let idle = match link.is_short {
            // Hardly a delay, and what is not sent is not stored twice either.
            true => UNIT as u64,
            false => link.round_trip_bytes.saturating_sub(link.backlog),
        };
        let worth = |worth: &mut super::asking::Worth| worth.is_worth(units as u64, idle as f64);
        self.outgoing.asking.worth(self.guest, self.volume, worth)
    }

    /// The oldest was waited for from `since` on, with the link as it was then.
    pub(super) fn waited(&self, link: &LinkNow, took: Duration) {
        let could = link.bytes_a_second * took.as_secs_f64() - link.backlog as f64;
        self.outgoing
            .asking
            .worth(self.guest, self.volume, |worth| {
                worth.waited(could.max(0.0))
            });
    }

    /// The answer to the oldest did not come in time: what waits goes without.
    pub(super) fn give_up(&mut self) {
        self.impatient = true;
        self.outgoing
            .asking
            .worth(self.guest, self.volume, |worth| worth.failed());
    }

    /// It could not be encoded: it is the oldest again.
    pub(super) fn put_back(&mut self, piece: Piece) {
        self.outgoing.asking.hold(piece.bytes());
        self.pieces.push_front(piece);
    }
}

impl Piece {
    fn bytes(&self) -> usize {
        match &self.what {
            What::Units(bytes, _) => bytes.len(),
            // They take little, and there may be many.
            What::Zeros(_) => UNIT,
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let bytes = self.pieces.iter().map(Piece::bytes).sum();
        self.outgoing.asking.release(bytes);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests;
