//! What one paired site may have of this one at a time, and what becomes of a
//! site that goes beyond what an honest one does: it is refused, a line in the
//! log says so (one a second at most: a log is disk space, too), and a breach
//! that nobody commits by accident ends the session. Other peers and other
//! guests notice nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use farhaven_wan::link::Gate;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::remote::Remote;
use crate::replicate::message::{GroupMessage, Message};

/// Questions of one peer that are taken at a time.
const QUESTIONS: usize = 256;

/// Messages of one peer with terms that are taken at a time, besides: no question keeps
/// the word away that a guest runs elsewhere.
const TERMS: usize = 64;

/// Of the questions, the ones that read the store or start programs and are worked on
/// at a time: threads for blocking work are shared by all peers.
const HEAVY: usize = 8;

/// Questions over the limit on one connection after which it is ended: an
/// honest site waits for its answers.
const FLOOD: u64 = 4096;

/// Guests that one peer may have here: each has a record, a term and a place in memory.
pub(super) const MOST_GUESTS: usize = 1024;

/// Terms in one message: all that two sites can share, both ways, and as many again.
pub(super) const MOST_TERMS: usize = 4 * MOST_GUESTS;

/// Longest text of a peer that is shown or logged, in characters.
const LONGEST_TEXT: usize = 1000;

/// What is kept of one peer's behaviour.
pub(super) struct Conduct {
    questions: Arc<Semaphore>,
    terms: Arc<Semaphore>,
    heavy: Arc<Semaphore>,
    dropped: AtomicU64,
    lines: Gate,
}

impl Default for Conduct {
    fn default() -> Self {
        Self {
            questions: Arc::new(Semaphore::new(QUESTIONS)),
            terms: Arc::new(Semaphore::new(TERMS)),
            heavy: Arc::new(Semaphore::new(HEAVY)),
            dropped: AtomicU64::new(0),
            lines: Gate::default(),
        }
    }
}

impl Conduct {
    /// A new connection begins with a clean sheet.
    pub(super) fn begin(&self) {
        self.dropped.store(0, Ordering::Relaxed);
    }

    /// Waits until a question of this kind may be worked on.
    pub(super) async fn turn(&self, question: &Message) -> Option<OwnedSemaphorePermit> {
        let heavy = matches!(
            question,
            Message::Facts { .. }
                | Message::Digests { .. }
                | Message::Find { .. }
                | Message::Baseline { .. }
        );
        match heavy {
            true => self.heavy.clone().acquire_owned().await.ok(),
            false => None,
        }
    }
}

impl Remote {
    /// Room for what a peer asks or tells; without it that is dropped.
    pub(super) fn room_for(&self, asked: &Message) -> Option<OwnedSemaphorePermit> {
        match asked {
            Message::Terms { .. } => self.room_for_terms(),
            _ => self.room_for_question(),
        }
    }

    /// A term is never dropped in silence: with the next connection it is told anew.
    fn room_for_terms(&self) -> Option<OwnedSemaphorePermit> {
        let room = self.conduct.terms.clone().try_acquire_owned().ok();
        if room.is_none() {
            self.breach("it tells terms faster than they can be obeyed here");
        }
        room
    }

    /// Room for one more question; without it the question is dropped.
    pub(super) fn room_for_question(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(room) = self.conduct.questions.clone().try_acquire_owned() {
            return Some(room);
        }
        let dropped = self.conduct.dropped.fetch_add(1, Ordering::Relaxed) + 1;
        if dropped == FLOOD {
            self.breach("it floods this site with questions and waits for no answer");
        } else {
            self.complain("too many questions at once; some are dropped");
        }
        None
    }

    /// A line in the log about what the peer did, unless there was one just now.
    pub(super) fn complain(&self, what: &str) {
        if let Some(more) = self.conduct.lines.pass(Instant::now()) {
            tracing::warn!(peer = %self.record.site, more, "{what}");
        }
    }

