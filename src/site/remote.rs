//! One paired site, as the daemon sees it: questions and answers over the
//! control stream, data to the store, terms compared on every connection.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use farhaven_storage_sync::digest::DigestKey;
use farhaven_wan::{Peer, PeerEvent, PeerRecord};
use tokio::sync::{OnceCell, oneshot, watch};

use super::Site;
use super::breach::{Conduct, plain, plain_answer};
use super::events::EventKind;
use crate::replicate::asking::{Answer, Questions};
use crate::replicate::message::{Envelope, Message, Refusal, Unknown};
use crate::replicate::receive::Incoming;
use crate::replicate::send::Outgoing;

/// Longest a peer may think about a question that needs no data to arrive.
const ANSWER: Duration = Duration::from_secs(30);

/// A peer that was silent for so long, keep-alives included, may be gone.
const SILENT: Duration = Duration::from_secs(4);

/// Batches whose digests are learned after a restart before anything is sent:
/// 2 MiB on the wire, for half a gigabyte of content.
const LEARNED_BATCHES: u64 = 2048;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no connection, or it broke before the answer came.
    #[error(
        "site '{0}' cannot be reached now; the link or its daemon is down. Replication goes on by itself when it is back"
    )]
    Unreachable(String),
    /// The peer thinks too long.
    #[error("site '{0}' did not answer within {1:?}; see its log")]
    TimedOut(String, Duration),
    /// The peer said no.
    #[error("site '{site}' refused: {why}")]
    Refused {
        /// The peer's name.
        site: String,
        /// For programs.
        code: Refusal,
        /// For people.
        why: String,
    },
    /// An answer to some other question.
    #[error(
        "site '{0}' gave an answer that does not fit the question; do both sites run the same version?"
    )]
    Unfitting(String),
}

/// Carries questions for stored content to a peer.
struct Asker(Weak<Remote>);

impl Questions for Asker {
    fn find(&self, prefixes: Bytes) -> Answer {
        let remote = self.0.clone();
        Box::pin(async move {
            let remote = remote.upgrade()?;
            let key = *remote.outgoing.get()?.key.bytes();
            let asked = remote.ask(Message::Find { key, prefixes }).await;
            asked.ok()
        })
    }
}

/// One paired site.
pub struct Remote {
    /// How it is reached and known.
    pub record: PeerRecord,
    /// The session with it.
    pub peer: Peer,
    /// What it sends us.
    pub incoming: Incoming,
    outgoing: OnceLock<Arc<Outgoing>>,
    /// Set once the sending half knows what the peer holds of an earlier process.
    learned: OnceCell<()>,
    /// Bytes of the images that the peer has stored.
    images: AtomicU64,
    pending: Mutex<HashMap<u64, oneshot::Sender<Message>>>,
    next_id: AtomicU64,
    /// How many connections there were so far; odd while connected.
    connections: watch::Sender<u64>,
    trouble: Mutex<String>,
    pub(super) conduct: Conduct,
}

/// A question that is waited for, as long as this is there.
struct Waits<'a>(&'a Remote, u64);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.lock_pending().remove(&self.1);
    }
}

impl Remote {
    /// Wraps a trusted peer.
    pub fn new(record: PeerRecord, peer: Peer, incoming: Incoming) -> Self {
        Self {
            record,
            peer,
            incoming,
            outgoing: OnceLock::new(),
            learned: OnceCell::new(),
            images: AtomicU64::new(0),
            pending: Mutex::default(),
            next_id: AtomicU64::new(1),
            connections: watch::channel(0).0,
            trouble: Mutex::default(),
            conduct: Conduct::default(),
        }
    }

    /// Is there a connection now?
    pub fn connected(&self) -> bool {
        *self.connections.borrow() % 2 == 1
    }

    /// Is there a connection, and was the peer heard of just now?
    pub fn alive(&self) -> bool {
        self.connected() && self.peer.silence().is_some_and(|silence| silence < SILENT)
    }

    /// Waits until there is a connection.
    pub async fn reachable(&self) {
        // The sender lives in self.
        let _ = self.connections.subscribe().wait_for(|n| n % 2 == 1).await;
    }

