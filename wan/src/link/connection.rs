//! One connection of a link, from the greeting to its end.
//!
//! The dialling side opens the control stream. Both say HELLO; the connection
//! takes its turn (an older one of the same peer ends first); both say RESUME,
//! so that what arrived is not sent again; then messages, acknowledgements and
//! data flow until something ends it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::close::{CloseCode, describe};
use super::data;
use super::messages;
use super::remote::{Live, PeerEvent, Remote};
use super::streams::{self, Fault, Read};
use super::tls::{VERSIONS, protocol_name};
use crate::frame::{Frame, Hello, Resume};
use crate::limits;

/// Streams with a higher number go first.
const CONTROL_PRIORITY: i32 = 2;
const ACKNOWLEDGE_PRIORITY: i32 = 1;

/// How often the counters are looked at for a sign of life.
const LIVENESS_PERIOD: Duration = Duration::from_millis(250);

/// Two connections dialled from either side within this time of each other
/// are the same meeting: both sides keep the same one.
const SAME_MEETING: Duration = Duration::from_secs(3);

/// Runs a connection whose key is trusted. Returns how long it was the link,
/// and why it ended.
pub(crate) async fn run(
    remote: Arc<Remote>,
    connection: Connection,
    dialled: bool,
) -> (Option<Duration>, String) {
    match serve(&remote, &connection, dialled).await {
        Ok((lived, why)) => (Some(lived), why),
        Err(fault) => {
            let why = end(&remote, &connection, &fault);
            remote.state().why_last_disconnect = Some(why.clone());
            (None, why)
        }
    }
}

/// Closes a connection, unless it is closed, and says why it ended.
fn end(remote: &Remote, connection: &Connection, fault: &Fault) -> String {
    // Asked before closing: afterwards it would always be "closed by this site".
    if let Some(reason) = connection.close_reason() {
        return describe(&reason);
    }
    let why = fault.to_string();
    if fault.code() == CloseCode::Protocol {
        let address = connection.remote_address();
        tracing::warn!(peer = %remote.record().site, %address, "disconnected: {why}");
    }
    connection.close(fault.code().number(), why.as_bytes());
    why
}

async fn serve(
    remote: &Arc<Remote>,
    connection: &Connection,
    dialled: bool,
) -> Result<(Duration, String), Fault> {
    let limit = remote.options.handshake_timeout;
    let slow = |_| Fault::Slow;
    let greeting = remote.greetings.try_acquire().map_err(|_| Fault::Busy)?;
    let (mut send, mut receive, hello) = timeout(limit, greet(remote, connection, dialled))
        .await
        .map_err(slow)??;
    let version = common_version(&hello)?;
    let generation = claim(remote, dialled, &hello)?;
    let _turn = timeout(limit, remote.turn.lock()).await.map_err(slow)?;
    if *remote.newest.borrow() != generation {
        return Err(Fault::Replaced);
    }
    timeout(limit, resume(remote, &hello, &mut send, &mut receive))
        .await
        .map_err(slow)??;

    let (messages, outgoing) = mpsc::channel(limits::OUTGOING_MESSAGES);
    let since = Instant::now();
    {
        let mut state = remote.state();
        if remote.is_closed() {
            return Err(Fault::Revoked);
        }
        state.last_heard = Some(since);
        state.live = Some(Live {
            generation,
            connection: connection.clone(),
            messages,
            since,
            dialled,
            remote_incarnation: hello.incarnation,
        });
    }
    drop(greeting);
    remote.connected.send_replace(true);
    remote
        .notice(PeerEvent::Connected {
            version,
            remote_site: hello.site,
            incarnation: hello.incarnation,
        })
        .await;
    let fault = work(remote, connection, generation, (send, receive), outgoing).await;
    let why = end(remote, connection, &fault);
    detach(remote, connection, why.clone()).await;
    Ok((since.elapsed(), why))
}

