//! A trusted site, as long as the trust lasts: the handle the application
//! holds, and the state that outlives single connections.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::close::CloseCode;
use super::options::LinkOptions;
use super::status::{LinkStatus, Totals};
use crate::frame::Ranges;
use crate::limits;
use crate::peer::{PeerRecord, SiteKey};
use crate::session::{Acknowledgements, Arrival, Receiver, ReceiverError, Sender, SubmitError};

/// What happens on a link, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// A connection is up: messages may be sent. Each one begins with nothing
    /// of the last one's messages.
    Connected {
        /// Version of the protocol both speak.
        version: u16,
        /// The name the other site gives itself.
        remote_site: String,
        /// A random number of the other process: another one means it restarted.
        incarnation: u64,
    },
    /// A message of the other application.
    Message(Bytes),
    /// A batch, new to this process. Answer with [`Peer::durable`] once it is.
    /// May come after a message that was sent later.
    Data {
        /// Its number.
        seq: u64,
        /// Its payload.
        bytes: Bytes,
    },
    /// The connection is gone; the link mends itself.
    Disconnected {
        /// Why, for the operator.
        why: String,
    },
}

/// The trust in this peer ended, or the node was shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the link is closed: the trust in the peer ended, or this site stops")]
pub struct Closed;

/// Why a batch was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendDataError {
    /// The link is closed.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// The batch cannot be sent, now or later.
    #[error(transparent)]
    Batch(SubmitError),
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendMessageError {
    /// There is no connection (any more). Send it again after the next
    /// [`PeerEvent::Connected`].
    #[error("the peer is not connected")]
    NotConnected,
    /// It is too large.
    #[error("a message of {0} bytes; at most 1 MiB are allowed")]
    TooLarge(usize),
}

/// Why waiting for an acknowledgement ended without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AcknowledgeError {
    /// The link is closed.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// [`Peer::reset_data`] forgot what was waited for.
    #[error("the batches were given up before they were acknowledged")]
    Reset,
}

/// An event, and what it holds of the queues' budgets until it is taken.
pub(crate) struct Queued {
    event: PeerEvent,
    _room: OwnedSemaphorePermit,
}

/// The connection that is up.
pub(crate) struct Live {
    pub(crate) generation: u64,
    pub(crate) connection: quinn::Connection,
    pub(crate) messages: mpsc::Sender<Bytes>,
    pub(crate) since: Instant,
    pub(crate) dialled: bool,
    pub(crate) remote_incarnation: u64,
}

pub(crate) struct State {
    pub(crate) sender: Sender,
    pub(crate) receiver: Receiver,
    pub(crate) live: Option<Live>,
    pub(crate) totals: Totals,
    pub(crate) last_heard: Option<Instant>,
    pub(crate) why_last_disconnect: Option<String>,
}

pub(crate) struct Remote {
    pub(crate) key: SiteKey,
    pub(crate) own_key: SiteKey,
    pub(crate) own_site: String,
    pub(crate) own_incarnation: u64,
    pub(crate) options: LinkOptions,
    pub(crate) record: Mutex<PeerRecord>,
    state: Mutex<State>,
    pub(crate) acknowledgements: watch::Sender<Acknowledgements>,
    /// Something may be sent.
    pub(crate) data_waits: Notify,
    /// Something may be acknowledged.
    pub(crate) acknowledgements_wait: Notify,
    pub(crate) connected: watch::Sender<bool>,
    /// Generation of the newest authenticated connection.
    pub(crate) newest: watch::Sender<u64>,
    /// Held by the one connection that is the link; the next waits for it to end.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// Connections that may be in their greeting at once.
    pub(crate) greetings: Semaphore,
    pub(crate) closed: watch::Sender<bool>,
    events: mpsc::UnboundedSender<Queued>,
    taken: tokio::sync::Mutex<mpsc::UnboundedReceiver<Queued>>,
    /// Budgets of the queue above: it is unbounded only in name.
    data_room: Arc<Semaphore>,
    message_room: Arc<Semaphore>,
    notice_room: Arc<Semaphore>,
}

