//! Fills an emulated link with incompressible data over real QUIC, and says how well.
//!
//! ```text
//! cargo run --profile ci -p farhaven-wan --example fill -- --link 100mbit,80ms,1% --seconds 20
//! ```
//!
//! Two endpoints on the loopback interface, the emulated link between them, many streams of
//! 1 MiB from one to the other. Printed are the payload delivered against what the link can
//! carry, packets dropped at the link's queue against packets sent, and the round trip
//! against the idle one. `--controller` compares ours with quinn's own.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farhaven_wan::emulate::{Emulator, EmulatorOptions, HEADER_BYTES, LINK_FORM, LinkShape};
use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TransportConfig};
use rand::RngCore;

/// The adapter is private to the crate's link; this is its second user.
#[path = "../src/link/control.rs"]
mod control;
mod rate {
    pub(crate) use farhaven_wan::rate::{RateController, RateOptions, RateStatus};
}

/// UDP payload of a full packet once quinn has found the path's size.
const PACKET: u64 = 1452;
const STREAM_BYTES: usize = 1 << 20;
const STREAMS: usize = 32;

type Failure = Box<dyn Error + Send + Sync>;

struct Arguments {
    link: LinkShape,
    seconds: f64,
    controller: String,
    seed: u64,
    /// At these seconds the link takes these shapes.
    steps: Vec<(f64, LinkShape)>,
    json: bool,
    trace: bool,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut arguments = Arguments {
        link: "100mbit,80ms,0.1%".parse()?,
        seconds: 20.0,
        controller: "ours".into(),
        seed: 1,
        steps: Vec::new(),
        json: false,
        trace: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--link" => arguments.link = value()?.parse()?,
            "--seconds" => arguments.seconds = value()?.parse()?,
            "--controller" => arguments.controller = value()?,
            "--seed" => arguments.seed = value()?.parse()?,
            "--step" => {
                let value = value()?;
                let (at, shape) = value.split_once(':').ok_or("--step SECONDS:LINK")?;
                arguments.steps.push((at.parse()?, shape.parse()?));
            }
            "--json" => arguments.json = true,
            "--trace" => arguments.trace = true,
            _ => {
                return Err(format!(
                    "unknown argument {word}; known are --link {LINK_FORM}, --seconds N, \
                     --controller ours|cubic|bbr, --seed N, --step SECONDS:LINK, --json, --trace"
                )
                .into());
            }
        }
    }
    Ok(arguments)
}

fn transport(arguments: &Arguments) -> Result<Arc<TransportConfig>, Failure> {
    let flight = arguments.link.bandwidth_delay_bytes();
    let window = (4 * flight).max(16 << 20);
    // quinn takes credit for what is written, not for what is sent: a receive window that
    // is not clearly larger than the send window stalls the sender for a round trip or more.
    let receive = u32::try_from(2 * window)?;
    let mut transport = TransportConfig::default();
    let controller: Arc<dyn ControllerFactory + Send + Sync> = match arguments.controller.as_str() {
        "ours" => control::factory(&rate::RateOptions::default()),
        "cubic" => Arc::new(CubicConfig::default()),
        "bbr" => Arc::new(BbrConfig::default()),
        other => return Err(format!("no controller '{other}': ours, cubic or bbr").into()),
    };
    transport
        .congestion_controller_factory(controller)
        .max_concurrent_uni_streams(256u32.into())
        .stream_receive_window((2u32 << 20).into())
        .receive_window(receive.into())
        .send_window(window);
    Ok(Arc::new(transport))
}

fn endpoint(server: Option<ServerConfig>) -> Result<Endpoint, Failure> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4 << 20)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4 << 20)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(Endpoint::new(
        EndpointConfig::default(),
        server,
        socket,
        runtime,
    )?)
}

fn receiver(transport: Arc<TransportConfig>) -> Result<(Endpoint, ClientConfig), Failure> {
    let made = rcgen::generate_simple_self_signed(["farhaven".to_string()])?;
    let certificate = made.cert.der().clone();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.into())?;
    let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
    server.transport_config(transport.clone());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client)?));
    client.transport_config(transport);
    Ok((endpoint(Some(server))?, client))
}

async fn receive(endpoint: Endpoint, delivered: Arc<AtomicU64>) -> Result<(), Failure> {
    let incoming = endpoint.accept().await.ok_or("no connection came")?;
    let connection = incoming.await?;
    while let Ok(mut stream) = connection.accept_uni().await {
        let delivered = delivered.clone();
        tokio::spawn(async move {
            while let Ok(Some(chunk)) = stream.read_chunk(1 << 20, false).await {
                delivered.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
            }
        });
    }
    Ok(())
}

async fn send(connection: Connection, data: bytes::Bytes) -> Result<(), Failure> {
    loop {
        let mut stream = connection.open_uni().await?;
        stream.write_chunk(data.clone()).await?;
        stream.finish()?;
    }
}