/// Opens the control stream and exchanges HELLO.
async fn greet(
    remote: &Remote,
    connection: &Connection,
    dialled: bool,
) -> Result<(SendStream, RecvStream, Hello), Fault> {
    let control = if dialled {
        connection.open_bi().await
    } else {
        connection.accept_bi().await
    };
    let (mut send, mut receive) = control.map_err(|_| Fault::Gone)?;
    let _ = send.set_priority(CONTROL_PRIORITY);
    let own = Hello {
        versions: VERSIONS.to_vec(),
        incarnation: remote.own_incarnation,
        max_batch_bytes: limits::MAX_BATCH_BYTES as u32,
        max_message_bytes: limits::MAX_MESSAGE_BYTES as u32,
        site: remote.own_site.clone(),
    };
    streams::write(&mut send, &Frame::Hello(own)).await?;
    match streams::read_frame(&mut receive).await? {
        Frame::Hello(hello) => Ok((send, receive, hello)),
        other => Err(other.unexpected("HELLO").into()),
    }
}

/// The version both speak, or the sentence that says what to upgrade.
fn common_version(hello: &Hello) -> Result<u16, Fault> {
    let takes_enough = hello.max_batch_bytes as usize >= limits::MAX_BATCH_BYTES
        && hello.max_message_bytes as usize >= limits::MAX_MESSAGE_BYTES;
    let common = VERSIONS
        .iter()
        .find(|version| hello.versions.contains(version));
    match common {
        Some(version) if takes_enough => Ok(*version),
        Some(_) => Err(Fault::Version(format!(
            "{} takes smaller batches or messages than {} has; upgrade it",
            hello.site,
            protocol_name(),
        ))),
        None => {
            let newest = hello.versions.iter().max().copied().unwrap_or_default();
            Err(Fault::Version(format!(
                "{} speaks farhaven/{newest}, this site {}; upgrade the older one",
                hello.site,
                protocol_name(),
            )))
        }
    }
}

/// Becomes the newest connection, unless both sides dialled at once and the
/// other one is the one both sides keep: that of the side with the lower key.
fn claim(remote: &Remote, dialled: bool, hello: &Hello) -> Result<u64, Fault> {
    let state = remote.state();
    if let Some(live) = &state.live {
        let crossed = live.dialled != dialled
            && live.remote_incarnation == hello.incarnation
            && live.since.elapsed() < SAME_MEETING;
        let keep_dialled = remote.own_key < remote.key;
        if crossed && live.dialled == keep_dialled {
            return Err(Fault::Replaced);
        }
    }
    // Whoever is the link sees a newer one, ends, and gives up its turn.
    let mut generation = 0;
    remote.newest.send_modify(|newest| {
        *newest += 1;
        generation = *newest;
    });
    Ok(generation)
}

/// Tells what this side has of the peer's batches, and learns the same.
async fn resume(
    remote: &Remote,
    hello: &Hello,
    send: &mut SendStream,
    receive: &mut RecvStream,
) -> Result<(), Fault> {
    let own: Resume = {
        let mut state = remote.state();
        state.receiver.begin(hello.incarnation);
        state.receiver.resume()
    };
    streams::write(send, &Frame::Resume(own)).await?;
    let theirs = match streams::read_frame(receive).await? {
        Frame::Resume(resume) => resume,
        other => return Err(other.unexpected("RESUME").into()),
    };
    let mut state = remote.state();
    let resumed = state.sender.resume(&theirs);
    remote.publish(&state);
    Ok(resumed?)
}

/// Everything a connection does, until the first of it ends.
async fn work(
    remote: &Arc<Remote>,
    connection: &Connection,
    generation: u64,
    (send, receive): (SendStream, RecvStream),
    outgoing: mpsc::Receiver<Bytes>,
) -> Fault {
    let mut newest = remote.newest.subscribe();
    let ended = tokio::select! {
        ended = messages::send(connection, send, outgoing) => ended,
        ended = messages::receive(remote, connection, receive) => ended,
        ended = write_acknowledgements(remote, connection) => ended,
        ended = accept_streams(remote, connection, generation) => ended,
        ended = data::send(remote, connection, generation) => ended,
        ended = watch_liveness(remote, connection) => ended,
        _ = newest.wait_for(|newest| *newest != generation) => Err(Fault::Replaced),
        _ = connection.closed() => Err(Fault::Gone),
    };
    match ended {
        Err(fault) => fault,
        Ok(never) => match never {},
    }
}