impl Remote {
    pub(crate) fn new(
        record: PeerRecord,
        own: (SiteKey, String, u64),
        options: LinkOptions,
    ) -> Arc<Remote> {
        let (events, taken) = mpsc::unbounded_channel();
        let (own_key, own_site, own_incarnation) = own;
        Arc::new(Remote {
            key: record.key,
            own_key,
            own_site,
            own_incarnation,
            record: Mutex::new(record),
            state: Mutex::new(State {
                sender: Sender::new(options.window_bytes),
                receiver: Receiver::default(),
                live: None,
                totals: Totals::default(),
                last_heard: None,
                why_last_disconnect: None,
            }),
            acknowledgements: watch::Sender::default(),
            data_waits: Notify::new(),
            acknowledgements_wait: Notify::new(),
            connected: watch::Sender::new(false),
            newest: watch::Sender::new(0),
            turn: tokio::sync::Mutex::new(()),
            greetings: Semaphore::new(limits::MAX_GREETINGS),
            closed: watch::Sender::new(false),
            events,
            taken: tokio::sync::Mutex::new(taken),
            data_room: Arc::new(Semaphore::new(options.receive_permits())),
            message_room: Arc::new(Semaphore::new(limits::MESSAGE_QUEUE_BYTES)),
            notice_room: Arc::new(Semaphore::new(limits::NOTICE_QUEUE)),
            options,
        })
    }

    /// Never held across an await. A panic elsewhere leaves the state as whole
    /// as it was: each change is one call.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self) -> PeerRecord {
        self.record
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Publishes how far acknowledgement has come, after a change of the sender.
    pub(crate) fn publish(&self, state: &State) {
        self.acknowledgements
            .send_replace(state.sender.acknowledgements());
    }

    pub(crate) async fn notice(&self, event: PeerEvent) {
        if let Ok(room) = self.notice_room.clone().acquire_owned().await {
            let _ = self.events.send(Queued { event, _room: room });
        }
    }

    pub(crate) async fn message_arrived(&self, bytes: Bytes) {
        let room = bytes.len().clamp(256, limits::MESSAGE_QUEUE_BYTES) as u32;
        if let Ok(room) = self.message_room.clone().acquire_many_owned(room).await {
            let event = PeerEvent::Message(bytes);
            let _ = self.events.send(Queued { event, _room: room });
        }
    }

    /// A batch is read: waits for room, then hands it over unless it is a repeat
    /// or its connection is not the link any more.
    pub(crate) async fn data_arrived(
        &self,
        generation: u64,
        seq: u64,
        bytes: Bytes,
    ) -> Result<(), ReceiverError> {
        let room = bytes.len().clamp(256, limits::MAX_BATCH_BYTES) as u32;
        let Ok(room) = self.data_room.clone().acquire_many_owned(room).await else {
            return Ok(());
        };
        let mut state = self.state();
        if state
            .live
            .as_ref()
            .is_none_or(|live| live.generation != generation)
        {
            return Ok(());
        }
        match state.receiver.arrived(seq)? {
            // Under the lock: what the receiver counts as handed over is handed over.
            Arrival::New => {
                let event = PeerEvent::Data { seq, bytes };
                let _ = self.events.send(Queued { event, _room: room });
            }
            Arrival::Duplicate => self.acknowledgements_wait.notify_one(),
        }
        Ok(())
    }

    pub(crate) fn next_acknowledgement(&self) -> Option<Ranges> {
        self.state().receiver.next_acknowledgement()
    }

    /// Ends the trust, or the node: nothing is sent or received any more.
    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        self.closed.send_replace(true);
        // Whoever waits for room in the queues must not outlive the link.
        for room in [&self.data_room, &self.message_room, &self.notice_room] {
            room.close();
        }
        if let Some(live) = &self.state().live {
            live.connection.close(code.number(), reason.as_bytes());
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }
}

/// A trusted site. Clones are the same link, which reconnects by itself.
#[derive(Clone)]
pub struct Peer {
    pub(crate) remote: Arc<Remote>,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("key", &self.remote.key)
            .field("site", &self.record().site)
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// The site's pinned key.
    pub fn key(&self) -> SiteKey {
        self.remote.key
    }

    /// What [`crate::Node::trust`] was last given for this site.
    pub fn record(&self) -> PeerRecord {
        self.remote.record()
    }

    /// Sends a batch: waits while the window is full, then keeps it until the
    /// peer acknowledged it, over as many connections as that takes. Numbers
    /// are the caller's and are never used twice, also not after
    /// [`Peer::reset_data`]. A call that is dropped while it waits has sent nothing.
    ///
    /// # Errors
    /// When the link is closed, or the batch is too large or its number was used.
    pub async fn send_data(&self, seq: u64, bytes: Bytes) -> Result<(), SendDataError> {
        let mut acknowledgements = self.remote.acknowledgements.subscribe();
        let mut closed = self.remote.closed.subscribe();
        loop {
            if *closed.borrow_and_update() {
                return Err(Closed.into());
            }
            acknowledgements.mark_unchanged();
            {
                let mut state = self.remote.state();
                match state.sender.submit(seq, bytes.clone()) {
                    Ok(()) => {
                        self.remote.publish(&state);
                        self.remote.data_waits.notify_one();
                        return Ok(());
                    }
                    Err(SubmitError::Full) => {}
                    Err(error) => return Err(SendDataError::Batch(error)),
                }
            }
            tokio::select! {
                _ = acknowledgements.changed() => {}
                _ = closed.changed() => {}
            }
        }
    }

