//! Fills an emulated link with incompressible data over real QUIC, and says how well.
//!
//! ```text
//! cargo run --profile ci -p farhaven-wan --example fill -- --link 100mbit,80ms,1% --seconds 20
//! cargo run --release -p farhaven-wan --example fill -- --session --link loopback
//! ```
//!
//! Two endpoints on the loopback interface, the emulated link between them. Without
//! `--session` many streams of 1 MiB go from one to the other; with it, batches go through
//! the whole session, as the daemon sends them. Printed are the payload delivered against
//! what the link can carry, packets dropped at the link's queue against packets sent, and
//! the round trip against the idle one. `--control` has the session send a message ten times
//! a second beside the data, and says when its answer was back; `--idle` leaves the data
//! out, for comparison. `--between` runs the session between two network namespaces, over a
//! link that others may use, too. `--controller` compares ours with quinn's own.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farhaven_wan::emulate::{HEADER_BYTES, LINK_FORM, LinkShape};
use rand::RngCore;

/// The adapter is private to the crate's link; this is its second user.
#[path = "../../src/link/control.rs"]
mod control;
mod raw;
mod session;
mod rate {
    pub(crate) use farhaven_wan::rate::{RateController, RateOptions, RateStatus};
}

/// UDP payload of a full packet once quinn has found the path's size.
const PACKET: u64 = 1452;
/// Of a stream's payload in one such packet: short header, packet number, stream frame, tag.
const STREAM_PAYLOAD: u64 = PACKET - 36;

type Failure = Box<dyn Error + Send + Sync>;

/// Where a site is.
struct Place {
    namespace: String,
    address: SocketAddr,
}

impl Place {
    fn of(text: &str) -> Result<Self, Failure> {
        let (namespace, address) = text.split_once('=').ok_or("NAMESPACE=ADDRESS:PORT")?;
        Ok(Place {
            namespace: namespace.to_owned(),
            address: address.parse()?,
        })
    }
}

struct Arguments {
    link: LinkShape,
    /// Two network namespaces with a link between them: from, to.
    between: Option<[Place; 2]>,
    /// No emulated link.
    direct: bool,
    seconds: f64,
    /// Of these, the first ones are left out of the rate.
    skip: f64,
    controller: String,
    seed: u64,
    session: bool,
    /// How often a ping goes out.
    control: Option<Duration>,
    /// No data.
    idle: bool,
    /// At these seconds the link takes these shapes.
    steps: Vec<(f64, LinkShape)>,
    json: bool,
    trace: bool,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut arguments = Arguments {
        link: "100mbit,80ms,0.1%".parse()?,
        between: None,
        direct: false,
        seconds: 20.0,
        skip: 0.0,
        controller: "ours".into(),
        seed: 1,
        session: false,
        control: None,
        idle: false,
        steps: Vec::new(),
        json: false,
        trace: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--link" => match value()?.as_str() {
                "loopback" => arguments.direct = true,
                shape => arguments.link = shape.parse()?,
            },
            // The link is somebody else's; --link says what it carries.
            "--between" => {
                let value = value()?;
                let (from, to) = value.split_once(',').ok_or("--between FROM,TO")?;
                arguments.between = Some([Place::of(from)?, Place::of(to)?]);
                (arguments.session, arguments.direct) = (true, true);
            }
            "--seconds" => arguments.seconds = value()?.parse()?,
            "--skip" => arguments.skip = value()?.parse()?,
            "--controller" => arguments.controller = value()?,
            "--seed" => arguments.seed = value()?.parse()?,
            "--session" => arguments.session = true,
            "--control" => {
                arguments.session = true;
                arguments.control = Some(Duration::from_millis(100));
            }
            "--idle" => {
                arguments.session = true;
                arguments.idle = true;
            }
            "--step" => {
                let value = value()?;
                let (at, shape) = value.split_once(':').ok_or("--step SECONDS:LINK")?;
                arguments.steps.push((at.parse()?, shape.parse()?));
            }
            "--json" => arguments.json = true,
            "--trace" => arguments.trace = true,
            _ => {
                return Err(format!(
                    "unknown argument {word}; known are --link {LINK_FORM} or loopback, \
                     --between NAMESPACE=ADDRESS:PORT,NAMESPACE=ADDRESS:PORT, --seconds N, --skip N, --session, --control, --idle, \
                     --controller ours|cubic|bbr, --seed N, --step SECONDS:LINK, --json, --trace"
                )
                .into());
            }
        }
    }
    Ok(arguments)
}

