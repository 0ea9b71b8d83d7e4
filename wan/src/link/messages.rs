//! Messages of the application: on the control stream, and short ones a second time as a
//! DATAGRAM of QUIC a moment later, in another packet. A packet that is lost then costs
//! that moment, not a round trip, and holds up nothing behind it ([`Inbox`]). The peer says
//! in its handshake whether it takes DATAGRAMs; one that does not gets none.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, sleep_until};

use super::remote::Remote;
use super::streams::{self, Fault};
use crate::frame::{self, Frame};
use crate::limits;
use crate::session::Inbox;

/// Part of a round trip after which the copy leaves: long enough that it shares no packet
/// and few bursts of loss with the first, short enough to stay well within 1.25 round trips.
const COPY_AFTER: f64 = 1.0 / 16.0;
const COPY_AFTER_LEAST: Duration = Duration::from_millis(1);
const COPY_AFTER_MOST: Duration = Duration::from_millis(25);

/// Copies that wait for their moment.
#[derive(Default)]
struct Copies(VecDeque<(Instant, Bytes)>);

impl Copies {
    fn add(&mut self, connection: &Connection, number: u64, message: &[u8]) {
        let short = message.len() <= limits::MAX_COPIED_MESSAGE_BYTES;
        if !short || self.0.len() >= limits::MAX_COPIES_WAITING {
            return;
        }
        if connection.max_datagram_size().is_none() {
            return;
        }
        let after = connection.rtt().mul_f64(COPY_AFTER);
        let after = after.clamp(COPY_AFTER_LEAST, COPY_AFTER_MOST);
        let copy = frame::encode_copy(number, message);
        self.0.push_back((Instant::now() + after, copy));
    }

    /// The next copy, when its moment has come; never, while there is none.
    async fn due(&mut self) -> Bytes {
        loop {
            match self.0.front() {
                None => std::future::pending().await,
                Some((due, _)) => sleep_until(*due).await,
            }
            // Only taken here, after the last wait: a call that is dropped loses nothing.
            if let Some((_, copy)) = self.0.pop_front() {
                return copy;
            }
        }
    }
}

/// Writes what the application has to say.
pub(crate) async fn send(
    connection: &Connection,
    mut stream: SendStream,
    mut outgoing: mpsc::Receiver<Bytes>,
) -> Result<Infallible, Fault> {
    let mut copies = Copies::default();
    let mut number = 0;
    loop {
        tokio::select! {
            message = outgoing.recv() => {
                // Only detaching drops the other end.
                let message = message.ok_or(Fault::Gone)?;
                copies.add(connection, number, &message);
                number += 1;
                streams::write(&mut stream, &Frame::Message(message)).await?;
            }
            copy = copies.due() => {
                // The stream has it all the same: a copy that finds no room is left out.
                let _ = connection.send_datagram(copy);
            }
        }
    }
}

/// Reads what the other application says, from the stream and from copies.
pub(crate) async fn receive(
    remote: &Remote,
    connection: &Connection,
    stream: RecvStream,
) -> Result<Infallible, Fault> {
    // Held while messages are handed over, which may wait for room: they stay in order.
    let inbox = Mutex::new(Inbox::default());
    tokio::select! {
        ended = from_stream(remote, &inbox, stream) => ended,
        ended = from_copies(remote, &inbox, connection) => ended,
    }
}

async fn from_stream(
    remote: &Remote,
    inbox: &Mutex<Inbox>,
    mut stream: RecvStream,
) -> Result<Infallible, Fault> {
    loop {
        match streams::read_frame(&mut stream).await? {
            Frame::Message(bytes) => {
                hand_over(remote, inbox, |inbox| inbox.streamed(bytes)).await;
            }
            other => return Err(other.unexpected("a message").into()),
        }
    }
}

async fn from_copies(
    remote: &Remote,
    inbox: &Mutex<Inbox>,
    connection: &Connection,
) -> Result<Infallible, Fault> {
    loop {
        let copy = connection.read_datagram().await.map_err(|_| Fault::Gone)?;
        let (number, bytes) = frame::decode_copy(copy)?;
        hand_over(remote, inbox, |inbox| inbox.copied(number, bytes)).await;
    }
}

/// Hands over what is in order after one more arrival.
async fn hand_over(
    remote: &Remote,
    inbox: &Mutex<Inbox>,
    arrival: impl FnOnce(&mut Inbox) -> Vec<Bytes>,
) {
    let mut inbox = inbox.lock().await;
    let before = inbox.by_copy();
    let ready = arrival(&mut inbox);
    remote.state().messages_by_copy += inbox.by_copy() - before;
    for message in ready {
        remote.message_arrived(message).await;
    }
}