    /// How far acknowledgement has come, to watch.
    pub fn acknowledged(&self) -> watch::Receiver<Acknowledgements> {
        self.remote.acknowledgements.subscribe()
    }

    /// Waits until every batch submitted so far with a number up to `seq` is
    /// durable at the peer.
    ///
    /// # Errors
    /// When the link is closed, or [`Peer::reset_data`] gave batches up meanwhile.
    pub async fn all_acknowledged(&self, seq: u64) -> Result<(), AcknowledgeError> {
        let mut acknowledgements = self.remote.acknowledgements.subscribe();
        let mut closed = self.remote.closed.subscribe();
        let resets = acknowledgements.borrow().resets;
        loop {
            let now = *acknowledgements.borrow_and_update();
            if now.resets != resets {
                return Err(AcknowledgeError::Reset);
            }
            if now.reached(seq) {
                return Ok(());
            }
            if *closed.borrow_and_update() {
                return Err(Closed.into());
            }
            tokio::select! {
                _ = acknowledgements.changed() => {}
                _ = closed.changed() => {}
            }
        }
    }

    /// Forgets every batch that is not acknowledged, and stops those under way.
    pub fn reset_data(&self) {
        let mut state = self.remote.state();
        state.sender.reset();
        self.remote.publish(&state);
    }

    /// Sends a message on this connection: reliable, in order, before data.
    /// Lost with the connection: what matters is repeated after the next
    /// [`PeerEvent::Connected`].
    ///
    /// # Errors
    /// When there is no connection, or the message is over 1 MiB.
    pub async fn send_message(&self, bytes: Bytes) -> Result<(), SendMessageError> {
        if bytes.len() > limits::MAX_MESSAGE_BYTES {
            return Err(SendMessageError::TooLarge(bytes.len()));
        }
        let messages = self
            .remote
            .state()
            .live
            .as_ref()
            .map(|live| live.messages.clone());
        let messages = messages.ok_or(SendMessageError::NotConnected)?;
        messages
            .send(bytes)
            .await
            .map_err(|_| SendMessageError::NotConnected)
    }

    /// The next event; `None` once the link is closed and every event taken.
    /// Of several tasks that wait, each event goes to one.
    pub async fn event(&self) -> Option<PeerEvent> {
        let mut closed = self.remote.closed.subscribe();
        let mut taken = self.remote.taken.lock().await;
        tokio::select! {
            biased;
            queued = taken.recv() => queued.map(|queued| queued.event),
            _ = closed.wait_for(|closed| *closed) => taken.try_recv().ok().map(|queued| queued.event),
        }
    }

    /// The application made these batches durable: they are acknowledged.
    /// Numbers of batches that it was not handed are ignored. Every batch is to
    /// be answered so (or all with [`Peer::refuse_data`]): its sender keeps it,
    /// and a part of its window, until then.
    pub fn durable(&self, seqs: &[u64]) {
        if self.remote.state().receiver.durable(seqs) {
            self.remote.acknowledgements_wait.notify_one();
        }
    }

    /// The application cannot keep the batches it was handed and did not make
    /// durable. The connection is closed with the reason, and the peer sends
    /// them again on the next one.
    pub fn refuse_data(&self, why: &str) {
        let mut state = self.remote.state();
        state.receiver.give_back();
        if let Some(live) = &state.live {
            live.connection
                .close(CloseCode::Refused.number(), why.as_bytes());
        }
    }

    /// When the peer was last heard of, keep-alives included, to about a
    /// quarter of a second; `None` if never.
    pub fn last_heard(&self) -> Option<Instant> {
        self.remote.state().last_heard
    }

    /// How long the peer has been silent; `None` if it was never heard of.
    pub fn silence(&self) -> Option<Duration> {
        self.last_heard().map(|heard| heard.elapsed())
    }

    /// What the link measured.
    pub fn status(&self) -> LinkStatus {
        LinkStatus::of(&self.remote.state())
    }
}