/// What arrived.
#[derive(Default)]
struct Seen {
    delivered: AtomicU64,
    pongs: Mutex<Vec<f64>>,
}

impl Seen {
    fn pong(&self, after: Duration) {
        let mut pongs = self.pongs.lock().unwrap_or_else(PoisonError::into_inner);
        pongs.push(after.as_secs_f64() * 1e3);
    }

    /// Median and 95th percentile in milliseconds, and how many.
    fn pongs(&self) -> (f64, f64, usize) {
        let mut pongs = self.pongs.lock().unwrap_or_else(PoisonError::into_inner);
        pongs.sort_by(f64::total_cmp);
        (part(&pongs, 50), part(&pongs, 95), pongs.len())
    }
}

/// What the sender's connection tells of itself.
struct Look {
    rtt: Duration,
    window: u64,
    lost: u64,
    sent: u64,
    known: String,
}

/// What our controller knows, for the trace.
fn known(status: rate::RateStatus) -> String {
    format!(
        "estimate {:.1} Mbit/s base {:.1} ms loss {:.3}{}",
        status.bandwidth as f64 / 1e6,
        status.base_rtt.unwrap_or_default().as_secs_f64() * 1e3,
        status.loss,
        if status.competing { " competing" } else { "" },
    )
}

fn random(bytes: usize) -> bytes::Bytes {
    let mut data = vec![0; bytes];
    rand::rng().fill_bytes(&mut data);
    data.into()
}

fn part(sorted: &[f64], percent: usize) -> f64 {
    sorted
        .get(sorted.len() * percent / 100)
        .copied()
        .unwrap_or(0.0)
}

