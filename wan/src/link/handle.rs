//! What the application holds of a trusted site.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use super::close::CloseCode;
use super::remote::{LOOK_AGAIN, PeerEvent, Remote};
use super::status::LinkStatus;
use crate::limits;
use crate::pace::{Door, Flow, PaceError, Passed, Rank};
use crate::peer::{PeerRecord, SiteKey};
use crate::session::{Acknowledgements, SubmitError};

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
    /// The link took nothing for as long as there was patience.
    #[error("the link took no data for {0:?}")]
    Stalled(Duration),
    /// It cannot wait for its turn.
    #[error(transparent)]
    Pace(#[from] PaceError),
}

/// A batch at the session's window.
struct AtWindow<'a> {
    remote: &'a Remote,
    seq: u64,
    bytes: Bytes,
    acknowledgements: watch::Receiver<Acknowledgements>,
    closed: watch::Receiver<bool>,
}

impl<'a> AtWindow<'a> {
    fn new(remote: &'a Remote, seq: u64, bytes: Bytes) -> Self {
        Self {
            remote,
            seq,
            bytes,
            acknowledgements: remote.acknowledgements.subscribe(),
            closed: remote.closed.subscribe(),
        }
    }
}

impl Door for AtWindow<'_> {
    type Error = SendDataError;

    fn attempt(&mut self) -> Result<bool, SendDataError> {
        if *self.closed.borrow_and_update() {
            return Err(Closed.into());
        }
        self.acknowledgements.mark_unchanged();
        self.remote.look_at_path();
        let mut state = self.remote.state();
        match state.sender.submit(self.seq, self.bytes.clone()) {
            Ok(()) => {
                self.remote.publish(&state);
                self.remote.data_waits.notify_one();
                Ok(true)
            }
            Err(SubmitError::Full | SubmitError::Queued) => Ok(false),
            Err(error) => Err(SendDataError::Batch(error)),
        }
    }

    async fn room(&mut self) {
        tokio::select! {
            _ = self.acknowledgements.changed() => {}
            _ = self.closed.changed() => {}
            // The path may carry more than it did.
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
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

    /// Sends a batch: waits while the window is full or enough waits to leave
    /// ([`crate::session::queue_bytes`]), then keeps it until the
    /// peer acknowledged it, over as many connections as that takes. Numbers
    /// are the caller's and are never used twice, also not after
    /// [`Peer::reset_data`]. A call that is dropped while it waits has sent nothing.
    ///
    /// # Errors
    /// When the link is closed, or the batch is too large or its number was used.
    pub async fn send_data(&self, seq: u64, bytes: Bytes) -> Result<(), SendDataError> {
        let mut window = AtWindow::new(&self.remote, seq, bytes);
        while !window.attempt()? {
            window.room().await;
        }
        Ok(())
    }

    /// As [`Peer::send_data`], in the turn of a flow: within its cap and that of all flows,
    /// and by shares where several want to send. A link that takes nothing is left after
    /// `patience`; what waits for a cap or another's turn waits as long as that takes.
    ///
    /// # Errors
    /// As for [`Peer::send_data`], and [`SendDataError::Stalled`].
    pub async fn send_in_turn(
        &self,
        flow: &Flow,
        rank: Rank,
        patience: Option<Duration>,
        seq: u64,
        bytes: Bytes,
    ) -> Result<(), SendDataError> {
        let size = bytes.len() as u64;
        let mut window = AtWindow::new(&self.remote, seq, bytes);
        match flow.pass(size, rank, patience, &mut window).await? {
            Passed::Sent => Ok(()),
            Passed::Stalled => Err(SendDataError::Stalled(patience.unwrap_or_default())),
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
        self.remote.next_event().await
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

    /// An earlier process of this site made these batches of the peer durable:
    /// they are not to be sent again. Told before the peer may use new numbers.
    pub fn stored(&self, seqs: impl IntoIterator<Item = u64>) {
        self.remote.state().receiver.stored(seqs);
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

    /// The application found what no honest peer sends. The connection is
    /// closed with the reason; the peer may come back, after a pause of its own,
    /// as after any other breach of the protocol.
    pub fn break_off(&self, why: &str) {
        if let Some(live) = &self.remote.state().live {
            live.connection
                .close(CloseCode::Protocol.number(), why.as_bytes());
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
