//! Batches onto streams: each stream short, so that one lost packet holds up
//! little and no stream has more gaps than QUIC can keep.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use quinn::{Connection, SendStream, VarInt};
use tokio::task::JoinSet;

use super::remote::{Remote, State};
use super::streams::{self, Fault};
use crate::frame::{BATCH_NUMBER_BYTES, HEADER_BYTES, batch_head};
use crate::limits;
use crate::session::Outgoing;

/// What a stream that is given up is closed with.
const GIVEN_UP: VarInt = VarInt::from_u32(0);

/// Small batches share a stream up to so many bytes at least.
const SHORTEST_STREAM: usize = 64 << 10;

/// Below those of control and acknowledgements. Each stream has a lower one than those
/// before it: batches become whole, and durable, in order. (quinn's own way to that,
/// `send_fairness(false)`, ends a stream that it began before it looks at any other, and
/// control would wait for the rest of a batch.)
const FIRST_PRIORITY: i32 = 0;

/// Sends what the session's sender has, as streams become free: the peer
/// allows a number of them at once.
pub(crate) async fn send(
    remote: &Arc<Remote>,
    connection: &Connection,
    generation: u64,
) -> Result<Infallible, Fault> {
    let mut writers: JoinSet<Result<(), Fault>> = JoinSet::new();
    let mut priority = FIRST_PRIORITY;
    loop {
        tokio::select! {
            stream = next_stream(remote, connection) => {
                let stream = stream?;
                let _ = stream.set_priority(priority);
                priority = priority.saturating_sub(1);
                let resets = remote.acknowledgements.borrow().resets;
                // Taken by another stream while this one was waited for.
                let Some(first) = take(remote, generation, usize::MAX) else { continue };
                writers.spawn(write_stream(remote.clone(), stream, generation, first, resets));
            }
            Some(ended) = writers.join_next() => match ended {
                Ok(outcome) => outcome?,
                Err(_) => return Err(Fault::Gone),
            },
        }
    }
}

/// Waits for something to send, then for a stream to send it on.
async fn next_stream(remote: &Remote, connection: &Connection) -> Result<SendStream, Fault> {
    while remote.state().sender.next_bytes().is_none() {
        remote.data_waits.notified().await;
    }
    connection.open_uni().await.map_err(|_| Fault::Gone)
}

/// The next batch, if it fits in `room` bytes and its connection is the link:
/// a writer that outlives its connection for a moment must not count a batch
/// as sent that nobody will get.
fn take(remote: &Remote, generation: u64, room: usize) -> Option<Outgoing> {
    let mut state = remote.state();
    if !is_link(&state, generation) {
        return None;
    }
    let fits = state
        .sender
        .next_bytes()
        .is_some_and(|bytes| bytes + HEADER_BYTES + BATCH_NUMBER_BYTES <= room);
    if fits { state.sender.next() } else { None }
}

fn is_link(state: &State, generation: u64) -> bool {
    state
        .live
        .as_ref()
        .is_some_and(|live| live.generation == generation)
}

/// Writes a batch, and further small ones that wait, then waits until the peer
/// has it all: until then it can be given up.
async fn write_stream(
    remote: Arc<Remote>,
    mut stream: SendStream,
    generation: u64,
    first: Outgoing,
    resets: u64,
) -> Result<(), Fault> {
    let mut forgotten = remote.acknowledgements.subscribe();
    let written = tokio::select! {
        written = write_batches(&remote, &mut stream, generation, first) => Some(written),
        _ = forgotten.wait_for(|now| now.resets != resets) => None,
    };
    let seqs = match written {
        Some(written) => written?,
        None => {
            let _ = stream.reset(GIVEN_UP);
            return Ok(());
        }
    };
    let stopped = stream.stopped();
    tokio::select! {
        stopped = stopped => match stopped {
            Ok(None) => {
                let mut state = remote.state();
                if is_link(&state, generation) {
                    state.sender.arrived(&seqs);
                    remote.publish(&state);
                }
                Ok(())
            }
            Ok(Some(_)) => Err(Fault::Ended),
            Err(_) => Err(Fault::Gone),
        },
        _ = forgotten.wait_for(|now| now.resets != resets) => {
            let _ = stream.reset(GIVEN_UP);
            Ok(())
        }
    }
}

async fn write_batches(
    remote: &Remote,
    stream: &mut SendStream,
    generation: u64,
    first: Outgoing,
) -> Result<Vec<u64>, Fault> {
    // What arrived is learned stream by stream: short ones, so that it is
    // learned soon, but never so short that their number bounds the rate.
    let share = remote.state().sender.queue_bytes() / u64::from(limits::MAX_DATA_STREAMS / 2);
    let mut room = usize::try_from(share)
        .unwrap_or(usize::MAX)
        .clamp(SHORTEST_STREAM, limits::MAX_STREAM_BYTES);
    let mut seqs = Vec::new();
    let mut next = Some(first);
    while let Some(Outgoing { seq, bytes }) = next {
        seqs.push(seq);
        room = room.saturating_sub(HEADER_BYTES + BATCH_NUMBER_BYTES + bytes.len());
        let head = batch_head(seq, bytes.len());
        streams::write_bytes(stream, Bytes::copy_from_slice(&head)).await?;
        streams::write_bytes(stream, bytes).await?;
        next = take(remote, generation, room);
    }
    stream.finish().map_err(|_| Fault::Gone)?;
    Ok(seqs)
}