    /// What hinders the peer, by its own word; empty for nothing.
    pub fn trouble(&self) -> String {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Asks and waits for the answer, `ANSWER` at most.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn ask(&self, question: Message) -> Result<Message, AskError> {
        self.ask_within(question, ANSWER).await
    }

    /// Asks and waits for the answer, `patience` at most.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn ask_within(
        &self,
        question: Message,
        patience: Duration,
    ) -> Result<Message, AskError> {
        let site = || self.record.site.clone();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.lock_pending().insert(id, answer);
        // However this ends: nobody waits for it any more.
        let _waits = Waits(self, id);
        let envelope = Envelope {
            id: Some(id),
            answers: None,
            body: question,
        };
        let bytes = envelope.encode().map_err(|error| {
            tracing::error!(%error, "a message cannot be sent");
            AskError::Unreachable(site())
        })?;
        let asked = async {
            // A peer that reads nothing lets nothing leave.
            let sent = self.peer.send_message(bytes).await.is_ok();
            match sent && self.connected() {
                true => answered.await.ok(),
                false => None,
            }
        };
        match tokio::time::timeout(patience, asked).await {
            Ok(Some(Message::Refused { code, why })) => Err(AskError::Refused {
                site: site(),
                code,
                why,
            }),
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(AskError::Unreachable(site())),
            Err(_) => Err(AskError::TimedOut(site(), patience)),
        }
    }

    /// Says something that needs no answer.
    pub async fn tell(&self, body: Message) {
        if let Ok(bytes) = (Envelope {
            id: None,
            answers: None,
            body,
        })
        .encode()
        {
            let _ = self.peer.send_message(bytes).await;
        }
    }

    /// The sending half of the pair. After a restart of this daemon, the first
    /// call learns from the peer the newest of what it holds; for the rest it is
    /// asked unit by unit. Nothing that it acknowledged is sent again. Waits for
    /// a connection.
    ///
    /// # Errors
    /// When the connection breaks meanwhile; ask again.
    pub async fn outgoing(
        self: &Arc<Self>,
        last_seq: u64,
        index_bytes: usize,
        key: DigestKey,
    ) -> Result<Arc<Outgoing>, AskError> {
        // There before it has learned: what the peer retires meanwhile must be heeded.
        let outgoing = self.outgoing.get_or_init(|| {
            let outgoing = Outgoing::new(self.peer.clone(), last_seq + 1, index_bytes, key);
            outgoing.asking.by(Arc::new(Asker(Arc::downgrade(self))));
            outgoing
                .asking
                .peer_holds(self.images.load(Ordering::Relaxed));
            Arc::new(outgoing)
        });
        let learned = self.learned.get_or_try_init(|| async {
            outgoing.sequence.raise_to(last_seq + 1);
            let learning = outgoing.begin_learning();
            let learned = self.learn(outgoing, last_seq, learning).await;
            outgoing.end_learning(learning);
            learned
        });
        learned.await?;
        Ok(outgoing.clone())
    }

    /// Learns the newest batches of the peer's log.
    async fn learn(
        &self,
        outgoing: &Outgoing,
        last_seq: u64,
        learning: u64,
    ) -> Result<(), AskError> {
        let first = (last_seq + 1).saturating_sub(LEARNED_BATCHES).max(1);
        if first > 1 {
            outgoing.asking.knows_a_part();
        }
        let mut next = (last_seq > 0).then_some(first);
        while let Some(from_seq) = next {
            let question = Message::Digests {
                from_seq,
                key: *outgoing.key.bytes(),
            };
            let Message::DigestPage {
                batches,
                next: following,
            } = self.ask(question).await?
            else {
                return Err(AskError::Unfitting(self.record.site.clone()));
            };
            outgoing.learn(learning, &batches);
            next = following.filter(|n| *n > from_seq && *n <= last_seq);
        }
        Ok(())
    }

    /// Tells the peer the digest key, so that it keeps hints of what it holds
    /// before it is asked for any of it.
    fn tell_key(self: &Arc<Self>, key: &DigestKey) {
        let (remote, key) = (self.clone(), *key.bytes());
        tokio::spawn(async move {
            let prefixes = Bytes::new();
            let told = remote.ask(Message::Find { key, prefixes }).await;
            if let Err(error) = told {
                tracing::debug!(peer = %remote.record.site, %error, "it keeps no hints yet");
            }
        });
    }

    /// Tells the peer the terms of all that the two sites share.
    pub(super) async fn tell_terms(&self, site: &Site) {
        let terms = site.terms_with(self);
        self.tell(Message::Terms { terms }).await;
    }

    /// Tells the peer what images are stored here, so that it asks for them.
    pub async fn tell_images(&self) {
        let images = self.incoming.image_bytes();
        self.tell(Message::Holds { images }).await;
    }

    /// The sending half, if a guest was ever opened at the peer.
    pub fn begun(&self) -> Option<Arc<Outgoing>> {
        self.outgoing.get().cloned()
    }