/// What our controller knows, for the trace.
fn known(connection: &Connection) -> String {
    let Some(status) = control::status(connection.congestion_state()) else {
        return String::new();
    };
    format!(
        "estimate {:.1} Mbit/s base {:.1} ms loss {:.3}{}",
        status.bandwidth as f64 / 1e6,
        status.base_rtt.unwrap_or_default().as_secs_f64() * 1e3,
        status.loss,
        if status.competing { " competing" } else { "" },
    )
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
    let (server, client) = receiver(transport(&arguments)?)?;
    let mut options = EmulatorOptions::new(server.local_addr()?, link);
    options.seed = arguments.seed;
    let emulator = Emulator::start(options)?;
    let delivered = Arc::new(AtomicU64::new(0));
    tokio::spawn(receive(server, delivered.clone()));
    let mut sender = endpoint(None)?;
    sender.set_default_client_config(client);
    let target: SocketAddr = emulator.addr();
    let connection = sender.connect(target, "farhaven")?.await?;
    let mut data = vec![0; STREAM_BYTES];
    rand::rng().fill_bytes(&mut data);
    let data = bytes::Bytes::from(data);

    let cpu = cpu_seconds();
    let start = Instant::now();
    for _ in 0..STREAMS {
        tokio::spawn(send(connection.clone(), data.clone()));
    }
    let mut steps = arguments.steps.iter();
    let mut step = steps.next();
    let mut rtts = Vec::new();
    let mut last = (0, start);
    // What the link could have carried, over all its shapes.
    let mut possible = 0.0;
    let mut shape = link;
    let mut looked = start;
    while start.elapsed().as_secs_f64() < arguments.seconds {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let payload = shape.rate as f64 / 8.0 * PACKET as f64 / (PACKET + HEADER_BYTES) as f64;
        possible += payload * looked.elapsed().as_secs_f64();
        looked = Instant::now();
        rtts.push(connection.rtt().as_secs_f64() * 1e3);
        if let Some((at, next)) = step
            && start.elapsed().as_secs_f64() >= *at
        {
            emulator.set(*next);
            shape = *next;
            step = steps.next();
        }
        if arguments.trace && last.1.elapsed() > Duration::from_millis(250) {
            let bytes = delivered.load(Ordering::Relaxed);
            let stats = connection.stats();
            println!(
                "{:6.2}s {:7.2} Mbit/s rtt {:6.1} ms window {:8} lost {} of {} queue drops {} {}",
                start.elapsed().as_secs_f64(),
                (bytes - last.0) as f64 * 8e-6 / last.1.elapsed().as_secs_f64(),
                connection.rtt().as_secs_f64() * 1e3,
                stats.path.cwnd,
                stats.path.lost_packets,
                stats.path.sent_packets,
                emulator.counters().forward.overflowed,
                known(&connection),
            );
            last = (bytes, Instant::now());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes = delivered.load(Ordering::Relaxed);
    let forward = emulator.counters().forward;
    let cpu = cpu_seconds() - cpu;
    let offered = forward.packets + forward.lost + forward.overflowed;
    let idle_ms = shape.rtt.as_secs_f64() * 1e3;
    rtts.sort_by(f64::total_cmp);
    let rtt_mean = rtts.iter().sum::<f64>() / rtts.len().max(1) as f64;
    let rtt_p95 = rtts.get(rtts.len() * 95 / 100).copied().unwrap_or(0.0);
    let ratio = bytes as f64 / possible;
    let dropped = forward.overflowed as f64 / offered.max(1) as f64;
    if arguments.json {
        let report = serde_json::json!({
            "link": link.to_string(),
            "controller": arguments.controller,
            "seconds": seconds,
            "delivered_bytes": bytes,
            "goodput_bits_per_s": bytes as f64 * 8.0 / seconds,
            "goodput_ratio": ratio,
            "queue_dropped_ratio": dropped,
            "random_lost": forward.lost,
            "rtt_ms_mean": rtt_mean,
            "rtt_ms_p95": rtt_p95,
            "rtt_ratio": rtt_mean / idle_ms,
            "cpu_s": cpu,
        });
        println!("{report}");
    } else {
        println!(
            "{link} {}: {:.1} Mbit/s, {ratio:.3} of the link's payload; dropped at the queue \
             {:.3} % of {offered} packets; rtt {rtt_mean:.1} ms (x{:.2}), p95 {rtt_p95:.1}; \
             CPU {:.2} cores",
            arguments.controller,
            bytes as f64 * 8e-6 / seconds,
            dropped * 100.0,
            rtt_mean / idle_ms,
            cpu / seconds,
        );
    }
    connection.close(0u32.into(), b"");
    Ok(())
}
