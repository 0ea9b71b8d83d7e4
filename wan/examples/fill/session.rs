//! Batches through two whole sessions, as the daemon sends them: window, streams,
//! acknowledgements, messages.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use farhaven_wan::emulate::{Emulator, EmulatorOptions};
use farhaven_wan::{Identity, LinkOptions, Node, NodeOptions, Peer, PeerEvent, PeerRecord};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Arguments, Failure, Look, Seen, random};

/// A batch of 64 units that do not compress.
const BATCH_BYTES: usize = 256 << 10;

/// What this thread opens from now on is in this network namespace.
fn enter(namespace: &str) -> Result<(), Failure> {
    let namespace = std::fs::File::open(Path::new("/run/netns").join(namespace))?;
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(namespace.as_fd(), kind)?;
    Ok(())
}

/// Takes everything at once, and sends messages back.
async fn receive(peer: Peer, seen: Arc<Seen>) {
    while let Some(event) = peer.event().await {
        match event {
            PeerEvent::Data { seq, bytes } => {
                seen.delivered
                    .fetch_add(bytes.len() as u64, Ordering::Relaxed);
                peer.durable(&[seq]);
            }
            PeerEvent::Message(bytes) => {
                let _ = peer.send_message(bytes).await;
            }
            _ => {}
        }
    }
}

async fn send(peer: Peer) {
    let data = random(BATCH_BYTES);
    for seq in 0.. {
        if peer.send_data(seq, data.clone()).await.is_err() {
            return;
        }
    }
}

async fn ping(peer: Peer, every: Duration, seen: Arc<Seen>) {
    let start = Instant::now();
    let (asking, answers) = (peer.clone(), seen);
    tokio::spawn(async move {
        while let Some(event) = peer.event().await {
            if let PeerEvent::Message(ping) = event
                && let Ok(sent) = <[u8; 8]>::try_from(&ping[..])
            {
                let sent = Duration::from_nanos(u64::from_le_bytes(sent));
                answers.pong(start.elapsed().saturating_sub(sent));
            }
        }
    });
    loop {
        tokio::time::sleep(every).await;
        let now = start.elapsed().as_nanos() as u64;
        let _ = asking
            .send_message(Bytes::copy_from_slice(&now.to_le_bytes()))
            .await;
    }
}

/// Begins to send, and says how to look at it.
pub(super) async fn begin(
    arguments: &Arguments,
    seen: &Arc<Seen>,
) -> Result<(Option<Emulator>, Box<dyn Fn() -> Look>), Failure> {
    let directory = std::env::temp_dir().join(format!("farhaven-fill-{}", std::process::id()));
    let mut sites = Vec::new();
    // The receiving site is the first of them.
    for (number, name) in ["east", "west"].into_iter().enumerate() {
        let mut listen = "127.0.0.1:0".parse()?;
        if let Some(places) = &arguments.between {
            let place = &places[1 - number];
            enter(&place.namespace)?;
            listen = place.address;
        }
        let identity = Identity::load_or_create(&directory.join(name), name)?;
        let options = NodeOptions {
            listen,
            link: LinkOptions::default(),
        };
        sites.push((identity.key(), Node::start(&identity, options)?));
    }
    std::fs::remove_dir_all(&directory)?;
    let (Some((west, at_west)), Some((east, at_east))) = (sites.pop(), sites.pop()) else {
        return Err("two sites were started".into());
    };
    let mut target = at_east.local_addr();
    let mut emulator = None;
    if !arguments.direct {
        let mut options = EmulatorOptions::new(target, arguments.link);
        options.seed = arguments.seed;
        let started = Emulator::start(options)?;
        target = started.addr();
        emulator = Some(started);
    }
    let record = |site: &str, key, dial| PeerRecord {
        site: site.to_owned(),
        key,
        addresses: vec![target.to_string()],
        dial,
    };
    let receiver = at_east.trust(record("west", west, false));
    let sender = at_west.trust(record("east", east, true));
    tokio::spawn(receive(receiver, seen.clone()));
    while !sender.status().connected {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if let Some(every) = arguments.control {
        tokio::spawn(ping(sender.clone(), every, seen.clone()));
    }
    if !arguments.idle {
        tokio::spawn(send(sender.clone()));
    }
    // Both sites live as long as they are looked at.
    let sites = (at_west, at_east);
    let look = move || {
        let _ = &sites;
        let status = sender.status();
        Look {
            rtt: status.rtt.unwrap_or_default(),
            window: status.congestion_window_bytes.unwrap_or(0),
            lost: status.lost_packets,
            sent: status.sent_packets,
            known: status.path.map(super::known).unwrap_or_default(),
        }
    };
    Ok((emulator, Box::new(look)))
}
