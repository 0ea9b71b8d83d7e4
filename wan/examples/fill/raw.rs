//! Plain QUIC streams of 1 MiB: the controller by itself, or one of quinn's.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farhaven_wan::emulate::{Emulator, EmulatorOptions};
use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TransportConfig};

use super::{Arguments, Failure, Look, Seen, control, random, rate};

const STREAM_BYTES: usize = 1 << 20;
const STREAMS: usize = 32;

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

async fn receive(endpoint: Endpoint, seen: Arc<Seen>) -> Result<(), Failure> {
    let incoming = endpoint.accept().await.ok_or("no connection came")?;
    let connection = incoming.await?;
    while let Ok(mut stream) = connection.accept_uni().await {
        let seen = seen.clone();
        tokio::spawn(async move {
            while let Ok(Some(chunk)) = stream.read_chunk(1 << 20, false).await {
                let bytes = chunk.bytes.len() as u64;
                seen.delivered.fetch_add(bytes, Ordering::Relaxed);
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

/// Begins to send, and says how to look at it.
pub(super) async fn begin(
    arguments: &Arguments,
    seen: &Arc<Seen>,
) -> Result<(Option<Emulator>, Box<dyn Fn() -> Look>), Failure> {
    let (server, client) = receiver(transport(arguments)?)?;
    let mut target = server.local_addr()?;
    let mut emulator = None;
    if !arguments.direct {
        let mut options = EmulatorOptions::new(target, arguments.link);
        options.seed = arguments.seed;
        let started = Emulator::start(options)?;
        target = started.addr();
        emulator = Some(started);
    }
    tokio::spawn(receive(server, seen.clone()));
    let mut sender = endpoint(None)?;
    sender.set_default_client_config(client);
    let connection = sender.connect(target, "farhaven")?.await?;
    let data = random(STREAM_BYTES);
    for _ in 0..STREAMS {
        tokio::spawn(send(connection.clone(), data.clone()));
    }
    let look = move || {
        let stats = connection.stats();
        Look {
            rtt: connection.rtt(),
            window: stats.path.cwnd,
            lost: stats.path.lost_packets,
            sent: stats.path.sent_packets,
            known: control::status(connection.congestion_state())
                .map(super::known)
                .unwrap_or_default(),
        }
    };
    Ok((emulator, Box::new(look)))
}