    /// No honest site does that: the session is ended with the reason. The peer
    /// may come back; whoever does not want it to removes the pairing.
    pub(super) fn breach(&self, what: &str) {
        if let Some(more) = self.conduct.lines.pass(Instant::now()) {
            tracing::error!(
                peer = %self.record.site,
                more,
                "a breach of the protocol ends the session: {what}. If that site is not what you think it is: farhaven peer remove {}",
                self.record.site
            );
        }
        self.peer.break_off(what);
    }
}

/// A text of a peer, fit for a terminal and a line of a log.
pub(super) fn plain(text: &str) -> String {
    let shown = text.chars().map(|c| if hidden(c) { ' ' } else { c });
    shown.take(LONGEST_TEXT).collect()
}

/// Is that no letter, but something that steers a terminal, or hides what a text says?
pub(super) fn hidden(c: char) -> bool {
    c.is_control()
        // What turns the direction of text hides what it says.
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

/// All texts for people in a peer's answer, made [`plain`].
pub(super) fn plain_answer(answer: Message) -> Message {
    match answer {
        Message::Refused { code, why } => Message::Refused {
            code,
            why: plain(&why),
        },
        Message::PointList { mut points } => {
            for point in &mut points {
                point.cut_at = plain(&point.cut_at);
                point.name = point.name.as_deref().map(plain);
                point.damaged = point.damaged.as_deref().map(plain);
                if let Some(group) = &mut point.group {
                    group.name = plain(&group.name);
                }
            }
            Message::PointList { points }
        }
        Message::FactsKnown { mut facts } => {
            for finding in &mut facts.findings {
                finding.code = plain(&finding.code);
                finding.what = plain(&finding.what);
                finding.mend = plain(&finding.mend);
            }
            for (directory, _) in [&mut facts.ram_directory, &mut facts.store_directory] {
                *directory = plain(directory);
            }
            for name in facts.machines.iter_mut().chain(&mut facts.cpus) {
                *name = plain(name);
            }
            Message::FactsKnown { facts }
        }
        Message::Group(mut told) => {
            if let GroupMessage::TakenOver { members } = &mut *told {
                for taken in members {
                    taken.note = plain(&taken.note);
                }
            }
            Message::Group(told)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use farhaven_storage_sync::unit::GuestId;

    use super::*;
    use crate::guest::qemu::check::Finding;
    use crate::guest::qemu::peer::PeerFacts;
    use crate::replicate::message::{ActivationTimes, Refusal, Taken};

    #[test]
    fn what_a_peer_says_cannot_write_on_a_terminal() {
        let told = Message::Refused {
            code: Refusal::Unable,
            why: format!("full\x1b[2J\n\u{202e}{}", "x".repeat(1 << 20)),
        };
        let Message::Refused { why, .. } = plain_answer(told) else {
            panic!("another message");
        };
        assert!(why.starts_with("full [2J  xxx"), "{}", &why[..20]);
        assert_eq!(why.chars().count(), LONGEST_TEXT);
    }

    #[test]
    fn nor_can_what_it_tells_of_its_host_and_of_guests_that_it_took() {
        let bad = || "a\x1b[2J\n".to_owned();
        let mut facts = PeerFacts {
            machines: vec![bad()],
            cpus: vec![bad()],
            ram_directory: (bad(), 1),
            store_directory: (bad(), 1),
            ..PeerFacts::default()
        };
        facts.findings.push(Finding::blocks(&bad(), bad(), bad()));
        let Message::FactsKnown { facts } = plain_answer(Message::FactsKnown { facts }) else {
            panic!("another message");
        };
        let told = format!("{facts:?}");
        assert!(!told.contains("\\u{1b}") && !told.contains("\\n"), "{told}");
        let taken = Taken {
            guest: GuestId([7; 16]),
            runs: false,
            times: ActivationTimes::default(),
            note: bad(),
        };
        let members = vec![taken];
        let told = Message::Group(Box::new(GroupMessage::TakenOver { members }));
        let told = format!("{:?}", plain_answer(told));
        assert!(
            told.contains("a [2J ") && !told.contains("\\u{1b}"),
            "{told}"
        );
    }
}
