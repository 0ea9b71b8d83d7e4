//! What waits between a producer and the wire, and what a short queue costs.
//!
//! ```text
//! cargo run --profile ci -p farhaven-wan --example queue -- --link 20mbit,80ms --seconds 20 --json
//! ```
//!
//! Two sites in this process, the emulated link between them, batches of
//! incompressible data as fast as they are taken. Told are the goodput, how
//! old a batch was when it arrived (less the way itself: that is what waited),
//! and the bytes that were taken and not yet at the peer. `--ahead BYTES` sets
//! what may wait on a slow path: 16777216 is the whole window, as if there was
//! no bound.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use farhaven_wan::emulate::{Emulator, EmulatorOptions, HEADER_BYTES, LinkShape};
use farhaven_wan::{Identity, LinkOptions, Node, NodeOptions, PeerEvent, PeerRecord};
use rand::RngCore;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// UDP payload of a full packet once quinn has found the path's size.
const PACKET: u64 = 1452;

struct Arguments {
    link: LinkShape,
    seconds: f64,
    batch: usize,
    ahead: u64,
    json: bool,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut arguments = Arguments {
        link: "20mbit,80ms".parse()?,
        seconds: 20.0,
        batch: 64 * 4096,
        ahead: LinkOptions::default().ahead_bytes,
        json: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--link" => arguments.link = value()?.parse()?,
            "--seconds" => arguments.seconds = value()?.parse()?,
            "--batch" => arguments.batch = value()?.parse()?,
            "--ahead" => arguments.ahead = value()?.parse()?,
            "--json" => arguments.json = true,
            _ => {
                return Err(format!(
                    "unknown argument {word}; known are --link, --seconds, --batch BYTES, --ahead BYTES, --json"
                )
                .into());
            }
        }
    }
    Ok(arguments)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let arguments = arguments()?;
    let directory = std::env::temp_dir().join(format!("farhaven-queue-{}", std::process::id()));
    let mut sites = Vec::new();
    for name in ["east", "west"] {
        let identity = Identity::load_or_create(&directory.join(name), name)?;
        let options = NodeOptions {
            listen: "127.0.0.1:0".parse()?,
            link: LinkOptions {
                ahead_bytes: arguments.ahead,
                ..LinkOptions::default()
            },
        };
        sites.push((identity.key(), Node::start(&identity, options)?));
    }
    std::fs::remove_dir_all(&directory)?;
    let (Some((west, at_west)), Some((east, at_east))) = (sites.pop(), sites.pop()) else {
        return Ok(());
    };
    let emulator = Emulator::start(EmulatorOptions::new(at_east.local_addr(), arguments.link))?;
    let record = |site: &str, key, addresses, dial| PeerRecord {
        site: site.to_owned(),
        key,
        addresses,
        dial,
    };
    let receiver = at_east.trust(record("west", west, Vec::new(), false));
    let sender = at_west.trust(record(
        "east",
        east,
        vec![emulator.addr().to_string()],
        true,
    ));
    let taken: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let ages: Arc<Mutex<Vec<(f64, usize)>>> = Arc::default();
    tokio::spawn({
        let (taken, ages) = (taken.clone(), ages.clone());
        async move {
            while let Some(event) = receiver.event().await {
                if let PeerEvent::Data { seq, bytes } = event {
                    receiver.durable(&[seq]);
                    let taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
                    let age = taken.get(seq as usize).map(Instant::elapsed);
                    let age = age.unwrap_or_default().as_secs_f64();
                    ages.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((age, bytes.len()));
                }
            }
        }
    });
    while !sender.status().connected {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut noise = vec![0; arguments.batch];
    rand::rng().fill_bytes(&mut noise);
    let bytes = Bytes::from(noise);
    let began = Instant::now();
    let sending = tokio::spawn({
        let (sender, taken) = (sender.clone(), taken.clone());
        async move {
            for seq in 0u64.. {
                // Taken at the latest when the call returns; it waits before that.
                if sender.send_data(seq, bytes.clone()).await.is_err() {
                    break;
                }
                taken
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Instant::now());
            }
        }
    });
    let (mut queued, mut samples) = (0u64, 0u64);
    // The first seconds find the rate.
    let settled = (arguments.seconds / 4.0).min(5.0);
    let mut first = None;
    while began.elapsed().as_secs_f64() < arguments.seconds {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if began.elapsed().as_secs_f64() >= settled {
            let seen = ages.lock().unwrap_or_else(PoisonError::into_inner).len();
            first.get_or_insert((seen, Instant::now()));
            queued += sender.status().queued_bytes;
            samples += 1;
        }
    }
    sending.abort();
    let ages = ages.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (from, since) = first.unwrap_or((0, began));
    let ages = ages.get(from..).unwrap_or_default();
    let delivered: usize = ages.iter().map(|(_, bytes)| bytes).sum();
    let goodput = delivered as f64 / since.elapsed().as_secs_f64();
    let carries = arguments.link.rate as f64 / 8.0 * PACKET as f64 / (PACKET + HEADER_BYTES) as f64;
    let way = arguments.link.rtt.as_secs_f64() / 2.0;
    let mut waits: Vec<f64> = ages.iter().map(|(age, _)| (age - way) * 1e3).collect();
    waits.sort_by(f64::total_cmp);
    let at = |part: f64| {
        let index = (waits.len() as f64 * part) as usize;
        waits.get(index).copied().unwrap_or(0.0)
    };
    let forward = emulator.counters().forward;
    let report = serde_json::json!({
        "link": arguments.link.to_string(),
        "batch_bytes": arguments.batch,
        "ahead_bytes": arguments.ahead,
        "goodput_ratio": goodput / carries,
        "queued_bytes_mean": queued / samples.max(1),
        "waited_ms_median": at(0.5),
        "waited_ms_p95": at(0.95),
        "queue_dropped": forward.overflowed,
    });
    if arguments.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    at_west.shutdown().await;
    at_east.shutdown().await;
    Ok(())
}
