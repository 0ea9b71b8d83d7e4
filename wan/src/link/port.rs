//! The seam between a node and the network: a UDP socket of the system, or what
//! a simulation puts in its place.

use std::fmt::Debug;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

/// What a node sends and receives its datagrams through, where that is no UDP
/// socket. Datagrams may be lost, repeated, late and out of order, as UDP's.
pub trait Port: Debug + Send + Sync + 'static {
    /// The address that others send to.
    fn local_addr(&self) -> SocketAddr;

    /// Sends a datagram; never waits.
    fn send(&self, to: SocketAddr, datagram: &[u8]);

    /// The next datagram that came, and from where.
    fn poll_receive(&self, context: &mut Context<'_>) -> Poll<(SocketAddr, Bytes)>;
}

/// A port as QUIC sees it.
#[derive(Debug, Clone)]
pub(crate) struct PortSocket(pub(crate) Arc<dyn Port>);

impl AsyncUdpSocket for PortSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(PortSocket(self.0.clone()))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let all = transmit.contents;
        let one = transmit.segment_size.unwrap_or(all.len()).max(1);
        for datagram in all.chunks(one) {
            self.0.send(transmit.destination, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let (Some(buffer), Some(meta)) = (buffers.first_mut(), meta.first_mut()) else {
            return Poll::Ready(Ok(0));
        };
        let Poll::Ready((from, datagram)) = self.0.poll_receive(context) else {
            return Poll::Pending;
        };
        // A longer one is cut, as by the system.
        let length = datagram.len().min(buffer.len());
        for (slot, byte) in buffer.iter_mut().zip(&datagram) {
            *slot = *byte;
        }
        *meta = RecvMeta {
            addr: from,
            len: length,
            stride: length,
            ..RecvMeta::default()
        };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.local_addr())
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

impl UdpPoller for PortSocket {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