/// Seconds of CPU that this process used.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let ticks = |index: usize| -> f64 {
        let field = after_name.split(' ').nth(index);
        field.and_then(|text| text.parse().ok()).unwrap_or(0.0)
    };
    (ticks(11) + ticks(12)) / 100.0
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let arguments = arguments()?;
    let link = arguments.link;
    let seen = Arc::new(Seen::default());
    let (emulator, look) = match arguments.session {
        true => session::begin(&arguments, &seen).await?,
        false => raw::begin(&arguments, &seen).await?,
    };
    let overflowed = || {
        emulator
            .as_ref()
            .map_or(0, |e| e.counters().forward.overflowed)
    };

    let mut cpu = cpu_seconds();
    let begun = Instant::now();
    let mut start = begun;
    let mut before = 0;
    let mut skipped = arguments.skip <= 0.0;
    let mut steps = arguments.steps.iter();
    let mut step = steps.next();
    let mut rtts = Vec::new();
    let mut last = (0, start);
    // What the link could have carried, over all its shapes.
    let mut possible = 0.0;
    let mut shape = link;
    let mut looked = start;
    while begun.elapsed().as_secs_f64() < arguments.seconds {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if !skipped && begun.elapsed().as_secs_f64() >= arguments.skip {
            (skipped, start, cpu, possible) = (true, Instant::now(), cpu_seconds(), 0.0);
            before = seen.delivered.load(Ordering::Relaxed);
            looked = start;
            rtts.clear();
        }
        let payload = shape.rate as f64 / 8.0 * PACKET as f64 / (PACKET + HEADER_BYTES) as f64;
        possible += payload * looked.elapsed().as_secs_f64();
        looked = Instant::now();
        rtts.push(look().rtt.as_secs_f64() * 1e3);
        if let Some((at, next)) = step
            && begun.elapsed().as_secs_f64() >= *at
        {
            if let Some(emulator) = &emulator {
                emulator.set(*next);
            }
            shape = *next;
            step = steps.next();
        }
        if arguments.trace && last.1.elapsed() > Duration::from_millis(250) {
            let bytes = seen.delivered.load(Ordering::Relaxed);
            let now = look();
            println!(
                "{:6.2}s {:7.2} Mbit/s rtt {:6.1} ms window {:8} lost {} of {} queue drops {} {}",
                begun.elapsed().as_secs_f64(),
                (bytes - last.0) as f64 * 8e-6 / last.1.elapsed().as_secs_f64(),
                now.rtt.as_secs_f64() * 1e3,
                now.window,
                now.lost,
                now.sent,
                overflowed(),
                now.known,
            );
            last = (bytes, Instant::now());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes = seen.delivered.load(Ordering::Relaxed) - before;
    let forward = emulator
        .as_ref()
        .map(|emulator| emulator.counters().forward)
        .unwrap_or_default();
    let cpu = cpu_seconds() - cpu;
    let offered = forward.packets + forward.lost + forward.overflowed;
    let idle_ms = shape.rtt.as_secs_f64() * 1e3;
    rtts.sort_by(f64::total_cmp);
    let rtt_mean = rtts.iter().sum::<f64>() / rtts.len().max(1) as f64;
    let rtt_p95 = part(&rtts, 95);
    // Of UDP payload, and of what QUIC's own headers leave of it to streams.
    let ratio = bytes as f64 / possible;
    let stream_ratio = ratio * PACKET as f64 / STREAM_PAYLOAD as f64;
    let dropped = forward.overflowed as f64 / offered.max(1) as f64;
    let (pong, pong_p95, pongs) = seen.pongs();
    if arguments.json {
        let report = serde_json::json!({
            "link": if arguments.direct { "loopback".into() } else { link.to_string() },
            "session": arguments.session,
            "controller": arguments.controller,
            "seconds": seconds,
            "delivered_bytes": bytes,
            "goodput_bits_per_s": bytes as f64 * 8.0 / seconds,
            "goodput_ratio": ratio,
            "stream_payload_ratio": stream_ratio,
            "queue_dropped_ratio": dropped,
            "random_lost": forward.lost,
            "rtt_ms_mean": rtt_mean,
            "rtt_ms_p95": rtt_p95,
            "rtt_ratio": rtt_mean / idle_ms,
            "control_ms_median": pong,
            "control_ms_p95": pong_p95,
            "control_pings": pongs,
            "cpu_s": cpu,
            "cpu_s_per_gb": cpu / (bytes as f64 / 1e9),
        });
        println!("{report}");
        return Ok(());
    }
    let rate = bytes as f64 * 8e-6 / seconds;
    let cost = cpu / (bytes as f64 / 1e9);
    if arguments.direct && arguments.between.is_none() {
        println!(
            "loopback: {rate:.0} Mbit/s of payload, CPU {:.2} cores, {cost:.2} s per GB, both ends",
            cpu / seconds
        );
    } else {
        println!(
            "{link} {}: {rate:.1} Mbit/s, {ratio:.3} of the link's UDP payload, {stream_ratio:.3} \
             of its stream payload; dropped at the queue {:.3} % of {offered} packets; \
             rtt {rtt_mean:.1} ms (x{:.2}), p95 {rtt_p95:.1}; CPU {:.2} cores, {cost:.2} s per GB",
            arguments.controller,
            dropped * 100.0,
            rtt_mean / idle_ms,
            cpu / seconds,
        );
    }
    if arguments.control.is_some() {
        println!(
            "control: {pongs} pings, median {pong:.1} ms (x{:.2}), p95 {pong_p95:.1} ms (x{:.2})",
            pong / idle_ms,
            pong_p95 / idle_ms,
        );
    }
    Ok(())
}
