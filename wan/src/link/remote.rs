//! The state of a trusted site that outlives single connections, and the
//! queue of its events.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::close::CloseCode;
use super::options::LinkOptions;
use super::status::Totals;
use crate::frame::Ranges;
use crate::limits;
use crate::peer::{PeerRecord, SiteKey};
use crate::session::{Acknowledgements, Arrival, Receiver, ReceiverError, Sender, queue_bytes};

/// How often batches that are to be taken look at the path.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(10);

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
    /// When it was last looked how much the path carries.
    pub(crate) path_seen: Option<Instant>,
    pub(crate) totals: Totals,
    pub(crate) messages_by_copy: u64,
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
                path_seen: None,
                totals: Totals::default(),
                messages_by_copy: 0,
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

    /// Sets how much may be on its way by what the path carries now.
    pub(crate) fn look_at_path(&self) {
        let live = {
            let mut state = self.state();
            let now = Instant::now();
            if state.path_seen.is_some_and(|seen| now < seen + LOOK_AGAIN) {
                return;
            }
            state.path_seen = Some(now);
            state.live.as_ref().map(|live| live.connection.clone())
        };
        // Not under the lock: QUIC may hold its own for a while.
        let Some(path) = live.map(|connection| connection.stats().path) else {
            return;
        };
        let bytes = queue_bytes(path.cwnd, path.rtt, self.options.ahead_bytes);
        self.state().sender.queue_up_to(bytes);
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
        match state.receiver.arrived(seq, bytes.len())? {
            // Under the lock: what the receiver counts as handed over is handed over.
            Arrival::New => {
                let event = PeerEvent::Data { seq, bytes };
                let _ = self.events.send(Queued { event, _room: room });
            }
            Arrival::Duplicate => self.acknowledgements_wait.notify_one(),
        }
        Ok(())
    }

    /// The next event; `None` once the link is closed and every event taken.
    pub(crate) async fn next_event(&self) -> Option<PeerEvent> {
        let mut closed = self.closed.subscribe();
        let mut taken = self.taken.lock().await;
        let queued = tokio::select! {
            biased;
            queued = taken.recv() => queued,
            _ = closed.wait_for(|closed| *closed) => taken.try_recv().ok(),
        };
        queued.map(|queued| queued.event)
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
