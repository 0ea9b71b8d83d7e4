//! The emulator's sockets: several datagrams a system call, in and out.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};

/// How often a receiving thread gets to look whether the emulator is being stopped.
const STOP_CHECK: Duration = Duration::from_millis(100);
const SOCKET_BUFFER: usize = 4 << 20;
/// The most that one reception brings, and one transmission takes.
pub(super) const RECEIVE_BYTES: usize = 65_536;

/// A datagram under way and where it leaves.
pub(super) struct Datagram {
    pub(super) port: Arc<Port>,
    pub(super) destination: SocketAddr,
    pub(super) ecn: Option<EcnCodepoint>,
    pub(super) contents: Bytes,
}

/// Sends datagrams in order; neighbours of one size to one place go in one system call.
pub(super) fn send_batches(due: &[Datagram], buffer: &mut Vec<u8>) {
    let mut rest = due;
    while let Some(first) = rest.first() {
        let size = first.contents.len();
        let most = first.port.state.max_gso_segments().clamp(1, 64);
        let mut count = 0;
        buffer.clear();
        for next in rest.iter().take(most) {
            let fits = next.contents.len() <= size
                && buffer.len() + next.contents.len() <= RECEIVE_BYTES - 1_000
                && next.destination == first.destination
                && next.ecn == first.ecn
                && Arc::ptr_eq(&next.port, &first.port);
            if count > 0 && !fits {
                break;
            }
            buffer.extend_from_slice(&next.contents);
            count += 1;
            if next.contents.len() < size {
                // A shorter one ends the batch: all others must have the same size.
                break;
            }
        }
        first.port.send(&Transmit {
            destination: first.destination,
            ecn: first.ecn,
            contents: buffer,
            segment_size: (count > 1).then_some(size),
            src_ip: None,
        });
        rest = rest.get(count..).unwrap_or_default();
    }
}

/// A UDP socket that sends and receives several datagrams at a time, blocking.
pub(super) struct Port {
    socket: UdpSocket,
    state: UdpSocketState,
    pub(super) addr: SocketAddr,
}

impl Port {
    pub(super) fn bind(addr: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(addr)?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // `UdpSocketState` made it non-blocking, for tokio; these threads want to sleep.
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(STOP_CHECK))?;
        socket.set_write_timeout(Some(STOP_CHECK))?;
        // As much as the system allows: a drop here would be a loss nobody counted.
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER);
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER);
        let addr = socket.local_addr()?;
        Ok(Self {
            socket,
            state,
            addr,
        })
    }

    /// The next datagrams from one sender; `None` after a while without any, or when a
    /// former datagram was refused (the target is not there yet).
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Option<(RecvMeta, Bytes)> {
        let mut meta = [RecvMeta::default()];
        let mut slices = [IoSliceMut::new(buffer)];
        let socket = UdpSockRef::from(&self.socket);
        self.state.recv(socket, &mut slices, &mut meta).ok()?;
        let [meta] = meta;
        Some((meta, Bytes::copy_from_slice(buffer.get(..meta.len)?)))
    }

    fn send(&self, transmit: &Transmit<'_>) {
        // A datagram that cannot be sent is a lost datagram, on this link as on any.
        let _ = self.state.send(UdpSockRef::from(&self.socket), transmit);
    }
}