/// The link is down: what was not acknowledged waits to be sent again.
async fn detach(remote: &Remote, connection: &Connection, why: String) {
    {
        let mut state = remote.state();
        state.live = None;
        let stats = connection.stats();
        state.sender.disconnected();
        state.totals.add(&stats);
        state.why_last_disconnect = Some(why.clone());
        remote.publish(&state);
    }
    remote.connected.send_replace(false);
    remote.notice(PeerEvent::Disconnected { why }).await;
}

async fn write_acknowledgements(
    remote: &Remote,
    connection: &Connection,
) -> Result<Infallible, Fault> {
    // A stream of its own: an application that does not take messages must
    // still learn what became durable.
    let mut stream = connection.open_uni().await.map_err(|_| Fault::Gone)?;
    let _ = stream.set_priority(ACKNOWLEDGE_PRIORITY);
    loop {
        while let Some(ranges) = remote.next_acknowledgement() {
            streams::write(&mut stream, &Frame::Acknowledge(ranges)).await?;
        }
        remote.acknowledgements_wait.notified().await;
    }
}

async fn accept_streams(
    remote: &Arc<Remote>,
    connection: &Connection,
    generation: u64,
) -> Result<Infallible, Fault> {
    let slots = Arc::new(Semaphore::new(limits::MAX_DATA_STREAMS as usize + 1));
    let mut readers: JoinSet<Result<(), Fault>> = JoinSet::new();
    loop {
        tokio::select! {
            accepted = accept_one(connection, &slots) => {
                let (slot, stream) = accepted?;
                let remote = remote.clone();
                readers.spawn(async move {
                    let outcome = read_stream(&remote, generation, stream).await;
                    drop(slot);
                    outcome
                });
            }
            Some(ended) = readers.join_next() => match ended {
                Ok(outcome) => outcome?,
                Err(_) => return Err(Fault::Gone),
            },
        }
    }
}

async fn accept_one(
    connection: &Connection,
    slots: &Arc<Semaphore>,
) -> Result<(tokio::sync::OwnedSemaphorePermit, RecvStream), Fault> {
    let slot = slots
        .clone()
        .acquire_owned()
        .await
        .map_err(|_| Fault::Gone)?;
    let stream = connection.accept_uni().await.map_err(|_| Fault::Gone)?;
    Ok((slot, stream))
}

/// A stream carries batches, or it is the one that carries acknowledgements.
async fn read_stream(
    remote: &Remote,
    generation: u64,
    mut stream: RecvStream,
) -> Result<(), Fault> {
    loop {
        match streams::read(&mut stream).await? {
            Read::Frame(Frame::Batch { seq, bytes }) => {
                remote.data_arrived(generation, seq, bytes).await?;
            }
            Read::Frame(Frame::Acknowledge(ranges)) => {
                let mut state = remote.state();
                if state
                    .live
                    .as_ref()
                    .is_none_or(|live| live.generation != generation)
                {
                    return Ok(());
                }
                let acknowledged = state.sender.acknowledged(&ranges);
                remote.publish(&state);
                acknowledged?;
            }
            Read::Frame(other) => {
                return Err(other.unexpected("a batch or an acknowledgement").into());
            }
            // A stream that was given up: its batches come again, or are forgotten.
            Read::End | Read::Reset => return Ok(()),
        }
    }
}

async fn watch_liveness(remote: &Remote, connection: &Connection) -> Result<Infallible, Fault> {
    let mut heard = connection.stats().udp_rx.datagrams;
    loop {
        tokio::time::sleep(LIVENESS_PERIOD).await;
        let now = connection.stats().udp_rx.datagrams;
        if now != heard {
            heard = now;
            remote.state().last_heard = Some(Instant::now());
        }
    }
}