    /// Serves the peer until the daemon ends or the pairing is revoked.
    pub async fn serve(self: Arc<Self>, site: Weak<Site>) {
        let mut trouble = self.incoming.trouble();
        loop {
            let event = tokio::select! {
                event = self.peer.event() => event,
                Ok(()) = trouble.changed() => {
                    let what = trouble.borrow_and_update().clone();
                    // What is heard does not wait for what leaves.
                    let remote = self.clone();
                    tokio::spawn(async move { remote.tell(Message::Trouble { what }).await });
                    continue;
                }
            };
            let Some(site) = site.upgrade() else { break };
            match event {
                Some(PeerEvent::Connected { remote_site, .. }) => {
                    tracing::info!(peer = %self.record.site, remote_site, "connected");
                    self.conduct.begin();
                    let what = format!("site '{}' is reached", self.record.site);
                    site.note(EventKind::PeerConnected, &self.record.site, &what);
                    self.connections.send_modify(|n| *n += 1 + *n % 2);
                    let what = trouble.borrow_and_update().clone();
                    let remote = self.clone();
                    tokio::spawn(async move {
                        remote.tell_terms(&site).await;
                        if !what.is_empty() {
                            remote.tell(Message::Trouble { what }).await;
                        }
                        remote.tell_images().await;
                        remote.tell_key(&site.tracking_key);
                    });
                }
                Some(PeerEvent::Disconnected { why }) => {
                    tracing::warn!(peer = %self.record.site, why, "disconnected");
                    let what = format!("site '{}' is not reached: {why}", self.record.site);
                    site.note(EventKind::PeerDisconnected, &self.record.site, &what);
                    self.connections.send_modify(|n| *n += *n % 2);
                    self.lock_pending().clear();
                    self.trouble
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .clear();
                }
                Some(PeerEvent::Message(bytes)) => self.message(&site, &bytes),
                Some(PeerEvent::Data { seq, bytes }) => self.incoming.batch(seq, bytes),
                None => break,
            }
        }
        // Nothing comes any more: nobody waits to the end for it.
        self.connections.send_modify(|n| *n += *n % 2);
        self.lock_pending().clear();
    }

    fn message(self: &Arc<Self>, site: &Arc<Site>, bytes: &[u8]) {
        let envelope = match Envelope::decode(bytes) {
            Ok(envelope) => envelope,
            Err(error) => {
                match Unknown::of(bytes) {
                    Some(place) => {
                        let why = plain(&error.to_string());
                        self.complain(&format!("the peer's message is not understood: {why}"));
                        self.not_known(place, why);
                    }
                    None => self.breach("what it sends is no message of any version"),
                }
                return;
            }
        };
        if let Some(id) = envelope.answers {
            // One that nobody waits for (any more) is dropped.
            let waiting = self.lock_pending().remove(&id);
            if let Some(waiting) = waiting {
                let _ = waiting.send(plain_answer(envelope.body));
            }
            return;
        }
        if let Message::Trouble { what } = envelope.body {
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = plain(&what);
            return;
        }
        if let Message::Holds { images } = envelope.body {
            self.images.store(images, Ordering::Relaxed);
            if let Some(outgoing) = self.outgoing.get() {
                outgoing.asking.peer_holds(images);
            }
            return;
        }
        // A peer that asks without end waits for its own answers.
        let Some(room) = self.room_for(&envelope.body) else {
            return;
        };
        let (remote, site) = (self.clone(), site.clone());
        let asked_on = *self.connections.borrow();
        tokio::spawn(async move {
            let _room = room;
            let _turn = remote.conduct.turn(&envelope.body).await;
            // The answer to a term tells the newer one itself.
            let told = matches!(envelope.body, Message::Terms { .. });
            let answer = super::answer::answer(&site, &remote, envelope.body).await;
            if !told && matches!(&answer, Message::Refused { code, .. } if *code == Refusal::Fenced)
            {
                // Whoever asks under an old term has not heard of the new one.
                remote.tell_terms(&site).await;
            }
            // Who asked on another connection waits no more; its successor may have a
            // question of that number, which this is no answer to.
            let same = *remote.connections.borrow() == asked_on;
            if let Some(id) = envelope.id.filter(|_| same) {
                remote.reply(id, answer).await;
            }
        });
    }

    async fn reply(&self, id: u64, body: Message) {
        let reply = Envelope {
            id: None,
            answers: Some(id),
            body,
        };
        match reply.encode() {
            Ok(bytes) => {
                let _ = self.peer.send_message(bytes).await;
            }
            Err(error) => tracing::error!(%error, "an answer cannot be sent"),
        }
    }

    /// Nobody waits to the end for what is not understood: not the peer that
    /// asked it, nor whoever asked here what it answers.
    fn not_known(self: &Arc<Self>, place: Unknown, why: String) {
        let refused = Message::Refused {
            code: Refusal::Unknown,
            why,
        };
        if let Some(id) = place.answers {
            if let Some(waiting) = self.lock_pending().remove(&id) {
                let _ = waiting.send(refused);
            }
        } else if let Some(id) = place.id
            && let Some(room) = self.room_for_question()
        {
            let remote = self.clone();
            tokio::spawn(async move {
                let _room = room;
                remote.reply(id, refused).await;
            });
        }
    }

    fn lock_pending(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Message>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests;
