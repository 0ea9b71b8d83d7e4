//! One paired site, as the daemon sees it: questions and answers over the
//! control stream, data to the store, terms compared on every connection.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, Place};
use farhaven_wan::{Peer, PeerEvent, PeerRecord};
use tokio::sync::{OnceCell, Semaphore, oneshot, watch};

use super::Site;
use crate::replicate::message::{Envelope, Message, Refusal};
use crate::replicate::receive::Incoming;
use crate::replicate::send::Outgoing;

/// Longest a peer may think about a question that needs no data to arrive.
const ANSWER: Duration = Duration::from_secs(30);

/// A peer that was silent for so long, keep-alives included, may be gone.
const SILENT: Duration = Duration::from_secs(4);

/// Questions of one peer that are worked on at a time.
const QUESTIONS: usize = 256;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no connection, or it broke before the answer came.
    #[error(
        "site '{0}' cannot be reached now; the link or its daemon is down. Replication goes on by itself when it is back"
    )]
    Unreachable(String),
    /// The peer thinks too long.
    #[error("site '{0}' did not answer within {ANSWER:?}; see its log")]
    TimedOut(String),
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

/// One paired site.
pub struct Remote {
    /// How it is reached and known.
    pub record: PeerRecord,
    /// The session with it.
    pub peer: Peer,
    /// What it sends us.
    pub incoming: Incoming,
    outgoing: OnceCell<Arc<Outgoing>>,
    pending: Mutex<HashMap<u64, oneshot::Sender<Message>>>,
    next_id: AtomicU64,
    /// How many connections there were so far; odd while connected.
    connections: watch::Sender<u64>,
    trouble: Mutex<String>,
    questions: Arc<Semaphore>,
}

impl Remote {
    /// Wraps a trusted peer.
    pub fn new(record: PeerRecord, peer: Peer, incoming: Incoming) -> Self {
        Self {
            record,
            peer,
            incoming,
            outgoing: OnceCell::new(),
            pending: Mutex::default(),
            next_id: AtomicU64::new(1),
            connections: watch::channel(0).0,
            trouble: Mutex::default(),
            questions: Arc::new(Semaphore::new(QUESTIONS)),
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
        let envelope = Envelope {
            id: Some(id),
            answers: None,
            body: question,
        };
        let sent = match envelope.encode() {
            Ok(bytes) => self.peer.send_message(bytes).await.is_ok(),
            Err(error) => {
                tracing::error!(%error, "a message cannot be sent");
                false
            }
        };
        if !sent || !self.connected() {
            self.lock_pending().remove(&id);
            return Err(AskError::Unreachable(site()));
        }
        let answer = tokio::time::timeout(patience, answered).await;
        self.lock_pending().remove(&id);
        match answer {
            Ok(Ok(Message::Refused { code, why })) => Err(AskError::Refused {
                site: site(),
                code,
                why,
            }),
            Ok(Ok(message)) => Ok(message),
            Ok(Err(_)) => Err(AskError::Unreachable(site())),
            Err(_) => Err(AskError::TimedOut(site())),
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
    /// call learns from the peer what it holds: nothing that it acknowledged
    /// is sent again. Waits for a connection.
    ///
    /// # Errors
    /// When the connection breaks meanwhile; ask again.
    pub async fn outgoing(
        &self,
        last_seq: u64,
        index_bytes: usize,
        key: DigestKey,
    ) -> Result<Arc<Outgoing>, AskError> {
        let made = self.outgoing.get_or_try_init(|| async {
            let outgoing = Outgoing::new(self.peer.clone(), last_seq + 1, index_bytes, key);
            let mut next = (last_seq > 0).then_some(1);
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
                let mut index = outgoing
                    .index
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                for (seq, digests) in &batches {
                    for (i, digest) in digests.chunks_exact(16).enumerate().take(64) {
                        if let Ok(digest) = digest.try_into() {
                            index.insert(Digest(digest), Place::new(*seq, i as u8));
                        }
                    }
                }
                next = following.filter(|n| *n > from_seq);
            }
            Ok(Arc::new(outgoing))
        });
        made.await.cloned()
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
                    self.tell(Message::Trouble { what }).await;
                    continue;
                }
            };
            let Some(site) = site.upgrade() else { break };
            match event {
                Some(PeerEvent::Connected { remote_site, .. }) => {
                    tracing::info!(peer = %self.record.site, remote_site, "connected");
                    self.connections.send_modify(|n| *n += 1 + *n % 2);
                    self.tell(Message::Terms {
                        terms: site.terms_with(&self.record.site),
                    })
                    .await;
                    let what = trouble.borrow_and_update().clone();
                    if !what.is_empty() {
                        self.tell(Message::Trouble { what }).await;
                    }
                }
                Some(PeerEvent::Disconnected { why }) => {
                    tracing::warn!(peer = %self.record.site, why, "disconnected");
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
    }

    fn message(self: &Arc<Self>, site: &Arc<Site>, bytes: &[u8]) {
        let envelope = match Envelope::decode(bytes) {
            Ok(envelope) => envelope,
            Err(error) => {
                tracing::warn!(peer = %self.record.site, %error, "the peer's message is not understood");
                return;
            }
        };
        if let Some(id) = envelope.answers {
            if let Some(waiting) = self.lock_pending().remove(&id) {
                let _ = waiting.send(envelope.body);
            }
            return;
        }
        if let Message::Trouble { what } = envelope.body {
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = what;
            return;
        }
        // A peer that asks without end waits for its own answers.
        let Ok(room) = self.questions.clone().try_acquire_owned() else {
            tracing::warn!(peer = %self.record.site, "too many questions at once; one is dropped");
            return;
        };
        let (remote, site) = (self.clone(), site.clone());
        tokio::spawn(async move {
            let _room = room;
            let answer = super::answer::answer(&site, &remote, envelope.body).await;
            if let Some(id) = envelope.id {
                let reply = Envelope {
                    id: None,
                    answers: Some(id),
                    body: answer,
                };
                match reply.encode() {
                    Ok(bytes) => {
                        let _ = remote.peer.send_message(bytes).await;
                    }
                    Err(error) => tracing::error!(%error, "an answer cannot be sent"),
                }
            }
        });
    }

    fn lock_pending(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Message>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
