//! The UDP socket, with buffers as large as the system gives.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use rustix::net::sockopt;

/// What was asked for, and what the system gave. Drops in a buffer that is too
/// small look like congestion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketBuffers {
    /// Bytes asked for, each way.
    pub requested: usize,
    /// Bytes the receive buffer has.
    pub receive: usize,
    /// Bytes the send buffer has.
    pub send: usize,
}

impl SocketBuffers {
    /// Whether the system gave what was asked for.
    pub fn sufficient(&self) -> bool {
        self.receive >= self.requested && self.send >= self.requested
    }
}

/// Binds the socket and sets its buffers.
pub(crate) fn bind(
    address: SocketAddr,
    buffer_bytes: usize,
) -> io::Result<(UdpSocket, SocketBuffers)> {
    let socket = UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    // A refusal is not an error: what counts is what the socket then has.
    let _ = sockopt::set_socket_recv_buffer_size(&socket, buffer_bytes);
    let _ = sockopt::set_socket_send_buffer_size(&socket, buffer_bytes);
    let buffers = SocketBuffers {
        requested: buffer_bytes,
        // Linux reports twice the size, the other half is its bookkeeping.
        receive: sockopt::socket_recv_buffer_size(&socket)? / 2,
        send: sockopt::socket_send_buffer_size(&socket)? / 2,
    };
    Ok((socket, buffers))
}
